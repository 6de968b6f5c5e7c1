"""Table kinds as ways out where no plan fits: the largest tables of a config by each kind, sized, lowered and planned.

    ways_by_kind(asked) -> [WayOut, ...]      asked: launch/plan.py's Asked

A kind's `fit` (sharding/tables/base.py) sizes the tables for a share of their bytes; the largest share with a plan is
searched by halving the distance.  What is tried is what a config with these overrides would train: its physical
tables, the ids that reach them, the rules of its kind.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kernels import registry
from kernels.errors import UserError
from sharding.planner import has_plan, solve
from sharding.tables.base import Table
from sharding.ways_out import WayOut
from trainer.tables import overrides_of

if TYPE_CHECKING:
    from launch.plan import Asked

NOTES = {
    "compositional": "no two ids alike",
    "mixed_dim": "fewer columns for rare ids",
    "unified": "one table for all of them, whose rows ids share",
    "hashed": "ids share rows",
    "collisionless": "only ids that come 10 times have rows",
}
OPTIONS: dict[str, dict[str, Any]] = {"collisionless": {"admit_after": 10}}
LARGE = 0.99  # of the bytes: the tables that are tried together have so many, the rest stay as they are
CUTS = 64  # how finely the share of the bytes is searched
NAMED = 3  # tables, in words


def ways_by_kind(asked: "Asked") -> list[WayOut]:
    """One for each kind that helps, in the order of NOTES."""
    tables = _large(asked.embeddings.tables)
    found = []
    for kind in NOTES if tables else ():
        way = _smallest_change(asked, kind, [replace(t, kind=kind, options=_options(kind, t)) for t in tables])
        found += [] if way is None else [way]
    return found


def _large(tables: Sequence[Table]) -> list[Table]:
    """The largest standard tables, which together have LARGE of the bytes of all of them."""
    standard = sorted((t for t in tables if t.kind == "standard"), key=lambda t: -t.bytes)
    whole, taken, found = sum(t.bytes for t in standard), 0, []
    for table in standard:
        if taken >= LARGE * whole:
            break
        found.append(table)
        taken += table.bytes
    return found


def _options(kind: str, table: Table) -> dict[str, Any]:
    if kind == "mixed_dim" and table.by_popularity and table.head:
        return {"blocks": "auto"}
    return dict(OPTIONS.get(kind, {}))


def _smallest_change(asked: "Asked", kind: str, tables: Sequence[Table]) -> WayOut | None:
    full = sum(table.bytes for table in tables)
    fit = registry.load("sharding.tables", kind).fit

    def at(part: int) -> "tuple[Sequence[Table], Asked] | None":
        """UserError: below the smallest that the kind can be."""
        fitted = fit(tables, full * part // CUTS)
        try:
            changed = asked.with_tables(overrides_of(fitted))
        except UserError:  # such as features that cannot share a table
            return None
        fits = has_plan(changed.work, changed.cluster, rules=changed.rules, limits=changed.limits)
        return (fitted, changed) if fits else None

    low, high, best = 1, CUTS - 1, None
    while low <= high:
        middle = (low + high) // 2
        try:
            here = at(middle)
        except UserError:
            low = middle + 1
            continue
        if here is None:
            high = middle - 1
        else:
            low, best = middle + 1, (middle, *here)
    if best is None:
        return None
    part, fitted, changed = best
    try:
        found = solve(changed.work, changed.cluster, rules=changed.rules, limits=changed.limits)
    except UserError:
        return None
    overrides = [
        o.model_dump(mode="json", exclude_none=True, include={"match", "table", "kind", "options"})
        for o in overrides_of(fitted)
    ]
    change = {"kind": kind, "share": part / CUTS, "tables": [t.name for t in tables], "overrides": overrides}
    return WayOut(how=_words(kind, part / CUTS, tables, fitted), step=found.load.step_seconds, change=change)


def _words(kind: str, share: float, tables: Sequence[Table], fitted: Sequence[Table]) -> str:
    names = ", ".join(t.name for t in tables[:NAMED])
    names += f" and {len(tables) - NAMED} more" if len(tables) > NAMED else ""
    options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in fitted[0].options.items())
    whose = f"{fitted[0].name}: " if len(fitted) > 1 else ""
    return f'a table kind: kind = "{kind}" for {names}, in {share:.0%} of their bytes ({NOTES[kind]}; {whose}{options})'
