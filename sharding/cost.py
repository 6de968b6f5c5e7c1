"""What a plan costs: bytes and seconds of every part of every table under every sharding type and memory tier.

    prices = price(work, topology)       all options of all tables, and what every plan costs alike
    prices.options(table)                what one table may become
    load(prices, choices) -> Load        a whole plan: seconds and bytes of every rank

Pure arithmetic on numpy arrays; neither torch nor a process group.  docs/planner.md derives each formula.

A rank's step is a sum of PARTS.  Where the device works on while ids travel (`topology.overlap` and an overlapped
pipeline), the ids of the next batch are hidden behind the rest, so the step is the larger of the two; elsewhere it is
their sum.  The step of a plan is that of its slowest rank: every collective waits for it.

    input       ids and lengths to the ranks that own their rows, two all-to-alls; dividing them for row-wise tables
    lookup      reading the rows, writing the pooled vectors
    output      pooled vectors to the ranks whose samples they are: all-to-all, or reduce-scatter for parts by rows
    gradients   the way back
    update      sorting the ids, adding up the gradients of a row, changing row and optimizer state; for data_parallel
                tables the all-reduce and the dense update

Shapes: T tables, P positions (parts of an option that differ from each other; 1 where all are alike), W ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sharding.skew import Skew
from sharding.topology import Topology
from sharding.work import ELEMENT, TableLoad, Work

PARTS = ("input", "lookup", "output", "gradients", "update")
BYTES = ("weights", "state", "gradient", "buffers", "ids", "cache")
VOLUMES = ("ids", "vectors", "averages")  # bytes: to the owners of rows, back from them (gradients as many), summed
TIERS = ("device", "cache", "host")
CACHE_SHARES = (0.02, 0.1, 0.3)  # of a table's rows that a device cache holds, with tier "cache"
ID = 8  # bytes of an id
LENGTH = 8  # bytes of a bag's length
BATCHES_IN_FLIGHT = 3  # in the overlapped pipeline: one computes, one's ids travel, one is copied (trainer/pipeline.py)
# A data_parallel table's update (trainer/optim/base.py, RowOptimizer), in bytes read and written for each byte of
AVERAGED = 2.0  # the dense gradient, when its sum over the ranks is divided
SEARCHED = 1.5  # the dense gradient, when the rows that are not all zeros are looked for: it, and a mask twice
PASSES = 8  # a touched row with its state: taken out, squared, averaged, scaled, subtracted, put back
SORT_BYTES = 16  # an id in the update: key and position, before and after sorting (kernels/backends/cpu.py)
CACHE_ROW_BYTES = 16  # slot, tag and age of a cached row (FBGEMM's lxu_cache_state and lru_state)
# CUDA context and NCCL's buffers on a device (estimate); Python with torch, TorchRec, Numba, pyarrow and the code of a
# look-up and its update on a CPU (605 MiB measured, docs/LOG.md, 2026-11-28).
RUNTIME_BYTES = {"cuda": 1.5 * 2**30, "cpu": 605 * 2**20}
FIXED = {"runtime": "libraries", "dense": "dense layers", "readers": "the data's readers"}  # fixed_bytes in words


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to hold a table.

    column_parts: parts by columns.  row_parts: parts by rows of each of them.  cache_share: of the rows, with tier
    "cache".
    """

    sharding: str
    tier: str = "device"
    column_parts: int = 1
    row_parts: int = 1
    cache_share: float = 0.0

    @property
    def place(self) -> str:
        """Where its parts may stand: "all" ranks in order, "one" rank, "distinct" ranks, one "host" in order,
        "distinct_on_host", distinct "hosts" with a column part on each."""
        return {
            "data_parallel": "all",
            "table_wise": "one",
            "row_wise": "all",
            "column_wise": "distinct",
            "table_row_wise": "host",
            "table_column_wise": "distinct_on_host",
            "grid_shard": "hosts",
        }[self.sharding]

    @property
    def label(self) -> str:
        parts = f" in {self.column_parts}" if self.column_parts > 1 else ""
        tier = {"device": "", "host": ", host memory", "cache": f", host memory, {self.cache_share:.0%} cached"}
        return self.sharding + parts + tier[self.tier]


