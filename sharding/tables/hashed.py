"""Fewer rows than ids: an id's row is a hash of it, and ids that meet share one.

    row(x) = E[h_1(x)] + ... + E[h_k(x)], or the k parts of D/k columns side by side

With several seeds two ids share all their rows rarely, though each row is shared as often.  The features of one table
are hashed alike: they have the same ids.  For features with ids of their own in one table there is `unified`.

Options:
    rows      of the physical table.
    hash      "mix": all bits of the id decide; "modulo": x mod rows, which keeps neighbours apart and has no seed.
    seeds     k, look-ups per id.
    combine   "sum", or "concat": look-ups of D/k columns, side by side.
    seed      changes the hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.errors import UserError
from kernels.hashing import bucket, bucket_of, seed_of
from sharding.tables.base import Lowered, Options, Source, Table, shares, too_small

FITTED = ("rows",)
VARIANTS = (
    {"rows": 11},
    {"rows": 11, "hash": "modulo"},
    {"rows": 13, "seeds": 2},
    {"rows": 13, "seeds": 2, "combine": "concat", "seed": 5},
)


class How(Options):
    hash: Literal["mix", "modulo"] = "mix"
    seeds: int = Field(default=1, ge=1)
    combine: Literal["sum", "concat"] = "sum"
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "How":
        if self.hash == "modulo" and self.seeds > 1:
            raise ValueError(f'hash = "modulo" has no seed, so seeds = {self.seeds} look-ups would be one; use "mix"')
        return self


class Hashed(How):
    rows: int = Field(ge=1)


def lower(table: Table) -> Lowered:
    options = table.read(Hashed)
    dim = _dim(table, options)
    names = {(feature, j): f"{feature}#{j}" for feature in table.features for j in range(options.seeds)}
    sources = {name: Source(feature=feature, ids=_hash(table, options, j)) for (feature, j), name in names.items()}
    shrink = options.seeds**-0.5 if options.combine == "sum" else 1.0  # so that the sum varies as one row would
    physical = table.part(
        "hashed",
        features=names.values(),
        rows=options.rows,
        dim=dim,
        init_std=table.init_std and table.init_std * shrink,
        init_bound=None if table.init_std else shrink * options.rows**-0.5,
    )
    combine = None if options.seeds == 1 else {"sum": Sum, "concat": Concat}[options.combine]()
    return Lowered(tables=(physical,), sources=sources, combine=combine)


def reference(table: Table, feature: str, id: int, weights: Mapping[str, Tensor]) -> Tensor:
    options = table.read(Hashed)
    rows_ED = weights[f"{table.name}#hashed"]
    if options.hash == "modulo":
        return rows_ED[id % options.rows]
    parts = [
        rows_ED[bucket_of(id, seed=seed_of(options.seed, table.name, j), rows=options.rows)]
        for j in range(options.seeds)
    ]
    return torch.stack(parts).sum(0) if options.combine == "sum" else torch.cat(parts)


def fit(tables: Sequence[Table], budget: int) -> tuple[Table, ...]:
    found = []
    for table, share in zip(tables, shares(tables, budget), strict=True):
        options = table.read(How, of={k: v for k, v in table.options.items() if k != "rows"})
        row = table.row_bytes(_dim(table, options))
        if share < row:
            raise too_small([table], share, row, "one row")
        found.append(replace(table, options={**table.options, "rows": share // row}))
    return tuple(found)


def _dim(table: Table, options: How) -> int:
    """Columns of the physical table."""
    if options.combine == "sum":
        return table.dim
    if table.dim % options.seeds:
        raise UserError(
            f"table {table.name!r}: its dim {table.dim} does not divide into seeds = {options.seeds} parts side by "
            f'side; use another number of seeds, or combine = "sum"'
        )
    return table.dim // options.seeds


def _hash(table: Table, options: Hashed, j: int):
    if options.hash == "modulo":
        return partial(remainder, rows=options.rows)
    return partial(bucket, seed=seed_of(options.seed, table.name, j), rows=options.rows)


def remainder(ids_N: Tensor, *, rows: int) -> Tensor:
    return ids_N % rows


class Sum(nn.Module):
    def forward(self, vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).sum(0)


class Concat(nn.Module):
    def forward(self, vectors: list[Tensor]) -> Tensor:
        return torch.cat(vectors, dim=1)
