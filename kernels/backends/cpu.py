"""The op on the CPU, in Numba: native loops for each width, on as many threads as torch uses.

This file divides the work; kernels/backends/_loops.py does it.  The threads are torch's own OpenMP team
(kernels/threads.py), and the loops run without the GIL: Numba's threading layers are not used, so nothing aborts when
two kernels run at once, and a call of the loops on a part of the work is an ordinary function call.  The division
may depend on the number of threads, the results do not: a bag, and a row, is one thread's work, start to end.

    forward   bags in the order of offsets, cut where a thread's share of (ids + bags) ends
    backward  tables, the largest first, each to the thread that has least so far; a table that has more than half of a
              thread's share is cut into one slice per thread, by a hash of the row

Compiled on first use of a width (a second or two), then read from Numba's cache on disk: `Kernel` does either when it
is made, so no step waits for it.
"""

import importlib.util
import platform
import weakref
from bisect import bisect_left
from functools import cache

import torch
from torch import Tensor

from kernels import threads
from kernels.ops import DECAYS, STATES, Spec, State, blank, check_ids, row_key

SPEED = {"cpu": 3}
WIDEST = 1024  # columns; a row is a value in registers, and LLVM takes long over wider ones
REUSED = 1 << 20  # bytes; smaller outputs come from the allocator, which has such pieces at hand
SMALL = 1 << 14  # elements; below this much work waking a thread costs more than it saves


def available() -> bool:
    return importlib.util.find_spec("numba") is not None


