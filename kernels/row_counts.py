"""In how many steps each row of some tables was updated.

    counter = RowCounter(rows=(100, 40), features=(0, 0, 1), device=device)
    counter.add(ids_N, ends)         the look-up of a step: every row in it counts once, however often it stands there
    counter.counts[0]                (100,) int32 of the first table

A count stops at MOST.  On a CPU the loop is compiled (kernels/_row_counts.py); elsewhere it is `add_once`, its twin in
plain torch, which needs no sorting and no answer from the device.

Shapes: N ids of all features, F features, R rows of all tables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import threads

MOST = 2**31 - 1
COUNT_BYTES = 4  # of a row
NANOSECONDS = 8  # of an id, about: it is seen twice, and its count is seldom in a cache


class RowCounter:
    """rows: of each table.  features: the table of each feature, None where its rows are not counted; the features of
    a table stand side by side."""

    def __init__(self, *, rows: Sequence[int], features: Sequence[int | None], device: torch.device) -> None:
        self.flat = torch.zeros(sum(rows), dtype=torch.int32, device=device)
        self.counts = list(self.flat.split(list(rows)))
        starts = [sum(rows[:t]) for t in range(len(rows))]
        self._starts = torch.tensor([-1 if t is None else starts[t] for t in features], dtype=torch.int64)
        self._rows = torch.tensor([0 if t is None else rows[t] for t in features], dtype=torch.int64)
        changes = [f for f in range(1, len(features)) if features[f] is None or features[f] != features[f - 1]]
        self._cuts = [0, *changes, len(features)]  # a thread takes whole tables

    def add(self, ids_N: Tensor, ends: Sequence[int]) -> None:
        """ids_N: those of feature f are ids_N[ends[f] : ends[f + 1]]."""
        if self.flat.device.type != "cpu":
            counted = [f for f, start in enumerate(self._starts.tolist()) if start >= 0]
            found = [ids_N[ends[f] : ends[f + 1]].long() + self._starts[f].item() for f in counted]
            add_once(self.flat, torch.cat(found) if found else ids_N[:0].long())
            return
        from kernels._row_counts import count

        arrays = [t.numpy() for t in (self.flat, ids_N.contiguous(), self._starts, self._rows)]
        ends_F = torch.tensor(ends, dtype=torch.int64).numpy()
        threads.run(lambda first, end: count(*arrays, ends_F, first, end), self._shares(ends))

    def _shares(self, ends: Sequence[int]) -> list[tuple[int, int]]:
        """Ranges of features with about as many ids for each thread."""
        cuts, last = [], 0
        for _, end in threads.shares(ends[-1], work=NANOSECONDS * ends[-1]):
            cut = next((c for c in self._cuts if c > last and ends[c] >= end), self._cuts[-1])
            if cut > last:
                cuts.append((last, cut))
            last = max(last, cut)
        return cuts or [(0, self._cuts[-1])]


def add_once(counts_R: Tensor, rows_N: Tensor) -> None:
    """One more for every row that stands in rows_N: those that stand there twice are written twice, the same number.

    counts [0, 5, 2], rows [1, 1, 2] -> [0, 6, 3]
    """
    counts_R.index_copy_(0, rows_N, counts_R.index_select(0, rows_N).clamp_(max=MOST - 1).add_(1))
