"""A plan.json, read and checked: what `train --plan`, its preflight and `plan --compare` take.

read(path, embeddings, world_size) -> {table: Placed}
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from sharding.cost import TIERS
from sharding.embeddings import Embeddings
from sharding.tables.base import SHARDING_TYPES, Table, stored_dim


@dataclass(frozen=True)
class Placed:
    """A table of a plan.json.  parts: (rank, first row, last row + 1, first column, last column + 1)."""

    sharding: str
    tier: str
    cache_share: float
    parts: list[tuple[int, ...]]


def read(path: Path, embeddings: Embeddings, world_size: int) -> dict[str, Placed]:
    """The tables of a plan.json, in the order of ours.  UserError where it is none, or of another model or
    number of ranks."""
    try:
        found = json.loads(Path(path).read_text())
        world, listed = found["world_size"], [(t["name"], t) for t in found["tables"]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a plan.json ({type(error).__name__}: {error}); `tablemesh plan CONFIG --out FILE` writes one"
        ) from error
    if world != world_size:
        raise UserError(
            f"{path}: a plan for {world!r} ranks, but there are {world_size}; plan again, or use as many ranks"
        )
    for name, _ in listed:
        if not isinstance(name, str):
            raise UserError(f"{path}: a table is named {name!r}; a name is text; plan again")
    for name, times in Counter(name for name, _ in listed).items():
        if times > 1:
            raise UserError(f"{path}: table {name!r} is listed {times} times; plan again")
    tables = dict(listed)
    ours = {t.name: t for t in embeddings.physical}
    odd = sorted(set(ours) ^ set(tables))
    if odd:
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise UserError(
            f"{path}: has other tables than this model; they differ in {', '.join(odd[:8])}{more}; plan again"
        )
    placed: dict[str, Placed] = {}
    for name, table in ours.items():
        entry = tables[name]
        try:
            size, sharding, tier = (entry["rows"], entry["dim"]), entry["sharding"], entry.get("tier", "device")
            parts = [tuple(map(_whole, (s["rank"], *s["rows"], *s["cols"]))) for s in entry["shards"]]
            share = _number(entry.get("cache_share", 0.0))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: table {name!r} is broken: {error!r}; plan again") from error
        if size != (table.rows, table.dim):
            raise UserError(
                f"{path}: table {name!r} has {size[0]} rows of {size[1]} there, and {table.rows} of {table.dim} in "
                "this model; plan again"
            )
        _check_parts(path, table, sharding, parts, world)
        if tier not in TIERS or not 0 <= share <= 1:
            raise UserError(
                f"{path}: table {name!r}: tier {tier!r} with {share:g} of the rows in a cache; a tier is "
                f"{', '.join(TIERS)}, a share 0 to 1; plan again"
            )
        if name in embeddings.by_id and sharding == "row_wise":
            _check_blocks(path, name, parts, embeddings.by_id[name].blocks(world))
        placed[name] = Placed(sharding, tier, share, parts)
    return placed


def _whole(given: Any) -> int:
    if not isinstance(given, int) or isinstance(given, bool):
        raise ValueError(f"{given!r} is no whole number")
    return given


def _number(given: Any) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool):
        raise ValueError(f"{given!r} is no number")
    return float(given)


def _check_parts(path: Path, table: Table, sharding: str, parts: Sequence[tuple[int, ...]], world: int) -> None:
    """UserError unless the parts are on ranks there are and cover the table once (data_parallel: on every rank)."""
    wrong = sharding not in SHARDING_TYPES or (sharding == "table_wise" and len(parts) != 1)
    wrong = wrong or any(len(p) != 5 or not 0 <= p[0] < world for p in parts)
    if not wrong:
        cells = sum((r1 - r0) * (c1 - c0) for _, r0, r1, c0, c1 in parts)
        copies = world if sharding == "data_parallel" else 1
        inside = all(
            0 <= r0 < r1 <= table.rows and 0 <= c0 < c1 <= stored_dim(table.dim) for _, r0, r1, c0, c1 in parts
        )
        apart = sharding == "data_parallel" or len({(p[1], p[3]) for p in parts}) == len(parts)
        wrong = not inside or not apart or cells != copies * table.rows * stored_dim(table.dim)
    if wrong:
        raise UserError(
            f"{path}: the parts of table {table.name!r} ({sharding}) do not cover its {table.rows} x "
            f"{stored_dim(table.dim)} once on ranks 0 to {world - 1}; plan again"
        )


def _check_blocks(path: Path, name: str, parts: Sequence[tuple[int, ...]], blocks: Sequence[tuple[int, int]]) -> None:
    """UserError unless rank r has block r: the ids that a rank owns, and so its rows, follow from its number."""
    if sorted(p[:3] for p in parts) != [(rank, *block) for rank, block in enumerate(blocks)]:
        raise UserError(
            f"{path}: the rows of table {name!r} are given to ids, so that its parts by rows can only be "
            f"{', '.join(f'{first} to {end - 1}' for first, end in blocks)} on ranks 0 to {len(blocks) - 1}; plan again"
        )
