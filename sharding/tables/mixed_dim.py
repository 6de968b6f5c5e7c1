"""Popular rows are wide and rare ones narrow; a projection brings them to the model's width (Ginart et al., 2019).

    row(x) = W E[x],    E of n rows and d columns, W (D, d) without a bias; d = D has no W

by the rule d ~ p^alpha, p the look-ups that a row gets per sample.  It is applied to every block of rows: a whole table
is one block, or a table whose ids are numbered by popularity is cut into blocks, the popular ids first.

    blocks = [100, 5000]: ids 0 .. 99, 100 .. 4999 and the rest are three physical tables with three projections

The projection commutes with the sum over a bag, so it is applied to sums.

Options, of which one of dims, base_dim and budget is needed:
    dims      columns of each block.
    base_dim  of the most popular block of all tables with these options; the others follow by the rule.
    budget    bytes of the rows of all tables with these options, as a share of what they would take at full width;
              the rule's factor is as large as that allows.
    alpha     the rule's exponent.
    blocks    the first ids of the blocks but the first; "auto": 10, 100, 1000, where dataset.json knows frequencies.
    ordered   true says that ids are numbered by popularity, where the dataset does not.

Columns are stored in fours, so the rule gives multiples of 4, and at least 4.  The projections, D * d values a block,
are dense weights beside the rows: replicated, and not in the budget; `fit` lets them exceed it by a twentieth at most.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.errors import UserError
from sharding.tables.base import ALIGNED, Lowered, Options, Source, Table, too_small

FITTED = ("dims", "base_dim", "budget")
VARIANTS = (
    {"dims": [4]},
    {"base_dim": 8, "blocks": [3, 20], "ordered": True},
    {"dims": [8, 4], "blocks": [7], "ordered": True},
    {"budget": 0.5},
)
OVER = 0.05  # of a byte budget, by which projections may exceed it (the rows alone may not)
Count = Annotated[int, Field(ge=1)]


class MixedDim(Options):
    dims: tuple[Count, ...] | None = None
    base_dim: Count | None = None
    budget: float | None = Field(default=None, gt=0.0, le=1.0)
    alpha: float = Field(default=0.3, ge=0.0, le=1.0)
    blocks: tuple[Count, ...] | Literal["auto"] = ()
    ordered: bool = False

    @model_validator(mode="after")
    def _check(self) -> "MixedDim":
        given = [name for name in ("dims", "base_dim", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of dims, base_dim and budget, not {' and '.join(given) or 'none'}")
        return self


@dataclass(frozen=True, eq=False)
class Block:
    """Rows first .. end-1 of a table; lookups: that each of its rows gets per sample, on the mean."""

    table: Table
    first: int
    end: int
    lookups: float

    @property
    def rows(self) -> int:
        return self.end - self.first

    def bytes(self, dim: int) -> int:
        return self.rows * self.table.row_bytes(dim)

    def round(self, wanted: float) -> int:
        """The multiple of 4 below, from 4 to D."""
        return min(self.table.dim, max(ALIGNED, int(wanted + 1e-9) // ALIGNED * ALIGNED))


def lower(table: Table) -> Lowered:
    (settled,) = together([table])
    options = settled.read(MixedDim)
    edges = _edges(settled, options)
    tables, sources = [], {}
    for i, ((first, end), dim) in enumerate(zip(pairwise(edges), options.dims, strict=True)):
        names = {feature: f"{feature}#{i}" for feature in table.features}
        tables.append(table.part(str(i), features=names.values(), rows=end - first, dim=dim))
        for feature, name in names.items():
            one = len(edges) == 2
            sources[name] = Source(
                feature=feature,
                ids=None if one else partial(minus, first=first),
                keep=None if one else partial(between, first=first, end=end),
            )
    plain = options.dims == (table.dim,)
    combine = None if plain else Project(options.dims, table.dim)
    return Lowered(tables=tuple(tables), sources=sources, combine=combine)


def reference(table: Table, feature: str, id: int, weights: Mapping[str, Tensor]) -> Tensor:
    (settled,) = together([table])
    options = settled.read(MixedDim)
    edges = _edges(settled, options)
    block = max(i for i, first in enumerate(edges[:-1]) if id >= first)
    row_d = weights[f"{table.name}#{block}"][id - edges[block]]
    return row_d if options.dims[block] == table.dim else weights[f"block_{block}"] @ row_d


def together(tables: Sequence[Table]) -> tuple[Table, ...]:
    """The tables with `dims` in place of base_dim and budget, and `blocks` in numbers."""
    groups: dict[tuple, list[Table]] = {}
    for table in tables:
        options = table.read(MixedDim)
        groups.setdefault((options.base_dim, options.budget, options.alpha), []).append(table)
    settled: dict[str, Table] = {}
    for members in groups.values():
        settled |= _settle(members)
    return tuple(settled[table.name] for table in tables)


def fit(tables: Sequence[Table], budget: int) -> tuple[Table, ...]:
    """`dims` by the rule under one budget for all the tables; projections may exceed it by OVER."""
    full, room, most = sum(table.bytes for table in tables), budget, int((1 + OVER) * budget)
    while True:
        kept = [
            replace(
                table,
                options={k: v for k, v in table.options.items() if k not in ("dims", "base_dim")}
                | {"budget": min(1.0, max(room, 1) / full)},
            )
            for table in tables
        ]
        try:
            fitted = together(kept)
        except UserError:
            if room == budget:
                raise
            narrow = [replace(t, options=t.options | {"dims": [ALIGNED] * len(t.options["dims"])}) for t in fitted]
            smallest = sum(_rows_bytes(t) + _projection_bytes(t) for t in narrow)
            smallest = math.ceil(smallest / (1 + OVER))
            raise too_small(tables, budget, smallest, f"{ALIGNED} columns for every row, and projections") from None
        over = sum(_rows_bytes(t) + _projection_bytes(t) for t in fitted) - most
        if over <= 0:
            return fitted
        room -= over  # until no rows fit beside the projections: then `together` says so


def _rows_bytes(table: Table) -> int:
    return sum(physical.bytes for physical in lower(table).tables)


def _projection_bytes(table: Table) -> int:
    return sum(4 * table.dim * dim for dim in table.options["dims"] if dim < table.dim)


def _settle(tables: Sequence[Table]) -> dict[str, Table]:
    options = tables[0].read(MixedDim)
    blocks = {table.name: _blocks(table, table.read(MixedDim)) for table in tables}
    every = [block for of_table in blocks.values() for block in of_table]
    if options.dims is not None:
        dims = {block: dim for t in tables for block, dim in zip(blocks[t.name], _given(t), strict=True)}
    elif options.base_dim is not None:
        top = max(block.lookups for block in every)
        dims = {b: b.round(options.base_dim * (b.lookups / top) ** options.alpha) for b in every}
    else:
        dims = _under_budget(every, round(options.budget * sum(t.bytes for t in tables)), options.alpha)
    found = {}
    for table in tables:
        of_table = blocks[table.name]
        wanted = {"dims": [dims[b] for b in of_table], "alpha": table.read(MixedDim).alpha}
        if len(of_table) > 1:
            wanted |= {"blocks": [b.first for b in of_table[1:]], "ordered": True}
        found[table.name] = replace(table, options=wanted)
    return found


def _under_budget(blocks: Sequence[Block], budget: int, alpha: float) -> dict[Block, int]:
    """The rule with the largest factor whose rows take at most `budget` bytes; what is left then goes to the blocks of
    the most popular rows, four columns at a time."""

    def dims(factor: float) -> dict[Block, int]:
        return {b: b.round(factor * b.lookups**alpha) for b in blocks}

    def size(found: Mapping[Block, int]) -> int:
        return sum(b.bytes(d) for b, d in found.items())

    smallest = size(dims(0.0))
    if smallest > budget:
        tables = list({b.table.name: b.table for b in blocks}.values())
        raise too_small(tables, budget, smallest, f"{ALIGNED} columns for every row")
    low, high = 0.0, max(b.table.dim / b.lookups**alpha for b in blocks) + 1.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(dims(middle)) <= budget else (low, middle)
    found = dims(low)
    for block in sorted(blocks, key=lambda b: -b.lookups):
        wider = found | {block: min(block.table.dim, found[block] + ALIGNED)}
        if size(wider) <= budget:
            found = wider
    return found


def _blocks(table: Table, options: MixedDim) -> list[Block]:
    lookups = float(len(table.features)) if table.lookups is None else table.lookups
    edges = _edges(table, options)
    if len(edges) == 2:
        return [Block(table, 0, table.rows, max(lookups, 1e-12) / table.rows)]
    below = [_share(table, n) for n in edges]
    return [
        Block(table, first, end, max(lookups * (b - a), 1e-12) / (end - first))
        for (first, end), (a, b) in zip(pairwise(edges), pairwise(below), strict=True)
    ]


def _edges(table: Table, options: MixedDim) -> list[int]:
    """(0, ..., rows): where the blocks begin, and the end."""
    if options.blocks == ():
        return [0, table.rows]
    if not (options.ordered or table.by_popularity):
        raise UserError(
            f"table {table.name!r}: blocks = {options.blocks!r} cuts it by popularity, but its ids are not known to be "
            'numbered by popularity: a vocabulary numbers them so (ids = "vocab" in the spec of prepare); if yours '
            "are, say ordered = true; otherwise leave blocks out"
        )
    if options.blocks == "auto":
        known = [n for n, _ in table.head if 10 <= n < table.rows]
        return [0, *known, table.rows]
    edges = [0, *options.blocks, table.rows]
    if any(a >= b for a, b in pairwise(edges)):
        raise UserError(
            f"table {table.name!r}: blocks = {list(options.blocks)} must rise and stay below its {table.rows} rows"
        )
    return edges


def _share(table: Table, n: int) -> float:
    """The share of all look-ups that the n most frequent rows take: dataset.json's figures, joined by straight lines
    over log n as Zipf's law has them; without figures Zipf's law itself, exponent 1."""
    if n == 0:
        return 0.0
    known = [*((k, share) for k, share in table.head if k < table.rows), (table.rows, 1.0)]
    if len(known) == 1:
        return math.log1p(n) / math.log1p(table.rows)
    at = bisect_right([k for k, _ in known], n)
    if at == 0:
        return known[0][1] * n / known[0][0]
    if at == len(known):
        return 1.0
    (n0, s0), (n1, s1) = known[at - 1], known[at]
    return s0 + (s1 - s0) * math.log(n / n0) / math.log(n1 / n0)


def _given(table: Table) -> tuple[int, ...]:
    options = table.read(MixedDim)
    blocks = len(_edges(table, options)) - 1
    if len(options.dims) != blocks:
        raise UserError(
            f"table {table.name!r}: dims = {list(options.dims)} has {len(options.dims)} values for {blocks} "
            f"{'block' if blocks == 1 else 'blocks'}; give one each"
        )
    wide = [d for d in options.dims if d > table.dim]
    if wide:
        raise UserError(
            f"table {table.name!r}: dims = {list(options.dims)}: {wide[0]} is wider than the table's dim, {table.dim}; "
            f"a projection to fewer columns would only cost memory"
        )
    return options.dims


def minus(ids_N: Tensor, *, first: int) -> Tensor:
    return ids_N - first


def between(ids_N: Tensor, *, first: int, end: int) -> Tensor:
    return (ids_N >= first) & (ids_N < end)


class Project(nn.Module):
    """(B, d_i) of each block -> the sum of W_i times them, (B, D)."""

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        for i, d in enumerate(dims):
            self.register_parameter(f"block_{i}", nn.Parameter(torch.empty(dim, d)) if d < dim else None)

    def init(self, generator: torch.Generator) -> None:
        """N(0, 1/d): what is looked up keeps its size."""
        for weight in self.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)

    def forward(self, vectors: list[Tensor]) -> Tensor:
        weights = [getattr(self, f"block_{i}") for i in range(len(vectors))]
        parts = [v if w is None else nn.functional.linear(v, w) for v, w in zip(vectors, weights, strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
