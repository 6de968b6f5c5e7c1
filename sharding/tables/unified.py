"""One physical table for many features, each with hashes of its own (Coleman et al., "Unified Embedding", 2023).

    e_f(x) = E[h_f,1(x)], ..., E[h_f,k(x)], side by side, D/k columns each

The features need not share ids: a row is shared by chance, among all of them, and the model's layers tell the features
apart by where their columns stand.  All rows of the one table are used alike, whatever the features' cardinalities, so
row-wise shards are balanced.  A config names it by giving many features one table:

    [[tables.override]]
    match = "*"
    table = "all"
    kind = "unified"
    options = { rows = 20000, lookups = 2 }

Options:
    rows      of the physical table.
    lookups   k, per id and feature.
    seed      changes the hashes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import UserError
from kernels.hashing import bucket, bucket_of, seed_of
from sharding.tables.base import Lowered, Options, Source, Table, too_small
from sharding.tables.hashed import Concat

FITTED = ("rows",)
VARIANTS = ({"rows": 17}, {"rows": 23, "lookups": 2, "seed": 3})


class How(Options):
    lookups: int = Field(default=1, ge=1)
    seed: int = 0


class Unified(How):
    rows: int = Field(ge=1)


def lower(table: Table) -> Lowered:
    options = table.read(Unified)
    sources = {
        f"{feature}#{j}": Source(
            feature=feature, ids=partial(bucket, seed=_seed(table, options, feature, j), rows=options.rows)
        )
        for feature in table.features
        for j in range(options.lookups)
    }
    physical = table.part("unified", features=sources, rows=options.rows, dim=_dim(table, options))
    return Lowered(tables=(physical,), sources=sources, combine=Concat() if options.lookups > 1 else None)


def reference(table: Table, feature: str, id: int, weights: Mapping[str, Tensor]) -> Tensor:
    options = table.read(Unified)
    rows_ED = weights[f"{table.name}#unified"]
    return torch.cat(
        [
            rows_ED[bucket_of(id, seed=_seed(table, options, feature, j), rows=options.rows)]
            for j in range(options.lookups)
        ]
    )


def fit(tables: Sequence[Table], budget: int) -> tuple[Table, ...]:
    """One table for all their features; UserError when they do not agree in what one table has once."""
    first = tables[0]
    for table in tables[1:]:
        for key in ("dim", "pooling", "row_type", "sharding", "init_std"):
            if getattr(table, key) != getattr(first, key):
                raise UserError(
                    f"tables {first.name!r} and {table.name!r} cannot be one unified table: their {key} is "
                    f"{getattr(first, key)!r} and {getattr(table, key)!r}; give them the same"
                )
    options = first.read(How, of={k: v for k, v in first.options.items() if k != "rows"})
    row = first.row_bytes(_dim(first, options))
    if budget < row:
        raise too_small(tables, budget, row, "one row")
    return (
        replace(
            first,
            name=first.name if len(tables) == 1 else "unified",
            rows=max(table.rows for table in tables),
            features=tuple(f for table in tables for f in table.features),
            multi_hot=any(table.multi_hot for table in tables),
            options={**first.options, "rows": budget // row},
        ),
    )


def _dim(table: Table, options: How) -> int:
    if table.dim % options.lookups:
        raise UserError(
            f"table {table.name!r}: its dim {table.dim} does not divide into lookups = {options.lookups} parts; "
            f"use another number of look-ups, or another dim"
        )
    return table.dim // options.lookups


def _seed(table: Table, options: How, feature: str, j: int) -> int:
    return seed_of(options.seed, table.name, feature, j)