def supports(spec: Spec, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if not available():
        return "needs Numba, which is not installed"
    wide = [t for t, table in enumerate(spec.tables) if table.dim > WIDEST]
    if wide:
        return f"{spec.title(wide[0])} has {spec.tables[wide[0]].dim} columns, more than {WIDEST}"
    if spec.weights == torch.float16 and not _converts_halves():
        return "float16 tables need a CPU that converts float16 (F16C, or ARM)"
    return None


class Kernel:
    def __init__(self, spec: Spec, state: State) -> None:
        import numpy as np

        self.spec, self.state, self.np = spec, state, np
        self.outputs = Outputs()
        self.scratch: dict[int, tuple] = {}  # of each thread: grows to the longest part, 16 bytes an id
        features = spec.features
        self.starts = np.array([spec.starts[t] for t in features], np.uint64)
        self.row_starts = np.array([spec.row_starts[t] for t in features], np.uint64)
        self.rows = np.array([spec.tables[t].rows for t in features], np.uint64)
        self.columns = np.array(spec.columns[:-1], np.uint64)
        self.dims = [spec.tables[t].dim for t in features]
        self.tables = np.zeros((len(spec.tables), 6), np.uint64)
        at = 0
        for t, table in enumerate(spec.tables):
            bits = max(1, (table.rows - 1).bit_length())
            end = at + len(spec.features_of[t])
            self.tables[t] = (spec.starts[t], spec.row_starts[t], table.rows, bits, at, end)
            at = end
        self.features = np.array([f for of in spec.features_of for f in of], np.int64)
        self.none = np.zeros(0, np.float32)
        self.states = [np.zeros(0, np.float32)] * 2
        for dim in set(self.dims):
            self._pool(dim, torch.int64)
            self._learn(dim, torch.int64)

    def forward(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Tensor:
        spec, np = self.spec, self.np
        ids, starts = ids_N.contiguous(), offsets.to(torch.int64).contiguous()
        offset = starts.numpy()
        bags = (offset.size - 1) // len(spec.features)
        shape = (ids.numel(), self.dims[0]) if spec.pooling == "none" else (bags, spec.columns[-1])
        out = self.outputs.take(shape, spec.output)
        if offset[0] != 0 or offset[-1] != ids.numel():
            check_ids(spec, ids_N, offsets)
        weights, row_scales = _array(self.state.weights), _array(self.state.scales)
        target, numbers = _array(out), ids.numpy()
        scales = self.none if weights_N is None else weights_N.detach().contiguous().numpy()

        def work(parts) -> bool:
            if spec.pooling == "none":
                return all(
                    self._gather(self.dims[f], ids.dtype)(
                        *(weights, row_scales, self.starts[f], self.row_starts[f], self.rows[f]),
                        *(numbers, scales, target, first, end),
                    )
                    for f, first, end in parts
                )
            return all(
                self._pool(dim, ids.dtype)(
                    *(weights, row_scales, self.starts, self.row_starts, self.rows, self.columns),
                    *(numbers, offset, scales, target),
                    *(bags, spec.columns[-1], np.array(of_dim, np.int64), spec.pooling == "mean"),
                )
                for dim, of_dim in _by(parts, lambda part: self.dims[part[0]])
            )

        if not all(threads.run(work, [(parts,) for parts in self._bag_parts(offset, bags, ids.numel())])):
            check_ids(spec, ids_N, offsets)
            raise AssertionError("a kernel refused ids that are right")
        return out

    def backward_update(
        self, grad: Tensor, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None, *, weights_grad: bool
    ) -> Tensor | None:
        spec, np, state = self.spec, self.np, self.state
        ids, starts = ids_N.contiguous(), offsets.to(torch.int64).contiguous()
        offset = starts.numpy()
        bags = (offset.size - 1) // len(spec.features)
        if offset[0] != 0 or offset[-1] != ids.numel():
            check_ids(spec, ids_N, offsets)
        state.step += 1
        scaled = weights_N is not None or spec.pooling == "mean"
        count = ids.numel() if scaled else 0
        shared = (np.empty(count, np.uint64), np.empty(count, np.float32))
        scale_grads = torch.empty(ids.numel() if weights_grad else 0)
        states = [_array(state.states[name]) for name in STATES[spec.optimizer.kind]]
        states += [self.none] * (2 - len(states))
        keys = np.zeros(len(spec.tables), np.uint64)
        if self._stochastic:
            keys[:] = [row_key(spec, step=state.step, table=t) for t in range(len(spec.tables))]
        scales = self.none if weights_N is None else weights_N.detach().contiguous().numpy()
        given = (_array(state.weights), _array(state.scales), *states, _array(grad))
        given = (*given, ids.numpy(), offset, scales, scale_grads.numpy())
        about = (self.tables, self.features, self.columns, keys, bags, spec.columns[-1])
        values = (self._numbers(), self._flags(weighted=weights_N is not None, wanted=weights_grad))

        def work(share, parts) -> bool:
            longest = max((size for size, *_ in parts), default=0)
            room = (*self._room(share, longest), *shared)
            return all(
                self._learn(dim, ids.dtype)(
                    *given, np.array([part[1:] for part in of_dim], np.int64), *about, room, *values
                )
                for dim, of_dim in _by(parts, lambda part: spec.tables[part[1]].dim)
            )

        if not all(threads.run(work, list(enumerate(self._table_parts(offset, bags))))):
            check_ids(spec, ids_N, offsets)
            raise AssertionError("a kernel refused ids that are right")
        return scale_grads if weights_grad else None

    def _threads(self, ids: int) -> int:
        return torch.get_num_threads() if ids * max(self.dims) > SMALL else 1

    def _bag_parts(self, offset, bags: int, ids: int) -> list[list[tuple[int, int, int]]]:
        """Per thread: (feature, first bag, end), or for no pooling (feature, first id, end), of about equal work."""
        count, total = self._threads(ids), offset.size - 1
        cuts = [
            bisect_left(range(total), (ids + total) * k // count, key=lambda q: int(offset[q]) + q)
            for k in range(count)
        ] + [total]
        found = []
        for first, end in zip(cuts, cuts[1:], strict=False):
            parts = []
            for f in range(first // bags, -(-end // bags)) if end > first else ():
                a, b = max(first, f * bags), min(end, (f + 1) * bags)
                if self.spec.pooling == "none":
                    parts.append((f, int(offset[a]), int(offset[b])))
                else:
                    parts.append((f, a - f * bags, b - f * bags))
            found.append(parts)
        return found

    def _table_parts(self, offset, bags: int) -> list[list[tuple[int, int, int, int]]]:
        """Per thread: (ids, table, slice, slices), of about equal work."""
        ends = offset[:: max(bags, 1)]
        sizes = [sum(int(ends[f + 1] - ends[f]) for f in features) if bags else 0 for features in self.spec.features_of]
        count = self._threads(sum(sizes))
        share = sum(sizes) / count
        parts = []
        for t, size in enumerate(sizes):
            slices = count if size > share / 2 else 1
            parts += [(size, t, k, slices) for k in range(slices)] if size else []
        found: list[list[tuple[int, int, int, int]]] = [[] for _ in range(count)]
        loads = [0.0] * count
        for part in sorted(parts, key=lambda p: -p[0] / p[3]):
            least = loads.index(min(loads))
            loads[least] += part[0] / part[3]
            found[least].append(part)
        return found

    def _room(self, thread: int, size: int) -> tuple:
        if thread not in self.scratch or self.scratch[thread][0].size < size:
            self.scratch[thread] = (self.np.empty(size, self.np.uint64), self.np.empty(size, self.np.uint64))
        return self.scratch[thread]

    @property
    def _stochastic(self) -> bool:
        return self.spec.stochastic and self.spec.weights != torch.float32

    def _numbers(self):
        """lr, eps, betas, 1 - betas, bias corrections, weight decay, largest gradient, largest norm."""
        opt, step = self.spec.optimizer, self.state.step
        corrections = (1 - opt.beta1**step, 1 - opt.beta2**step)
        limits = (opt.max_gradient or 0.0, opt.max_norm or 0.0)
        betas = (opt.beta1, opt.beta2, 1 - opt.beta1, 1 - opt.beta2)
        return self.np.array([self.state.lr, opt.eps, *betas, *corrections, opt.weight_decay, *limits], self.np.float32)

    def _flags(self, *, weighted: bool, wanted: bool):
        opt = self.spec.optimizer
        flags = [list(STATES).index(opt.kind), DECAYS.index(opt.decay), opt.max_gradient is not None]
        flags += [opt.max_norm is not None, self._stochastic, weighted, wanted]
        return self.np.array([*flags, self.spec.pooling != "none", self.spec.pooling == "mean"], self.np.int64)

    def _pool(self, dim: int, ids: torch.dtype):
        return _compiled("pool", self.spec.weights, self.spec.output, ids, dim, self.spec.weighted)

    def _gather(self, dim: int, ids: torch.dtype):
        return _compiled("gather", self.spec.weights, self.spec.output, ids, dim, self.spec.weighted)

    def _learn(self, dim: int, ids: torch.dtype):
        scaled = self.spec.weighted or self.spec.pooling == "mean"
        return _compiled("learn", self.spec.weights, self.spec.output, ids, dim, scaled)


class Outputs:
    """Memory for outputs, used again once nobody holds the output that lay there before.

    Fresh memory costs a page fault every 4 KiB: at one id per bag that is more time than the look-up itself.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, weakref.ref]] = []  # memory, and who holds it

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        if size < REUSED:
            return torch.empty(shape, dtype=dtype)
        busy = [kept for kept in self.kept if kept[1]() is not None]
        free = [kept for kept in self.kept if kept[1]() is None and kept[0].numel() >= size]
        memory = free.pop()[0] if free else blank(size + size // 4, torch.uint8, torch.device("cpu"))
        # The output's storage holds this very array, and so do its views and what autograd has saved of it.
        holder = memory.numpy()[:size]
        self.kept = [*busy, *free[:1], (memory, weakref.ref(holder))]
        return torch.from_numpy(holder).view(dtype).view(shape)


@cache
def _compiled(name: str, weights: torch.dtype, output: torch.dtype, ids: torch.dtype, dim: int, last: bool):
    """A loop for these dtypes, this width and its last literal; called without the two literals.

    Straight to the compiled code: Numba's own dispatch would look at each argument's type at each call.
    """
    from numba import types

    from kernels.backends import _loops

    def flat(dtype):
        return types.Array(dtype, 1, "C")

    kinds = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}
    kinds[torch.int8] = types.int8
    w, o, f, u, i = (flat(k) for k in (kinds[weights], kinds[output], types.float32, types.uint64, types.int64))
    n, matrix = flat(types.int32 if ids == torch.int32 else types.int64), types.Array(types.int64, 2, "C")
    literals = (types.literal(dim), types.literal(int(last)))
    if name == "pool":
        given = (w, f, u, u, u, u, n, i, f, o, types.int64, types.int64, matrix, types.boolean)
    elif name == "gather":
        given = (w, f, types.uint64, types.uint64, types.uint64, n, f, o, types.int64, types.int64)
    else:
        about = (matrix, types.Array(types.uint64, 2, "C"), i, u, u, types.int64, types.int64)
        given = (w, f, f, f, o, n, i, f, f, *about, types.Tuple((u, u, u, f)), f, i)
    entry = getattr(_loops, name).compile((*given, *literals))
    return lambda *args: entry(*args, dim, int(last))


def _array(tensor: Tensor):
    """A flat NumPy view, in the dtypes that kernels/backends/_vectors.py reads rows from."""
    flat = tensor.detach().view(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view("uint16")
    return flat.view(torch.int16).numpy() if flat.dtype == torch.float16 else flat.numpy()


def _by(parts: list, key) -> list[tuple[int, list]]:
    """Parts by the width of their table, ascending."""
    groups: dict[int, list] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    return sorted(groups.items())


def _converts_halves() -> bool:
    from llvmlite import binding

    return platform.machine() != "x86_64" or bool(binding.get_host_cpu_features().get("f16c"))