@dataclass(frozen=True, eq=False)
class KindPrices:
    """All tables under one kind.

    valid (T,): whether the kind fits the table.  seconds (5, T, P) by PARTS, device (6, T, P) and host (6, T, P) bytes
    by BYTES, of one part each; P is row_parts where those differ, else 1.  volume (3, T, P) by VOLUMES: bytes of a step
    that go between a part's rank and others.
    """

    kind: Kind
    valid: np.ndarray
    seconds: np.ndarray
    device: np.ndarray
    host: np.ndarray
    volume: np.ndarray

    def copies(self, world_size: int) -> np.ndarray:
        """(P,): how many parts stand at each position, over all ranks."""
        alike = world_size if self.kind.sharding == "data_parallel" else self.kind.column_parts
        return np.full(self.seconds.shape[2], alike)


@dataclass(frozen=True, eq=False)
class Prices:
    """kinds: in a fixed order.  fixed: seconds of a step that no plan changes, by name; fixed_bytes: of each rank.

    group: kind of sharding -> (seconds on the main path, seconds of the input) for having any table of it.
    hidden: whether the input runs beside the rest.
    """

    work: Work
    topology: Topology
    kinds: tuple[KindPrices, ...]
    fixed: Mapping[str, float]
    fixed_bytes: Mapping[str, float]
    group: Mapping[str, tuple[float, float]]
    hidden: bool

    @property
    def tables(self) -> tuple[TableLoad, ...]:
        return self.work.tables

    def main_seconds(self, kind: int) -> np.ndarray:
        """(T, P): what a part adds to its rank's main path."""
        seconds = self.kinds[kind].seconds
        return seconds[1:].sum(0) if self.hidden else seconds.sum(0)

    def input_seconds(self, kind: int) -> np.ndarray:
        """(T, P): what a part adds to its rank's hidden path; zero where nothing is hidden."""
        seconds = self.kinds[kind].seconds[0]
        return seconds if self.hidden else np.zeros_like(seconds)

    @cached_property
    def base_seconds(self) -> float:
        return sum(self.fixed.values())

    @cached_property
    def base_bytes(self) -> float:
        return sum(self.fixed_bytes.values())

    def options(self, table: int) -> list[int]:
        """The kinds, by number, that table may have."""
        return [k for k, kind in enumerate(self.kinds) if kind.valid[table]]


@dataclass(frozen=True)
class Choice:
    """What became of one table: the number of its kind, and the rank of each part, column parts first:
    parts (column 0, row 0), (column 0, row 1), ..., (column 1, row 0), ..."""

    kind: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Load:
    """A whole plan, priced.

    seconds (5, W) by PARTS, device and host (6, W) bytes by BYTES, volume (3, W) by VOLUMES: of the tables, by rank.
    shardings: the types in use.
    """

    prices: Prices
    seconds: np.ndarray
    device: np.ndarray
    host: np.ndarray
    volume: np.ndarray
    shardings: tuple[str, ...]

    @cached_property
    def main(self) -> np.ndarray:
        """(W,) seconds of each rank's main path."""
        p = self.prices
        tables = self.seconds[1:].sum(0) if p.hidden else self.seconds.sum(0)
        return p.base_seconds + sum(p.group[s][0] for s in self.shardings) + tables

    @cached_property
    def hidden(self) -> np.ndarray:
        """(W,) seconds that run beside it."""
        p = self.prices
        groups = sum(p.group[s][1] for s in self.shardings)
        return groups + self.seconds[0] if p.hidden else np.zeros(self.seconds.shape[1])

    @cached_property
    def rank_seconds(self) -> np.ndarray:
        return np.maximum(self.main, self.hidden)

    @property
    def step_seconds(self) -> float:
        return float(self.rank_seconds.max())

    @cached_property
    def rank_bytes(self) -> np.ndarray:
        """(W,) device bytes of each rank, with what every plan needs."""
        return self.prices.base_bytes + self.device.sum(0)

    @cached_property
    def host_rank_bytes(self) -> np.ndarray:
        """(W,) bytes in host memory, of tables that stand there for a device."""
        return self.host.sum(0)


