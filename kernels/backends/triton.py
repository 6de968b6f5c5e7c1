"""The op in Triton: for NVIDIA GPUs, and for tests in Triton's interpreter on CPU tensors.

This file prepares and launches; kernels/backends/_triton_forward.py and _triton_update.py compute.  Tables are taken
width by width: each width is a compilation and a launch.

    forward   look_up, a tile of bags of one feature a program
    backward  make_keys, a stable radix sort (torch.sort), find_runs; then for each width fold, fold_pieces, update

The host never waits for what it has just launched.  So an id outside its table, which no kernel reads or updates, is
reported one call late on a GPU: by the next forward, which waits for the forward before it; the interpreter reports it
at once.

Nothing of the size of a table is allocated: a step takes about 50 bytes an id for the sort and the runs, and 1 / PIECE
(_triton_update.PIECE ids) of a row of float32 an id for the sums of pieces.

Only `look_up` is autotuned, since its results do not depend on its tile.  The update's do, in the last bit (sums over
the columns), and trying its tiles out would need copies of the tables: its tiles are a rule of the width.
"""

import importlib.util
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.ops import STATES, Spec, State, check_ids, step_key

SPEED = {"cuda": 2}  # "cpu" only in the interpreter, and when asked for
WIDEST = 4096  # columns; a tile of the update holds a row, its gradient and its states in registers
OLDEST = (8, 0)  # compute capability: bfloat16
LONGEST = 2**31 - 1  # ids of a batch; their places in it are int32
WARPS = 48  # a multiprocessor is given this many at a time to update rows with


def available() -> bool:
    return importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or _interpreting())


