"""How often the rows of a table were updated, out of a checkpoint of a run with checkpoint.count_updates.

Read in pieces of LAZY_BYTES: no table has to fit into memory.

Shapes: E rows of a piece, V different counts.
"""

from typing import Any

import torch
from torch import Tensor

from sharding.update_counts import UPDATES
from trainer.checkpoint import by_id
from trainer.checkpoint.chain import Chain, steps
from trainer.checkpoint.manifest import COUNTED_SINCE

TOP = 10  # rows that are listed
QUANTILES = (50, 90, 99)  # percent
HOW = "set checkpoint.count_updates = true (4 bytes a row), and go on or train anew"


def figures(chain: Chain, base: str) -> dict[str, Any] | None:
    """base: tables/TABLE, or tables/TABLE/parts:P0-P1 of rows given to ids, of which those with an id count.

    None where the run did not count.  since: the step from which it did; total: sum over the rows; p50, p90, p99: half
    of the rows, ..., have at most so many; histogram: [{"from", "to", "rows"}], from 0 and in powers of two;
    most_updated: [{"row" or "id", "updates"}], the first TOP.
    """
    name = f"{base}/{UPDATES}"
    if name not in chain.tensors:
        return None
    given = by_id.PARTS_OF in base
    live_K = by_id.live_rows(chain, base) if given else None
    values_V, rows_V = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    top: list[tuple[int, int]] = []  # (-count, row)
    for first, end in steps(chain.tensors[name]):
        row_E = torch.arange(first, end) if live_K is None else live_K[(live_K >= first) & (live_K < end)]
        counts_E = chain.read(name, rows=(first, end))[row_E - first].long()
        found_V, of_each_V = counts_E.unique(return_counts=True)
        values_V, rows_V = _merged(torch.cat([values_V, found_V]), torch.cat([rows_V, of_each_V]))
        best = (counts_E * 2**32 - row_E).topk(min(TOP, len(row_E))).indices
        top = sorted(top + [(-int(counts_E[i]), int(row_E[i])) for i in best])[:TOP]
    names = chain.read(f"{base}/id")[torch.tensor([row for _, row in top], dtype=torch.int64)] if given else None
    rows = int(rows_V.sum())
    return {
        "since": chain.manifest.values.get(COUNTED_SINCE, 0),
        "total": int((values_V * rows_V).sum()),
        **{f"p{q}": _quantile(values_V, rows_V, q) for q in QUANTILES},
        "most": -top[0][0] if top else 0,
        "never": int(rows_V[values_V == 0].sum()),
        "rows": rows,
        "histogram": _histogram(values_V, rows_V),
        "most_updated": [
            {"row": row, "updates": -count} if names is None else {"id": int(names[i]), "updates": -count}
            for i, (count, row) in enumerate(top)
            if count
        ],
    }


def _merged(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Different values, ascending, and the sum of the rows of each."""
    values_V, at = values.unique(return_inverse=True)
    return values_V, torch.zeros(len(values_V), dtype=torch.int64).index_add_(0, at, rows)


def _quantile(values_V: Tensor, rows_V: Tensor, percent: int) -> int:
    """The least count that at least this share of the rows do not exceed; 0 without rows."""
    if not len(values_V):
        return 0
    below_V = rows_V.cumsum(0)
    return int(values_V[int((100 * below_V < percent * below_V[-1]).sum())])


def _histogram(values_V: Tensor, rows_V: Tensor) -> list[dict[str, int]]:
    """Counts 0 | 1 | 2-3 | 4-7 | ... as far as there are any."""
    found, low, high = [], 0, 0
    while len(values_V) and low <= int(values_V[-1]):
        inside_V = (values_V >= low) & (values_V <= high)
        found.append({"from": low, "to": high, "rows": int(rows_V[inside_V].sum())})
        low, high = high + 1, 2 * high + 1
    return found
