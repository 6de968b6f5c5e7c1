"""Whether two runs' final checkpoints hold the same, for `tablemesh chaos`: bit for bit, or within a tolerance.

Another number of ranks lays the same state out in other tensors, so with a tolerance (never 0 there) the ranks' own are
left out, numbers of int8 are compared times their scales, and tables whose rows are given to ids are compared id by id.

Shapes: K ids with rows, U values of one tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sharding.table_state import SCALE
from sharding.update_counts import UPDATES
from trainer.checkpoint import by_id, scaled
from trainer.checkpoint.chain import Chain

# Of a row that is given to an id: which are the same for any number of ranks.  The order of free rows is not.
OF_AN_ID = ("clock", "uses", UPDATES)


@dataclass(frozen=True, kw_only=True)
class Found:
    """difference: the first one that is too much, in words.  largest: relative to the tensor's largest number."""

    identical: bool = False
    largest: float = 0.0
    difference: str | None = None


def compare(expected: Chain, found: Chain, *, tolerance: float) -> Found:
    """tolerance: relative to the largest number of each tensor; 0 for the same number of ranks, and bit for bit."""
    steps = [chain.manifest.position.step for chain in (expected, found)]
    if steps[0] != steps[1]:
        return Found(difference=f"the final checkpoints are of steps {steps[0]} and {steps[1]}")
    ours, theirs = (_names(chain, whole=not tolerance) for chain in (expected, found))
    if odd := sorted(ours ^ theirs):
        said = f"only one of the final checkpoints has the tensor {odd[0]}"
        if tolerance and ":" in odd[0]:
            said += (
                ": with another number of ranks the table is cut by other columns, each with states of its own; "
                'compare with --set tables.sharding=\'"row_wise"\' or "table_wise"'
            )
        return Found(difference=said)
    identical, largest = True, 0.0
    try:
        for name, a, b, labels in _pairs(expected, found, ours, whole=not tolerance):
            if a.shape == b.shape and torch.equal(_bits(a), _bits(b)):
                continue
            identical = False
            if a.shape != b.shape:
                return Found(largest=largest, difference=f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
            apart = (a.double() - b.double()).abs()
            scale = max(a.double().abs().max().item(), 1e-30)
            worst = apart.max().item()
            largest = max(largest, worst / scale)
            allowed = tolerance if a.is_floating_point() else 0.0  # counts and clocks are alike in any world size
            if not allowed or not worst <= allowed * scale:  # NaN is too much, too
                return Found(largest=largest, difference=_said(name, a, b, apart, labels))
    except _Ids as other:
        return Found(largest=largest, difference=str(other))
    return Found(identical=identical, largest=largest)


class _Ids(Exception):
    """Other ids have rows."""


def _names(chain: Chain, *, whole: bool) -> set[str]:
    if whole:
        return set(chain.tensors)
    tables = {entry.table for entry in chain.tensors.values() if entry.table and by_id.stored(chain, entry.table)}
    named = {name for name, entry in chain.tensors.items() if entry.table not in tables and not _of_a_rank(name)}
    return named | {f"tables/{table}/ids" for table in tables}


def _of_a_rank(name: str) -> bool:
    return name.startswith("ranks/") or name.rpartition("/")[2].partition(":")[0] == SCALE


def _pairs(
    expected: Chain, found: Chain, names: set[str], *, whole: bool
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, its values in both, whose each row is where that is no row number)"""
    for name in sorted(names):
        if whole or name in expected.tensors:
            read = Chain.read if whole else scaled.values
            yield name, read(expected, name), read(found, name), None
            continue
        table = name.removeprefix("tables/").removesuffix("/ids")
        (ids_K, ours), (others_K, theirs) = (_by_id(chain, table) for chain in (expected, found))
        if not torch.equal(ids_K, others_K):
            first, second = set(ids_K.tolist()), set(others_K.tolist())
            odd = min(first ^ second)
            which = "undisturbed" if odd in first else "disturbed"
            raise _Ids(f"table {table!r}: id {odd} has a row only in the {which} run ({len(first ^ second)} such ids)")
        for what in ours:
            yield f"tables/{table} ({what}, by id)", ours[what], theirs[what], ids_K


def _by_id(chain: Chain, table: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(K,) the ids that have rows, ascending, and what their rows hold."""
    ids, values = [], {}
    for base in by_id.stored(chain, table):
        live_K = by_id.live_rows(chain, base)
        ids.append(chain.read(f"{base}/id")[live_K])
        for name in sorted(n for n in chain.tensors if n.rpartition("/")[0] == base):
            what = name.rpartition("/")[2]
            if what in OF_AN_ID or what not in by_id.NOT_STATES:
                values.setdefault(what, []).append(scaled.values(chain, name)[live_K])
    ids_K, order_K = torch.cat(ids).sort()
    return ids_K, {what: torch.cat(parts)[order_K] for what, parts in values.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _said(name: str, a: Tensor, b: Tensor, apart: Tensor, labels: Tensor | None) -> str:
    """The largest difference, and how many numbers differ."""
    worst = apart.nan_to_num(nan=torch.inf)
    at = tuple(int(i) for i in torch.nonzero(worst == worst.max())[0])
    where = ", ".join(str(i) for i in (at if labels is None else (f"id {int(labels[at[0]])}", *at[1:])))
    count = int((worst > 0).sum())
    return (
        f"{name}[{where}]: {a[at].item():.9g} undisturbed, {b[at].item():.9g} disturbed; "
        f"{count} of {a.numel()} numbers differ"
    )