def on(device: torch.device) -> Any:
    """Context in which launches go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run there, whatever they compute."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if device.type == "cpu" and not _interpreting():
        return "runs on a GPU; on CPU tensors only in Triton's interpreter, with TRITON_INTERPRET=1 from the start"
    if device.type not in ("cpu", "cuda"):
        return f"runs on CUDA devices, not on {device.type}"
    if device.type == "cuda" and torch.version.hip:
        return "its kernels have been compiled for NVIDIA GPUs alone"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"needs a GPU of compute capability 8.0 or newer, this one has {found}"
    return None


def supports(spec: Spec, device: torch.device) -> str | None:
    reason = refusal(device)
    if reason is not None:
        return reason
    wide = [t for t, table in enumerate(spec.tables) if table.dim > WIDEST]
    if wide:
        return f"{spec.title(wide[0])} has {spec.tables[wide[0]].dim} columns, more than {WIDEST}"
    if spec.weights == torch.int8:
        return "has no rows of int8"
    return None


def _interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton decides it when it is imported."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET") == "1"
    import triton

    return os.environ.get("TRITON_INTERPRET") == "1" and not isinstance(triton.language.sum, triton.JITFunction)


@dataclass(frozen=True, kw_only=True)
class Width:
    """The tables of one width, and what a compilation for them is given.

    tables, features: their numbers in the spec.  low, high: their rows' keys, low <= key < high.
    align: powers of two that divide the places of rows, in elements.
    """

    dim: int
    tables: tuple[int, ...]
    features: tuple[int, ...]
    low: int
    high: int
    align: dict[str, int]

    @property
    def block(self) -> int:
        return 1 << (self.dim - 1).bit_length()


class Kernel:
    def __init__(self, spec: Spec, state: State) -> None:
        self.spec, self.state, self.device = spec, state, state.device
        self.interpreted = self.device.type == "cpu"
        self.widths = widths_of(spec)
        order = [t for width in self.widths for t in width.tables]
        bases = dict(zip(order, accumulate((spec.tables[t].rows for t in order), initial=0), strict=False))
        self.keys = sum(table.rows for table in spec.tables)
        self.starts_F = self._numbers(spec.starts[t] for t in spec.features)
        self.rows_F = self._numbers(spec.tables[t].rows for t in spec.features)
        self.columns_F = self._numbers(spec.columns[:-1])
        self.bases_F = self._numbers(bases[t] for t in spec.features)
        self.bases_W = self._numbers([*(width.low for width in self.widths), self.keys])
        self.features_of = [self._numbers(width.features, torch.int32) for width in self.widths]
        self.tables_of = [
            {
                "bases_T": self._numbers(bases[t] for t in width.tables),
                "starts_T": self._numbers(spec.starts[t] for t in width.tables),
                "row_starts_T": self._numbers(spec.row_starts[t] for t in width.tables),
                "numbers_T": self._numbers(width.tables),
            }
            for width in self.widths
        ]
        self.weighted = {"WEIGHTED": spec.weighted, "MEAN": spec.pooling == "mean", "POOLED": spec.pooling != "none"}
        self.bad = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.pending: tuple[Tensor, Tensor] | None = None  # ids and offsets that the GPU may not have read yet
        self.programs = 3  # in the interpreter: so that programs take several tiles, and the last ones none
        if self.device.type == "cuda":
            self.programs = torch.cuda.get_device_properties(self.device).multi_processor_count * WARPS
            self.bad_here = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self.read = torch.cuda.Event()

    def forward(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Tensor:
        spec = self.spec
        ids_N, offsets, scales_N = _flat(ids_N, offsets, weights_N)
        bags = self._bags(ids_N, offsets)
        self._report()
        rows = (ids_N.numel(), spec.tables[0].dim) if spec.pooling == "none" else (bags, spec.columns[-1])
        out = torch.empty(rows, dtype=spec.output, device=self.device)
        if bags == 0:
            return out
        length = _length(ids_N.numel(), len(spec.features) * bags)
        with on(self.device):
            for width, features_G in zip(self.widths, self.features_of, strict=True):
                if not width.features:
                    continue

                def grid(meta: dict, count: int = len(width.features)) -> tuple[int, int]:
                    return (-(-bags // meta["BAGS"]), count)

                _look_up(width.block, 1 if length == 1 else 4, self.interpreted)[grid](
                    *(self.state.weights, self.starts_F, self.rows_F, self.columns_F, features_G),
                    *(ids_N, offsets, scales_N, out, self.bad),
                    *(bags, len(spec.features), ids_N.numel(), spec.columns[-1], length),
                    **self.weighted,
                    D=width.dim,
                    BLOCK_D=width.block,
                    ALIGN=width.align["weights"],
                    ALIGN_OUT=width.align["grad"],
                )
            self._ask(ids_N, offsets)
        return out

    def backward_update(
        self, grad: Tensor, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None, *, weights_grad: bool
    ) -> Tensor | None:
        ids_N, offsets, scales_N = _flat(ids_N, offsets, weights_N)
        bags = self._bags(ids_N, offsets)
        self.state.step += 1
        grad_N = torch.zeros(ids_N.numel(), device=self.device) if weights_grad else None
        if ids_N.numel() == 0:
            return grad_N
        with on(self.device):
            if grad_N is not None:
                self._weight_gradients(grad, ids_N, offsets, grad_N, bags)
            self._update(grad, self._runs(grad, ids_N, offsets, scales_N, bags))
        return grad_N

    def _weight_gradients(self, grad: Tensor, ids_N: Tensor, offsets: Tensor, out_N: Tensor, bags: int) -> None:
        from kernels.backends import _triton_forward

        for width, features_G in zip(self.widths, self.features_of, strict=True):
            if not width.features:
                continue
            rows, warps = _tile(width.block, interpreted=self.interpreted)
            _triton_forward.weight_gradients[(-(-bags // rows), len(width.features))](
                *(self.state.weights, self.starts_F, self.rows_F, self.columns_F, features_G),
                *(ids_N, offsets, grad, out_N, bags, ids_N.numel(), self.spec.columns[-1]),
                MEAN=self.weighted["MEAN"],
                POOLED=self.weighted["POOLED"],
                D=width.dim,
                BLOCK_D=width.block,
                ALIGN=width.align["weights"],
                ALIGN_OUT=width.align["grad"],
                BAGS=rows,
                num_warps=warps,
            )

    def _runs(self, grad: Tensor, ids_N: Tensor, offsets: Tensor, scales_N: Tensor, bags: int) -> dict[str, Tensor]:
        """The occurrences of each row, sorted: the arguments of `update` that say what it is to add up."""
        from kernels.backends import _triton_update

        count, device, features = ids_N.numel(), self.device, len(self.spec.features)
        scaled = self.weighted["WEIGHTED"] or self.weighted["MEAN"]
        keys_N = torch.full((count,), self.keys, dtype=_int(self.keys), device=device)
        places_N = torch.empty(count, dtype=_int(grad.numel()), device=device)
        factors_N = torch.empty(count if scaled else 0, device=device)
        lanes = min(32, 1 << (_length(count, features * bags) - 1).bit_length())
        block = 1024 if self.interpreted else 256
        _triton_update.make_keys[(-(-bags // (block // lanes)), features)](
            *(ids_N, offsets, scales_N, self.bases_F, self.rows_F, self.columns_F, keys_N, places_N, factors_N),
            *(bags, count, self.spec.columns[-1], self.widths[0].dim),
            **self.weighted,
            BAGS=block // lanes,
            LANES=lanes,
            num_warps=4,
        )
        keys_N, order_N = torch.sort(keys_N, stable=True)
        begins_N = torch.empty(count, dtype=torch.int32, device=device)
        begins_N[:1] = 1
        torch.ne(keys_N[1:], keys_N[:-1], out=begins_N[1:])
        found = {
            "keys_N": keys_N,
            "places_N": torch.empty_like(places_N),
            "factors_N": torch.empty_like(factors_N),
            "firsts_N": torch.empty(count + 1, dtype=torch.int32, device=device),
            "bounds_W": torch.empty(len(self.widths) + 1, dtype=torch.int32, device=device),
        }
        _triton_update.find_runs[(-(-(count + 1) // block),)](
            *(keys_N, order_N, begins_N.cumsum(0, dtype=torch.int32), places_N, factors_N, self.bases_W),
            *(found["firsts_N"], found["bounds_W"], found["places_N"], found["factors_N"], count, len(self.widths)),
            SCALED=scaled,
            BLOCK=block,
            num_warps=4,
        )
        return found

    def _update(self, grad: Tensor, runs: dict[str, Tensor]) -> None:
        from kernels.backends import _triton_update
        from kernels.backends._triton_update import PIECE, PIECES

        spec, opt, state = self.spec, self.spec.optimizer, self.state
        states = [state.states[name] for name in STATES[opt.kind]] + [state.weights] * 2
        count = runs["keys_N"].numel()
        key = step_key(spec, step=state.step)
        numbers = {
            "step_key": key - (1 << 64) if key >> 63 else key,
            "lr": float(state.lr),
            "eps": float(opt.eps),
            "beta1": float(opt.beta1),
            "beta2": float(opt.beta2),
            "rest1": 1.0 - opt.beta1,
            "rest2": 1.0 - opt.beta2,
            "correction1": 1.0 - opt.beta1**state.step,
            "correction2": 1.0 - opt.beta2**state.step,
            "weight_decay": float(opt.weight_decay),
            "keep": 1.0 - state.lr * opt.weight_decay if opt.decay == "decoupled" else 1.0,
            "max_gradient": float(opt.max_gradient or 0.0),
            "max_norm": float(opt.max_norm or 0.0),
        }
        for w, width in enumerate(self.widths):
            if not width.features:
                continue
            rows, warps = _tile(width.block, interpreted=self.interpreted)
            about = {"D": width.dim, "BLOCK_D": width.block, "PIECE": PIECE, "num_warps": warps}
            about["ALIGN_SUMS"] = _power_of_two(width.dim)
            read = {"CLAMP": opt.max_gradient is not None, "SCALED": runs["factors_N"].numel() > 0}
            between = {"ids": count, "low": width.low, "high": width.high}
            sums, more = (
                torch.empty(size, width.dim, device=self.device) for size in (count // PIECE, count // (PIECE * PIECES))
            )
            if count >= PIECE:
                _triton_update.fold[(-(-len(sums) // rows),)](
                    *(runs["keys_N"], runs["places_N"], runs["factors_N"], grad, sums),
                    **between,
                    **about,
                    **read,
                    max_gradient=numbers["max_gradient"],
                    ALIGN=width.align["grad"],
                    ROWS=rows,
                )
            if len(more):
                _triton_update.fold_pieces[(-(-len(more) // rows),)](
                    *(runs["keys_N"], sums, more), **between, **about, PIECES=PIECES, ROWS=rows
                )
            most = -(-min(count, width.high - width.low) // rows)
            _triton_update.update[(min(most, max(1, self.programs // warps)),)](
                state.weights,
                states[0],
                states[1],
                **runs,
                **self.tables_of[w],
                **numbers,
                **about,
                **read,
                grad=grad,
                sums=sums,
                more=more,
                width=w,
                tables=len(width.tables),
                KIND=opt.kind,
                L2=opt.decay == "l2",
                NORM=opt.max_norm is not None,
                STOCHASTIC=spec.stochastic and spec.weights != torch.float32,
                FOLDED=count >= PIECE,
                ALIGN=width.align["weights"],
                ALIGN_STATE=width.align["weights"],
                ALIGN_GRAD=width.align["grad"],
                PIECES=PIECES,
                ROWS=rows,
            )

    def _bags(self, ids_N: Tensor, offsets: Tensor) -> int:
        """Bags of a feature."""
        bags = (offsets.numel() - 1) // len(self.spec.features)
        assert ids_N.numel() <= LONGEST and len(self.spec.features) * bags <= LONGEST, "a batch of 2**31 ids"
        if bags == 0 and ids_N.numel():
            check_ids(self.spec, ids_N, offsets)
        return bags

    def _ask(self, ids_N: Tensor, offsets: Tensor) -> None:
        """Have `bad` fetched; in the interpreter it is there."""
        self.pending = (ids_N, offsets)
        if self.device.type == "cpu":
            self._report()
        else:
            self.bad_here.copy_(self.bad, non_blocking=True)
            self.read.record()

    def _report(self) -> None:
        """Raise UserError if the last forward met ids or offsets that are wrong."""
        if self.pending is None:
            return
        (ids_N, offsets), self.pending = self.pending, None
        if self.device.type == "cuda":
            self.read.synchronize()
        if int(self.bad if self.device.type == "cpu" else self.bad_here):
            self.bad.zero_()
            check_ids(self.spec, ids_N, offsets)
            raise AssertionError("a kernel refused ids that are right")

    def _numbers(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)


def _tile(block: int, *, interpreted: bool) -> tuple[int, int]:
    """Rows of a tile, and warps: 8 elements of it to a thread, and at most 64 rows, which wait for each other."""
    if interpreted:
        return max(16, min(256, 4096 // block)), 4  # the interpreter's time goes by the number of tiles
    rows = max(1, min(64, 1024 // block))
    return rows, max(1, min(8, rows * block // 256))


def widths_of(spec: Spec) -> list[Width]:
    """The widths, ascending, with keys counted on from one to the next."""
    found, low = [], 0
    for dim in sorted({table.dim for table in spec.tables}):
        tables = tuple(t for t, table in enumerate(spec.tables) if table.dim == dim)
        features = tuple(f for f, t in enumerate(spec.features) if t in tables)
        places = [dim] if spec.pooling == "none" else [spec.columns[-1], *(spec.columns[f] for f in features)]
        align = {
            "weights": _power_of_two(dim, *(spec.starts[t] for t in tables)),
            "grad": _power_of_two(*places),
        }
        high = low + sum(spec.tables[t].rows for t in tables)
        found.append(Width(dim=dim, tables=tables, features=features, low=low, high=high, align=align))
        low = high
    return found


def _power_of_two(*places: int) -> int:
    """The largest power of two up to 16 that divides them all: 16 bytes of any dtype, and more, begin there."""
    return math.gcd(16, *places)


def _flat(ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    ids_N = ids_N.contiguous()
    return ids_N, offsets.contiguous(), ids_N if weights_N is None else weights_N.detach().contiguous()


def _int(largest: int) -> torch.dtype:
    """Half the bytes to sort and to read where the numbers allow it."""
    return torch.int32 if largest < 2**31 else torch.int64


def _length(ids: int, bags: int) -> int:
    """About how many ids a bag has: 1, 4, 16 or 64, so that batches of one kind get one tuning."""
    mean = -(-ids // max(bags, 1))
    return next((length for length in (1, 4, 16) if mean <= length), 64)


@cache
def _look_up(block: int, unroll: int, interpreted: bool) -> Any:
    """`look_up` with the tiles to try for a width: 4 to 16 elements to a thread."""
    import triton

    from kernels.backends._triton_forward import look_up

    def config(elements: int, warps: int) -> Any:
        bags = max(1, min(128, elements * 32 * warps // block))
        return triton.Config({"BAGS": bags, "UNROLL": unroll}, num_warps=warps)

    if interpreted:
        only = triton.Config({"BAGS": max(16, min(256, 4096 // block)), "UNROLL": unroll})
        return triton.autotune(configs=[only], key=[])(look_up)
    tiles = ((4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (16, 4))
    return triton.autotune(configs=[config(*tile) for tile in tiles], key=["length", "D"])(look_up)
