"""The contract of an embedding-table kind: what it is given (`Table`) and what it answers (`Lowered`).

A kind is a file in this folder with

    lower(table: Table) -> Lowered
        Called once per table on every rank, before anything is allocated; it must depend on the table alone.  It says
        which plain *physical* tables stand for the logical one, so that the planner can price and shard them:

            ids of a feature -> id map (per physical feature) -> sharded look-ups, summed over a bag
            -> combine -> (B, D)

        A combine that does not commute with the sum (a product) says `per_id = True`: then every id is looked up by
        itself, the combine is applied per id, and its results are summed over the bag:

            ids of a feature -> id map -> sharded look-ups of each id
            -> combine -> (N, D) -> times the ids' weights, summed over a bag -> (B, D)

        Raises UserError, naming the table, for options that make no sense.

    reference(table, feature, id, weights) -> (D,)
        The vector of one id, written as the paper writes it, in Python's integers and with no look at `lower`'s
        callables.  weights: name of a physical table -> its (E, D) tensor; name of a parameter of the combine -> the
        parameter.  The tests hold the sharded look-up against it, in output and in gradient.

    VARIANTS: tuple of options
        with which the conformance suite (tests/sharding/test_tables.py) tries the kind, on tables of 40 rows or more.

and, if it has something to say there,

    together(tables) -> tables
        Called once with all tables of this kind of a model, before any of them is lowered: settles in their options
        what depends on several of them, such as a joint budget.
    fit(tables, budget) -> tables
        The same tables with options such that their physical tables take at most `budget` bytes, and as few less as can
        be.  Options of the kind that say nothing of size are kept.  UserError for a budget below the smallest possible.
        `tablemesh compare-tables` calls it.
    FITTED: tuple of names
        of the options that `fit` chooses, which nobody can ask for beside a budget.

A kind whose rows are given to ids as they come, and taken back, answers with `by_id`: one physical table whose feature
gets the ids as they are, which an id map on the rank that owns them turns into rows (sharding/by_id.py).

The file may import torch, not TorchRec.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels import registry
from kernels.errors import UserError
from kernels.int8 import SCALE_BYTES

if TYPE_CHECKING:
    from kernels.id_maps.base import Policy  # imports torch, which the command line does without

SHARDING_TYPES = (
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)
# How a row is stored -> bytes of an element, and of the row beside them: an int8 row has a scale.
ROW_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
ROW_SCALES = {"fp32": 0, "bf16": 0, "fp16": 0, "int8": SCALE_BYTES}
ALIGNED = 4  # columns: FBGEMM's kernels want multiples of it


class Options(BaseModel):
    """Base of a kind's options: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptionError(UserError):
    """Options that the kind does not have, or values that they cannot have."""


Read = TypeVar("Read", bound=Options)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One logical embedding table, as the user sees it; or a physical one, of kind "standard".

    name: unique among the tables.
    rows: E, ids are 0 .. rows-1.
    dim: D, the width of the vector each of its features gives to the model.
    features: the features that look up in it; one pooled D-vector each.
    pooling: "sum" or "mean" over the ids of a bag; an empty bag gives zeros.
    sharding: one of SHARDING_TYPES, or "auto" for the planner's choice.
    kind: the file in sharding/tables/ that lowers it to physical tables.
    options: the kind's own options.
    row_type: how its rows are stored, one of ROW_TYPES.
    init_std, init_mean, init_bound: initial values are normal with this mean and standard deviation; without a standard
        deviation uniform in mean +- bound, where bound is sqrt(1/rows) as DLRM's if it is not given.
    multi_hot: whether a bag may hold more than one id.
    lookups: mean number of ids that a sample looks up in it, over all its features; None: not known.
    head: ((n, share of the look-ups that the n most frequent rows take), ...), ascending; empty: not known.
    by_popularity: whether id 0 is the most frequent one, id 1 the next, and so on.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    pooling: str = "sum"
    sharding: str = "auto"
    kind: str = "standard"
    options: dict = field(default_factory=dict)
    row_type: str = "fp32"
    init_std: float | None = None
    init_mean: float = 0.0
    init_bound: float | None = None
    multi_hot: bool = True
    lookups: float | None = None
    head: tuple[tuple[int, float], ...] = ()
    by_popularity: bool = False

    def __post_init__(self) -> None:
        assert self.features and self.pooling in ("sum", "mean") and self.sharding in ("auto", *SHARDING_TYPES)
        assert self.row_type in ROW_TYPES

    @property
    def bytes(self) -> int:
        """Of its rows, were it one physical table."""
        return self.rows * self.row_bytes(self.dim)

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of `dim` columns as this table stores rows."""
        return ROW_TYPES[self.row_type] * stored_dim(dim) + ROW_SCALES[self.row_type]

    def part(self, suffix: str, *, features: Sequence[str], **changes: Any) -> "Table":
        """A physical table NAME#suffix for this logical one: sharded and stored like it, with these changes."""
        return replace(
            self, name=f"{self.name}#{suffix}", kind="standard", options={}, features=tuple(features), **changes
        )

    def read(self, options: type[Read], *, of: Mapping[str, Any] | None = None) -> Read:
        """Its options (or others) as the kind's own class; OptionError that names table and key."""
        try:
            return options.model_validate(self.options if of is None else of)
        except ValidationError as error:
            lines = [self._complaint(options, e) for e in error.errors(include_url=False)]
            raise OptionError("\n".join(lines)) from None

    def _complaint(self, options: type[Options], error: Any) -> str:
        key = ".".join(str(part) for part in error["loc"])
        start = f"table {self.name!r}, kind {self.kind!r}: "
        if error["type"] == "extra_forbidden":
            known = sorted(options.model_fields)
            if not known:
                return f"{start}unknown option {key!r}; it has none"
            found = registry.nearest(key, known)
            return f"{start}unknown option {key!r}; {found}" + (f" (of {', '.join(known)})" if "?" in found else "")
        if error["type"] == "missing":
            return f"{start}the option {key!r} is missing"
        message = error["msg"].removeprefix("Value error, ")
        return f"{start}option {key} = {error['input']!r}: {message}" if key else start + message


