"""What is trained, as the planner sees it: tables and what a sample asks of them, dense work, samples of a step.

Numbers only: sharding/plan.py makes them of a model's tables (`work_of`), trainer/dense_work.py of its dense layers.
"""

from dataclasses import dataclass, field

from sharding.skew import Skew

ELEMENT = 4  # bytes of a gradient, a pooled value, a dense weight: float32; rows have their own (TableLoad.element)


@dataclass(frozen=True, kw_only=True)
class TableLoad:
    """One physical table and what a sample asks of it.

    dim: stored columns.  bags, ids: per sample, over all features of the table.
    state_per_row, state_per_column: bytes of optimizer state of a row: state_per_row + columns * state_per_column,
        counted anew for each part by columns.
    map_per_row: bytes of the id map and its counting filter, where rows are given to ids (sharding/by_id.py).
    """

    name: str
    rows: int
    dim: int
    bags: int = 1
    ids: float = 1.0
    state_per_row: float = 4.0
    state_per_column: float = 0.0
    map_per_row: float = 0.0
    skew: Skew | None = field(default=None, compare=False)
    element: int = ELEMENT  # bytes of a weight as it is stored
    scale: int = 0  # bytes of a row beside its weights, in each part by columns: the scale of a row of int8

    @property
    def bytes(self) -> int:
        return self.rows * (self.element * self.dim + self.scale)


@dataclass(frozen=True, kw_only=True)
class DenseWork:
    """Everything outside the tables, forward and backward.  trainer/dense_work.py counts it.

    flops_per_row: of matrix products.  bytes_per_row, bytes_fixed: read and written by the other operations, per sample
    and whatever the batch.  ops: how many operations.  parameters: number.  state_per_parameter: bytes of optimizer
    state.  activation_bytes_per_row: kept for the backward.  batch_bytes_per_row: of dense columns, labels, weights.
    """

    flops_per_row: float = 0.0
    bytes_per_row: float = 0.0
    bytes_fixed: float = 0.0
    ops: float = 0.0
    parameters: float = 0.0
    state_per_parameter: float = 8.0
    activation_bytes_per_row: float = 0.0
    batch_bytes_per_row: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The data's readers, in host memory (trainer/data/footprint.py).

    streams: over all ranks.  stream_bytes: for each of a rank's.  fixed_bytes: of a rank, whatever its streams.
    decoded_bytes: of row groups, for each stream; most_decoded_bytes: for all streams of a rank together, since those
        that read one row group at a time have it from one decoding.
    """

    streams: int = 0
    stream_bytes: float = 0.0
    fixed_bytes: float = 0.0
    decoded_bytes: float = 0.0
    most_decoded_bytes: float = 0.0

    def of_rank(self, world_size: int) -> float:
        streams = -(-self.streams // world_size)
        decoded = min(streams * self.decoded_bytes, self.most_decoded_bytes)
        return streams * self.stream_bytes + decoded + self.fixed_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained: tables, dense work, samples per global step.

    vector_element: bytes of a pooled value on its way between ranks; 2 where the kernels give bfloat16.
    """

    tables: tuple[TableLoad, ...]
    batch_size: int
    dense: DenseWork = DenseWork()
    overlapped: bool = True
    bf16: bool = False
    vector_element: int = ELEMENT
    readers: Readers = Readers()

    @property
    def features(self) -> int:
        return sum(t.bags for t in self.tables)