def load(prices: Prices, choices: Sequence[Choice]) -> Load:
    """The seconds and bytes of every rank under these choices, one per table."""
    world = prices.topology.world_size
    seconds = np.zeros((len(PARTS), world))
    device, host = np.zeros((len(BYTES), world)), np.zeros((len(BYTES), world))
    volume = np.zeros((len(VOLUMES), world))
    for t, choice in enumerate(choices):
        kind = prices.kinds[choice.kind]
        positions = kind.seconds.shape[2]
        ranks = np.asarray(choice.ranks)
        at = np.arange(len(ranks)) % positions
        pairs = ((seconds, kind.seconds), (device, kind.device), (host, kind.host), (volume, kind.volume))
        for total, part in pairs:
            np.add.at(total, (slice(None), ranks), part[:, t, at])
    used = tuple(dict.fromkeys(prices.kinds[c.kind].kind.sharding for c in choices))
    return Load(prices, seconds, device, host, volume, used)


def load_alone(work: Work, topology: Topology, kinds: Sequence[Kind], ranks: Sequence[tuple[int, ...]]) -> Load:
    """A plan of which the kind of each table and the ranks of its parts are known, whoever made it."""
    prices = price(work, topology, extra=kinds, usual=False)
    number = {priced.kind: k for k, priced in enumerate(prices.kinds)}
    return load(prices, [Choice(number[kind], where) for kind, where in zip(kinds, ranks, strict=True)])


def price(work: Work, topology: Topology, *, extra: Sequence[Kind] = (), usual: bool = True) -> Prices:
    """Prices of all tables under all kinds that differ on this cluster, unless not `usual`, and the `extra` ones."""
    pricer = _Pricer(work, topology)
    kinds = [pricer.kind(k) for k in dict.fromkeys([*(usual_kinds(work, topology) if usual else ()), *extra])]
    hidden = topology.overlap and work.overlapped
    collective = pricer.latency
    group = {
        sharding: (
            topology.group_seconds + (1 if sharding == "data_parallel" else 2) * collective,
            0.0 if sharding == "data_parallel" else 2 * collective,
        )
        for sharding in dict.fromkeys(k.kind.sharding for k in kinds)
    }
    if not hidden:
        group = {sharding: (main + ids, 0.0) for sharding, (main, ids) in group.items()}
    return Prices(
        work=work,
        topology=topology,
        kinds=tuple(kinds),
        fixed=_fixed_seconds(work, topology, pricer.latency),
        fixed_bytes=_fixed_bytes(work, topology),
        group=group,
        hidden=hidden,
    )


