"""The table-batched embedding bag: many tables looked up in one call, updated in the backward of that call.

    spec = Spec(tables=(Table(rows=100, dim=8), Table(rows=7, dim=4)), features=(0, 1, 0), optimizer=Optimizer(lr=0.1))
    bags = TableBatchedEmbeddingBag(spec)             # `auto` backend; bags.choice says which and why
    out_BX = bags(ids_N, offsets)                     # out_BX.backward(...) updates the tables

Ids come feature by feature, as in a KeyedJaggedTensor and in FBGEMM: bag b of feature f holds
`ids_N[offsets[f * B + b] : offsets[f * B + b + 1]]`.  Three features on two tables, two bags each:

    offsets = [0 2 2 | 3 4 | 5 6]     ids_N = [5 5 | 6 0 | 1 99]
    feature 0: bags [5 5] and []      feature 1: [6], [0]      feature 2 (table 0 again): [1], [99]

What one call computes, w the weights of ids (1 where none are given), L the length of a bag:

    sum        out_BX[b, columns of f] = sum over the bag of w_i * row_i
    mean       the same divided by L, also with weights; an empty bag gives zeros
    none       out_ND[i] = w_i * row_i     (unpooled; every table of one width)

and its backward, exactly: g, the gradient of a row, is summed over all occurrences in the batch, over all features of
the table, in the order in which they stand in ids_N; then each row in the batch gets one update.  docs/kernels.md has
the formulas of the optimizers, which are FBGEMM's.  The gradient of w_i is the dot product of the bag's gradient
(over L for mean) and row_i as it was before the update.

Letters in shapes: B bags of a feature, F features, T tables, E rows, D columns of a table, X columns of all features,
N ids of all features.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from kernels.errors import UserError
from kernels.hashing import mix64, mix64_of
from kernels.int8 import dequantise, quantise

POOLINGS = ("sum", "mean", "none")
# kind -> its states as FBGEMM names them; True: one float per row, False: one per element
STATES: dict[str, dict[str, bool]] = {
    "sgd": {},
    "adagrad": {"momentum1": False},
    "rowwise_adagrad": {"momentum1": True},
    "adam": {"momentum1": False, "momentum2": False},
    "rowwise_adam": {"momentum1": False, "momentum2": True},
}
DECAYS = ("none", "l2", "decoupled")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)
ALIGN = 32  # elements; a table starts on a cache line of 64 bytes, whatever its dtype
HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Table:
    rows: int
    dim: int
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What happens to the rows of a batch.

    kind: "sgd", "adagrad", "rowwise_adagrad", "adam" or "rowwise_adam" (FBGEMM's partial rowwise Adam).
    lr: the first learning rate; `State.lr` is the one in force.
    decay: "l2" adds weight_decay * w to g before anything else sees it; "decoupled" (rowwise_adagrad, adam and
    rowwise_adam) takes lr * weight_decay * w off the row beside the update.
    max_gradient: every element of the incoming gradient is clamped to [-max_gradient, max_gradient] before the sums.
    max_norm: a row whose 2-norm exceeds it after the update is scaled down to it.
    """

    kind: str = "rowwise_adagrad"
    lr: float = 0.01
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    decay: str = "none"
    max_gradient: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        _one_of("optimizer.kind", self.kind, STATES)
        _one_of("optimizer.decay", self.decay, DECAYS)
        if self.weight_decay and self.decay == "none":
            raise UserError(f'weight_decay = {self.weight_decay} with decay = "none": choose "l2" or "decoupled"')
        if self.decay == "decoupled" and self.kind in ("sgd", "adagrad"):
            raise UserError(f'decay = "decoupled" with {self.kind}: FBGEMM has none; "l2" is there')
        for name in ("max_gradient", "max_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"optimizer.{name} = {value}: give a positive number, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One table-batched embedding bag.

    features: the table of each feature, by its place in `tables`.
    weighted: whether every call brings a weight for each id.
    weights: dtype of the tables; output: dtype of the vectors and of their gradient.  Rows of int8 have a scale each
    (kernels/int8.py).
    stochastic: narrow tables are rounded up or down at random after an update, with odds that make the mean right.
    The random bits are a hash of (seed, step, table, row, column), so that a run repeats itself bit for bit.
    packed: tables follow each other without a gap, as TorchRec wants the column shards of one table; otherwise each
    starts on a cache line.
    """

    tables: tuple[Table, ...]
    features: tuple[int, ...] = ()  # default: one feature a table, in order
    pooling: str = "sum"
    weighted: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    weights: torch.dtype = torch.float32
    output: torch.dtype = torch.float32
    stochastic: bool = True
    seed: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        if not self.features:
            object.__setattr__(self, "features", tuple(range(len(self.tables))))
        if not self.tables:
            raise UserError("tables = (): give at least one table")
        for t, table in enumerate(self.tables):
            if table.rows < 1 or table.dim < 1:
                raise UserError(f"{self.title(t)}: {table.rows} rows x {table.dim} columns; both must be 1 or more")
        for f, t in enumerate(self.features):
            if not 0 <= t < len(self.tables):
                raise UserError(f"feature {f} names table {t}; there are {len(self.tables)} tables, from 0")
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("weights", self.weights, WEIGHT_DTYPES)
        _one_of("output", self.output, OUTPUT_DTYPES)
        if self.pooling == "none" and len({table.dim for table in self.tables}) > 1:
            widths = sorted({table.dim for table in self.tables})
            raise UserError(f'pooling = "none" needs tables of one width, there are {widths}; make one op per width')

    def title(self, t: int) -> str:
        return f"table {self.tables[t].name or t}"

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Where the columns of each feature start in out_BX; the last entry is X."""
        return tuple(accumulate((self.tables[t].dim for t in self.features), initial=0))

    @cached_property
    def features_of(self) -> tuple[tuple[int, ...], ...]:
        """The features of each table, ascending."""
        return tuple(tuple(f for f, of in enumerate(self.features) if of == t) for t in range(len(self.tables)))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each table starts in the flat weights, in elements; the last entry is their size."""
        return _aligned((table.rows * table.dim for table in self.tables), to=1 if self.packed else ALIGN)

    @cached_property
    def row_starts(self) -> tuple[int, ...]:
        """Where each table starts in a flat state of one float per row; the last entry is its size."""
        return _aligned((table.rows for table in self.tables), to=1 if self.packed else ALIGN)


class State:
    """The weights and the optimizer's state: flat buffers, and views per table on them.

    weights: flat, spec.weights; tables[t] is its (E, D) view.
    scales: flat float32, one per row of tables of int8; scale_views[t] is its (E,) view.  Empty for other dtypes.
    states["momentum1"]: flat float32; state_views("momentum1")[t] is (E,) where it is per row, else (E, D).
    step: updates done so far (Adam's bias correction and the stochastic rounding count by it).
    lr: the learning rate of the next update.
    Whoever loads a checkpoint copies into the views: `state.tables[t].copy_(...)`; `read` and `write` are for values,
    whatever the dtype.
    """

    def __init__(self, spec: Spec, *, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.weights = _zeros(spec.starts[-1], spec.weights, self.device)
        self.states = {
            name: _zeros(spec.row_starts[-1] if per_row else spec.starts[-1], torch.float32, self.device)
            for name, per_row in STATES[spec.optimizer.kind].items()
        }
        self.tables = [self._table(self.weights, t) for t in range(len(spec.tables))]
        of_rows = spec.row_starts[-1] if spec.weights == torch.int8 else 0
        self.scales = _zeros(of_rows, torch.float32, self.device)
        self.scale_views = self._by_row(self.scales) if of_rows else []
        self.step = 0
        self.lr = spec.optimizer.lr

    def state_views(self, name: str) -> list[Tensor]:
        flat = self.states[name]
        if not STATES[self.spec.optimizer.kind][name]:
            return [self._table(flat, t) for t in range(len(self.spec.tables))]
        return self._by_row(flat)

    def read(self, t: int, rows_U: Tensor | slice = slice(None)) -> Tensor:
        """(U, D) float32: a copy of some rows of a table, or of all."""
        if self.spec.weights == torch.int8:
            return dequantise(self.tables[t][rows_U], self.scale_views[t][rows_U])
        return self.tables[t][rows_U].to(torch.float32, copy=True)

    def write(self, t: int, w_UD: Tensor, rows_U: Tensor | slice = slice(None)) -> None:
        """Store float32 values, rounded to the nearest where the table is narrower."""
        if self.spec.weights == torch.int8:
            self.tables[t][rows_U], self.scale_views[t][rows_U] = quantise(w_UD)
        else:
            self.tables[t][rows_U] = w_UD.to(self.spec.weights)

    def bytes(self) -> int:
        flats = (self.weights, self.scales, *self.states.values())
        return sum(flat.numel() * flat.element_size() for flat in flats)

    def _by_row(self, flat: Tensor) -> list[Tensor]:
        starts = self.spec.row_starts
        return [flat[start : start + table.rows] for start, table in zip(starts, self.spec.tables, strict=False)]

    def _table(self, flat: Tensor, t: int) -> Tensor:
        table, start = self.spec.tables[t], self.spec.starts[t]
        return flat[start : start + table.rows * table.dim].view(table.rows, table.dim)


class TableBatchedEmbeddingBag(nn.Module):
    """The op as a module: `forward` looks up, the backward of its result updates the tables in place.

    backend: "auto", or a file name in kernels/backends/; `choice.name` and `choice.why` say what was taken.
    Its state is no parameter: an optimizer that walks over `parameters()` must not see it.
    Raises UserError when the backend that was asked for cannot serve the spec, with its reason.
    """

    def __init__(self, spec: Spec, *, backend: str = "auto", device: torch.device | str = "cpu") -> None:
        from kernels.choice import choose

        super().__init__()
        self.choice = choose(spec, torch.device(device), backend)
        self.spec = spec
        self.state = State(spec, device=device)
        self.kernel = self.choice.module.Kernel(spec, self.state)
        # Autograd calls the backward of a function only when one of its inputs wants a gradient.
        self._anchor = torch.zeros(0, device=device, requires_grad=True)

    def forward(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """(B, X) pooled or (N, D) unpooled, of dtype spec.output.

        ids_N: int32 or int64.  offsets: (F * B + 1,), int32 or int64.  weights_N: float32, gets a gradient if it wants
        one.  Raises UserError for an id outside its table, naming feature and table.
        """
        check(self.spec, ids_N, offsets, weights_N)
        return _Lookup.apply(self._anchor, self.kernel, ids_N, offsets, weights_N)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, kernel, ids_N, offsets, weights_N):
        ctx.kernel = kernel
        ctx.save_for_backward(ids_N, offsets, weights_N)
        return kernel.forward(ids_N, offsets, weights_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ids_N, offsets, weights_N = ctx.saved_tensors
        grad_N = ctx.kernel.backward_update(
            grad.contiguous(), ids_N, offsets, weights_N, weights_grad=ctx.needs_input_grad[4]
        )
        return None, None, None, None, grad_N


def check(spec: Spec, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> None:
    """Dtypes and shapes of one call; what costs nothing.  Ids are checked where they are read."""
    for name, tensor in (("ids", ids_N), ("offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1:
            raise UserError(f"{name} are {tensor.dtype} of shape {tuple(tensor.shape)}; give one row of int32 or int64")
    bags, rest = divmod(offsets.numel() - 1, len(spec.features))
    if rest or bags < 0:
        raise UserError(
            f"{offsets.numel()} offsets for {len(spec.features)} features: their number must be a multiple of the "
            "features, plus 1"
        )
    if spec.weighted != (weights_N is not None):
        raise UserError(f"weights of ids {'missing' if spec.weighted else 'given'} and weighted = {spec.weighted}")
    if weights_N is not None and (weights_N.dtype != torch.float32 or weights_N.shape != ids_N.shape):
        raise UserError(
            f"weights are {weights_N.dtype} of shape {tuple(weights_N.shape)}; give one float32 for each of the "
            f"{ids_N.numel()} ids"
        )


def check_ids(spec: Spec, ids_N: Tensor, offsets: Tensor) -> None:
    """Raise UserError for offsets that do not cut ids_N into bags, or for the first id that is outside its table."""
    steps = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids_N.numel() or bool((steps < 0).any()):
        raise UserError(
            f"offsets run from {int(offsets[0])} to {int(offsets[-1])}, their smallest step is "
            f"{int(steps.min()) if steps.numel() else 0}; they must run from 0 to {ids_N.numel()}, the number of ids, "
            "and never fall"
        )
    bags = (offsets.numel() - 1) // len(spec.features)
    for f, t in enumerate(spec.features):
        start, end = int(offsets[f * bags]), int(offsets[(f + 1) * bags])
        wrong = (ids_N[start:end] < 0) | (ids_N[start:end] >= spec.tables[t].rows)
        if bool(wrong.any()):
            at = start + int(wrong.nonzero()[0])
            raise UserError(
                f"id {int(ids_N[at])} (number {at} of the batch, feature {f}) is outside {spec.title(t)}, which has "
                f"{spec.tables[t].rows} rows: ids go from 0 to {spec.tables[t].rows - 1}"
            )


def random_bits(spec: Spec, *, step: int, table: int, rows_U: Tensor, dim: int) -> Tensor:
    """(U, dim) int64, 32 random bits each, for the stochastic rounding of rows: every backend makes these very bits.

    One 64-bit mix of (seed, step, table, row) gives a row's key; element d mixes the low half of key + d * 0x9E3779B9.
    """
    key = row_key(spec, step=step, table=table)
    key_U = mix64((key - (1 << 64) if key >> 63 else key) ^ rows_U.long())  # a tensor takes the number as a signed one
    x = ((key_U & 0xFFFFFFFF)[:, None] + torch.arange(dim, device=rows_U.device) * 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def row_key(spec: Spec, *, step: int, table: int) -> int:
    """The part of the random bits' key that a step's rows of one table share, as an unsigned 64-bit number."""
    return _chain(step_key(spec, step=step), table)


def step_key(spec: Spec, *, step: int) -> int:
    """The part of the key that all rows of a step share."""
    return _chain(_chain(0, spec.seed), step)


def _chain(key: int, part: int) -> int:
    return mix64_of(key + part * 0x9E3779B97F4A7C15)


def _aligned(sizes, *, to: int) -> tuple[int, ...]:
    return tuple(accumulate((-(-size // to) * to for size in sizes), initial=0))


def _one_of(name: str, value: object, known: Sequence) -> None:
    if value not in known:
        raise UserError(f"{name} = {value!r}: there are " + ", ".join(str(k) for k in known))


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; a large buffer on Linux's CPU takes memory as its pages are first written, and none for the others.

    Private memory: Python's default is a shared mapping, to which the kernel gives no huge pages.
    """
    used = size * dtype.itemsize
    if device.type == "cpu" and sys.platform == "linux" and used >= 2 * HUGE_PAGE:
        flat = torch.frombuffer(mmap.mmap(-1, used, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype)
        _advise_huge(flat)
        return flat
    return blank(size, dtype, device).zero_()


def blank(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer, not filled; on Linux's CPU, a large one asks for huge pages before it is touched.

    Rows are read at random: with pages of 4 KiB nearly every row costs a walk of the page table besides its own bytes.
    """
    flat = torch.empty(size, dtype=dtype, device=device)
    used = size * flat.element_size()
    if device.type == "cpu" and sys.platform == "linux" and used >= 2 * HUGE_PAGE:
        _advise_huge(flat)
    return flat


def _advise_huge(flat: Tensor) -> None:
    first = -(-flat.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    last = (flat.data_ptr() + flat.numel() * flat.element_size()) // HUGE_PAGE * HUGE_PAGE
    advice = 14  # MADV_HUGEPAGE; a kernel that has none refuses, and nothing is lost
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