def stored_dim(dim: int) -> int:
    """Columns a physical table of this dim is stored with: 1 .. 4 -> 4, 5 .. 8 -> 8."""
    return -(-dim // ALIGNED) * ALIGNED


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the ids of a physical feature come from.

    feature: the logical feature whose bags it takes.
    ids: (N,) int64 -> (N,) int64, element by element, without state; None: the ids as they are.
    keep: (N,) int64 -> (N,) bool, likewise: ids that stay in their bags, the others have no row in this table.  None:
        all of them, every bag keeps its length.
    """

    feature: str
    ids: Callable[[Any], Any] | None = None
    keep: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The physical tables that stand for one logical table.

    tables: physical tables, each of kind "standard"; their features are physical features, unique over the model.
    sources: physical feature -> its Source.
    combine: module from the list of a logical feature's vectors [(B, d_1), (B, d_2), ...], in the order of `sources`,
        to its (B, D); None when there is one of them and it is the answer.  It gives zeros for zeros.  Its parameters
        are dense ones of the model: replicated, drawn by their `init(generator)`, trained by the dense optimizer.  For
        pooling "mean" its result is divided by the bag's length afterwards.
    per_id: whether it is to be applied per id, before the sum over a bag.
    by_id: how rows are given to the ids of the one physical table; then there is no combine.
    """

    tables: tuple[Table, ...]
    sources: dict[str, Source]
    combine: Any = None
    per_id: bool = False
    by_id: "ById | None" = None


@dataclass(frozen=True, kw_only=True)
class ById:
    """A physical table whose rows are given to 64-bit ids by an id map.

    policy: of the id map (kernels/id_maps/base.py).
    expire_steps, expire_hours: ids unseen for more than so many steps, or hours of training, lose their rows; None:
        they never do.
    """

    policy: "Policy"
    expire_steps: int | None = None
    expire_hours: float | None = None

    def blocks(self, ranks: int) -> list[tuple[int, int]]:
        """(first row, end) of each rank's rows, of the limit + PARTS that the table has.

        The rank with the parts p .. q-1 of the ids has (q-p) / PARTS of the limit and q-p rows more, the first of which
        is its copy of the default row.  Limit 1000 on 2 ranks: rows 0-627 and 628-1255.
        """
        from kernels.id_map import part_range
        from kernels.id_maps.base import PARTS

        ends = [0]
        for rank in range(ranks):
            first, parts = part_range(rank=rank, ranks=ranks)
            ends.append(self.policy.limit * (first + parts) // PARTS + first + parts)
        return list(zip(ends, ends[1:], strict=False))

    @property
    def map_bytes(self) -> int:
        """Of the id map at the limit, on all ranks together: slots of 16 bytes that are 80% full, in at least 64 lines
        of four; for "lfu" 4 bytes of use counts, which grow twofold; where ids expire, the free rows.  The filter is
        beside it."""
        policy = self.policy
        slots = 64 * max(64, -(-policy.limit * 5 // 16) + 1)
        return slots + ((8 if policy.evict == "lfu" else 0) + (8 if self.expires else 0)) * policy.limit

    @property
    def filter_bytes(self) -> int:
        """Of the counting filter, on all ranks together; 0 where ids are admitted at once."""
        from kernels.id_maps.base import COUNTERS, PARTS

        return 2 * PARTS * COUNTERS * self.policy.lines

    @property
    def expires(self) -> bool:
        return self.expire_steps is not None or self.expire_hours is not None


def shares(tables: Sequence[Table], budget: int) -> list[int]:
    """A budget in bytes, divided over tables in proportion to what they would take as one physical table each."""
    whole = sum(table.bytes for table in tables)
    return [budget * table.bytes // whole for table in tables]


def too_small(tables: Sequence[Table], budget: int, smallest: int, why: str) -> UserError:
    """The error of `fit` for a budget that no choice of sizes meets."""
    names = ", ".join(repr(t.name) for t in tables[:4]) + (f" and {len(tables) - 4} more" if len(tables) > 4 else "")
    full = sum(t.bytes for t in tables)
    share = math.ceil(1e4 * smallest / full) / 1e4  # rounded up, so that it will do
    return UserError(
        f"{'table' if len(tables) == 1 else 'tables'} {names}: a budget of {budget:,} bytes is below the smallest "
        f"possible for kind {tables[0].kind!r}, {smallest:,} bytes ({why}); one physical table each takes {full:,}: "
        f"give at least {share:.4f} of that, or take another kind"
    )