def usual_kinds(work: Work, topology: Topology) -> list[Kind]:
    """Every kind that some table could have on this cluster; of two that come to the same, such as table_row_wise on
    one host and row_wise, one."""
    tiers = TIERS if topology.device == "cuda" else ("device",)
    world, local, hosts = topology.world_size, topology.ranks_per_host, topology.hosts
    widest = max((t.dim for t in work.tables), default=0)
    by_columns = [k for k in range(2, min(world, widest // 4) + 1) if any(_divides(t.dim, k) for t in work.tables)]
    found = [Kind(sharding="data_parallel")]
    spilled = [(tier, share) for tier in tiers for share in (CACHE_SHARES if tier == "cache" else (0.0,))]
    for tier, share in spilled:
        found.append(Kind(sharding="table_wise", tier=tier, cache_share=share))
        if world > 1:
            found.append(Kind(sharding="row_wise", tier=tier, cache_share=share, row_parts=world))
        found += [Kind(sharding="column_wise", tier=tier, cache_share=share, column_parts=k) for k in by_columns]
    if local > 1 and hosts > 1:
        found.append(Kind(sharding="table_row_wise", row_parts=local))
        found += [Kind(sharding="table_column_wise", column_parts=k) for k in by_columns if k <= local]
        found += [Kind(sharding="grid_shard", column_parts=k, row_parts=local) for k in by_columns if k <= hosts]
    return found


def _divides(dim: int, parts: int) -> bool:
    """Whether `dim` columns are `parts` equal parts of a multiple of 4."""
    return dim % (4 * parts) == 0


class _Pricer:
    """The formulas of docs/planner.md, for all tables at once."""

    def __init__(self, work: Work, topology: Topology) -> None:
        self.work, self.topology = work, topology
        self.world = topology.world_size
        tables = work.tables
        self.rows = np.array([t.rows for t in tables], float)
        self.dim = np.array([t.dim for t in tables], float)
        self.element = np.array([t.element for t in tables], float)
        self.scale = np.array([t.scale for t in tables], float)
        self.bags = np.array([t.bags for t in tables], float) * work.batch_size
        self.ids = np.array([t.ids for t in tables], float) * work.batch_size
        self.state_row = np.array([t.state_per_row for t in tables], float)
        self.state_column = np.array([t.state_per_column for t in tables], float)
        self.map_row = np.array([t.map_per_row for t in tables], float)
        self.skews = [t.skew or Skew.of(rows=t.rows) for t in tables]
        self.distinct = np.array([s.distinct(n) for s, n in zip(self.skews, self.ids, strict=True)])
        self.local_distinct = np.array([s.distinct(n / self.world) for s, n in zip(self.skews, self.ids, strict=True)])
        self.hits = self._hits()
        intra, inter = (
            topology.intra_bandwidth * topology.link_efficiency,
            topology.inter_bandwidth * topology.link_efficiency,
        )
        local = topology.ranks_per_host
        # Seconds a byte of an all-to-all over all ranks; both kinds of link work at once.
        self.byte = max((local - 1) / self.world / intra, (self.world - local) / self.world / inter)
        self.intra, self.inter = intra, inter
        self.latency = collective_latency(topology)
        self._by_rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _hits(self) -> np.ndarray:
        """(T,) share of look-ups that the device's cache serves, which the tables share by the bytes they look up."""
        row = self.element * self.dim + self.scale
        traffic = self.ids * row
        slice_of = self.topology.cache * np.minimum(1.0, self.world * traffic / max(traffic.sum(), 1.0))
        return np.array([float(s.covered(b / r)) for s, b, r in zip(self.skews, slice_of, row, strict=True)])

    def kind(self, kind: Kind) -> KindPrices:
        topology = self.topology
        columns = self.dim / kind.column_parts
        valid = np.array([_divides(t.dim, kind.column_parts) or kind.column_parts == 1 for t in self.work.tables])
        if kind.row_parts > 1:
            shares, distinct = self._shares(kind.row_parts)
            block = np.ceil(self.rows / kind.row_parts)
            starts = np.minimum(np.arange(kind.row_parts) * block[:, None], self.rows[:, None])
            rows = np.minimum(block[:, None], self.rows[:, None] - starts)
            valid &= (rows > 0).all(1)
            if alike := not any(s.ordered for s in self.skews) and kind.row_parts > 2:  # all parts but the last
                shares, distinct, rows = (array[:, [0, -1]] for array in (shares, distinct, rows))
        else:
            alike = False
            shares, distinct, rows = (np.ones((len(self.rows), 1)), self.distinct[:, None], self.rows[:, None])
        c, row = columns[:, None], (self.element * columns + self.scale)[:, None]  # columns and bytes of a part's row
        state = self.state_row[:, None] + c * self.state_column[:, None]
        if kind.sharding == "data_parallel":
            return self._data_parallel(kind, valid, row, state)
        ids, bags = self.ids[:, None] * shares, np.broadcast_to(self.bags[:, None], shares.shape)
        vectors = bags * c * self.work.vector_element
        seconds = np.zeros((len(PARTS), *shares.shape))
        seconds[0] = (ID * ids + LENGTH * bags) * self.byte
        features = (self.bags / self.work.batch_size)[:, None]
        if kind.row_parts > 1:  # every rank divides its own ids of the table, for each of the parts
            own = self.ids[:, None] / self.world
            ranks = kind.column_parts * kind.row_parts
            # Charged to the ranks that hold a part, which are all of them for row_wise.
            work = own * topology.bucket_seconds + features * kind.row_parts * topology.rows_seconds
            seconds[0] += work * (self.world / ranks if kind.sharding != "row_wise" else 1.0)
        seconds[1] = self._read(ids, row, kind) + vectors / topology.vector_bandwidth + features * topology.part_seconds
        seconds[2] = self._output(kind, vectors) + bags * topology.bag_seconds
        seconds[3] = self._output(kind, vectors) + bags * topology.bag_seconds
        seconds[4] = (
            ids * (topology.id_seconds + topology.cached_row_seconds + c * ELEMENT / topology.cached_row_bandwidth)
            + vectors / topology.vector_bandwidth
            + self._write(distinct, row, state, kind)
        )
        flight = BATCHES_IN_FLIGHT if self.work.overlapped else 1
        device, host = np.zeros((len(BYTES), *shares.shape)), np.zeros((len(BYTES), *shares.shape))
        there = device if kind.tier == "device" else host
        there[0], there[1] = rows * row, rows * state
        device[1] += rows * self.map_row[:, None]  # an update does not touch it, and no tier takes it elsewhere
        device[3] = 2 * vectors
        device[4] = (ID * ids + LENGTH * bags) * flight + SORT_BYTES * ids
        if kind.tier == "cache":
            device[5] = kind.cache_share * rows * (row + state + CACHE_ROW_BYTES)
        away = (self.world - 1) / self.world
        volume = np.stack([(ID * ids + LENGTH * bags) * away, vectors * away, np.zeros_like(ids)])
        if alike:
            at = np.repeat([0, 1], [kind.row_parts - 1, 1])
            seconds, device, host, volume = (array[:, :, at] for array in (seconds, device, host, volume))
        return KindPrices(kind, valid, seconds, device, host, volume)

    def _shares(self, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """(T, parts) share of the ids and different rows of every block of rows."""
        if parts not in self._by_rows:
            found = [s.parts(parts, n) for s, n in zip(self.skews, self.ids, strict=True)]
            self._by_rows[parts] = (np.array([f[0] for f in found]), np.array([f[1] for f in found]))
        return self._by_rows[parts]

    def _missed(self, kind: Kind) -> np.ndarray:
        """(T, 1) share of look-ups that a tier beyond the device serves."""
        if kind.tier == "host":
            return np.ones((len(self.rows), 1))
        cached = kind.cache_share * self.rows
        return 1 - np.array([[float(s.covered(n))] for s, n in zip(self.skews, cached, strict=True)])

    def _read(self, ids: np.ndarray, row: np.ndarray, kind: Kind) -> np.ndarray:
        t, hit = self.topology, self.hits[:, None]
        far = t.row_seconds + row / t.row_bandwidth
        near = t.cached_row_seconds + row / t.cached_row_bandwidth
        seconds = ids * (hit * near + (1 - hit) * far)
        if kind.tier != "device":
            seconds = seconds + ids * self._missed(kind) * row / t.pcie_bandwidth
        return seconds

    def _write(self, distinct: np.ndarray, row: np.ndarray, state: np.ndarray, kind: Kind) -> np.ndarray:
        t = self.topology
        seconds = distinct * (t.update_row_seconds + 2 * (row + state) / t.update_row_bandwidth)
        if kind.tier != "device":  # the row goes back, and its state both ways
            seconds = seconds + distinct * self._missed(kind) * (row + 2 * state) / t.pcie_bandwidth
        return seconds

    def _output(self, kind: Kind, vectors: np.ndarray) -> np.ndarray:
        """Seconds to send `vectors` bytes of pooled vectors home; the gradients take as long on their way back."""
        t = self.topology
        if kind.sharding in ("table_row_wise", "grid_shard"):
            local = t.ranks_per_host
            return vectors * ((local - 1) / local / self.intra + (t.hosts - 1) / t.hosts / local / self.inter)
        return vectors * self.byte

    def _data_parallel(self, kind: Kind, valid: np.ndarray, row: np.ndarray, state: np.ndarray) -> KindPrices:
        t, world = self.topology, self.world
        rows = self.rows[:, None]
        ids, bags = self.ids[:, None] / world, self.bags[:, None] / world
        table = rows * row
        seconds = np.zeros((len(PARTS), *table.shape))
        seconds[1] = self._read(ids, row, kind) + bags * row / t.vector_bandwidth
        seconds[4] = (
            ids * (t.replica_id_seconds + t.cached_row_seconds + row / t.cached_row_bandwidth)
            + table / t.vector_bandwidth  # its gradient is made
            + allreduce_seconds(t, table)
            + (AVERAGED + SEARCHED) * table / t.update_dense_bandwidth
            + self.distinct[:, None] * (t.replica_row_seconds + PASSES * (row + state) / t.vector_bandwidth)
            + t.replica_seconds
        )
        device = np.zeros((len(BYTES), *table.shape))
        device[0], device[1], device[2] = table, rows * state, 2 * table  # gradient, and the bucket it is averaged in
        device[3] = 2 * bags * row
        averaged = 2 * (world - 1) / world * table
        volume = np.stack([np.zeros_like(table), np.zeros_like(table), averaged])
        return KindPrices(kind, valid, seconds, device, np.zeros_like(device), volume)


def collective_latency(topology: Topology) -> float:
    """Seconds of an empty collective over all ranks."""
    if topology.world_size == 1:
        return 0.0
    first = topology.intra_latency if topology.hosts == 1 else topology.inter_latency
    return first + topology.peer_seconds * (topology.world_size - 1)


def allreduce_seconds(topology: Topology, size: np.ndarray | float) -> np.ndarray | float:
    """Seconds to sum `size` bytes over all ranks: a ring in each host, then one over hosts in which every rank has its
    share; without latency."""
    local, hosts = topology.ranks_per_host, topology.hosts
    inside = 2 * (local - 1) / local / topology.intra_bandwidth
    across = 2 * (hosts - 1) / hosts / local / topology.inter_bandwidth
    return size * (inside + across) / topology.link_efficiency / topology.reduce_efficiency


def _fixed_seconds(work: Work, topology: Topology, latency: float) -> dict[str, float]:
    """What no plan changes: host work, dense layers, what of their all-reduce shows."""
    dense, rows = work.dense, work.batch_size / topology.world_size
    bf16 = topology.matrix_bf16 * topology.matrix_efficiency
    rate = bf16 if work.bf16 else topology.matrix_fp32 * topology.fp32_efficiency
    compute = (
        dense.flops_per_row * rows / rate
        + (dense.bytes_per_row * rows + dense.bytes_fixed) / topology.vector_bandwidth
        + dense.ops * topology.op_seconds
    )
    average = allreduce_seconds(topology, ELEMENT * dense.parameters) + (latency if dense.parameters else 0.0)
    if topology.overlap:  # it begins with the last layer's gradient; the backward is two thirds of the dense work
        average = max(0.0, average - compute * 2 / 3)
    return {
        "host": topology.step_seconds + work.features * topology.feature_seconds,
        "dense": compute,
        "all-reduce": average,
        "dense update": dense.parameters
        * (3 * ELEMENT + 2 * dense.state_per_parameter)
        / topology.update_dense_bandwidth,
    }


def _fixed_bytes(work: Work, topology: Topology) -> dict[str, float]:
    """Bytes of each rank that no plan changes.  A GPU's readers are in its host's memory."""
    dense, rows = work.dense, work.batch_size / topology.world_size
    flight = BATCHES_IN_FLIGHT if work.overlapped else 1
    columns = sum(t.dim * t.bags for t in work.tables)
    per_row = dense.batch_bytes_per_row + sum(ID * t.ids + LENGTH * t.bags for t in work.tables)
    return {
        "runtime": RUNTIME_BYTES[topology.device],
        "dense": dense.parameters * (3 * ELEMENT + dense.state_per_parameter),  # weights, gradients, buckets
        "activations": rows * (dense.activation_bytes_per_row + 2 * ELEMENT * columns),
        "batches": flight * rows * per_row,
    } | ({"readers": work.readers.of_rank(topology.world_size)} if topology.device == "cpu" else {})
