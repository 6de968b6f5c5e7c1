"""How unevenly the ids of a table fall on its rows, from the few figures that dataset.json has.

    skew = Skew.of(rows=1_000_000, top_share={"1": 0.02, "1000": 0.3}, distinct=400_000, ordered=True)
    skew.covered(2048)        share of all ids that the 2,048 most frequent rows take: what a cache of them would hit
    skew.distinct(65_536)     expected number of different rows among 65,536 ids

Between two known points the share grows with the logarithm of the number of rows, as by a Zipf law of exponent 1;
without figures ids fall evenly on all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

KNOTS_PER_DECADE = 4


@dataclass(frozen=True, eq=False)
class Skew:
    """knots: numbers of rows, the most frequent first, from 0 up; shares: of all ids that those rows take, 0 .. 1.

    ordered: rows stand in the order of their frequency (a vocabulary's do), so the first part of a row-wise table has
    the frequent ones; otherwise they stand in no order and parts of equal size get equal shares.
    """

    rows: int
    knots: np.ndarray
    shares: np.ndarray
    ordered: bool = False

    @classmethod
    def of(
        cls,
        *,
        rows: int,
        top_share: Mapping[str, float] | None = None,
        distinct: int | None = None,
        ordered: bool = False,
    ) -> "Skew":
        seen = max(1, min(rows, distinct or rows))
        known = sorted((int(k), float(s)) for k, s in (top_share or {}).items() if 0 < int(k) < seen)
        points = [(0, 0.0), *known, (seen, 1.0)]
        knots, shares = [0.0], [0.0]
        for (a, share_a), (b, share_b) in zip(points, points[1:], strict=False):
            if a == 0 or not known:
                inner = np.array([float(b)])
                at = np.array([1.0])
            else:
                count = max(1, round(KNOTS_PER_DECADE * np.log10(b / a)))
                inner = np.geomspace(a, b, count + 1)[1:]
                at = np.log(inner / a) / np.log(b / a)
            knots.extend(inner)
            shares.extend(share_a + (max(share_b, share_a) - share_a) * at)
        return cls(rows, np.array(knots), np.minimum.accumulate(np.array(shares)[::-1])[::-1], ordered)

    def covered(self, rows: float | np.ndarray) -> np.ndarray:
        """The share of ids that the `rows` most frequent rows take."""
        return np.interp(rows, self.knots, self.shares)

    def distinct(self, ids: float) -> float:
        """Expected number of different rows among `ids` drawn independently."""
        return float(self._distinct_in_segments(ids).sum())

    def parts(self, parts: int, ids: float) -> tuple[np.ndarray, np.ndarray]:
        """(share of ids, different rows) of each of `parts` blocks of ceil(rows / parts) rows, for `ids` ids in all.

        10 rows in 4 parts are blocks of 3 3 3 1.
        """
        block = -(-self.rows // parts)
        ends = np.minimum(np.arange(parts + 1) * block, self.rows)
        if not self.ordered:
            sizes = np.diff(ends) / self.rows
            return sizes, self.distinct(ids) * sizes
        cumulated = np.concatenate([[0.0], np.cumsum(self._distinct_in_segments(ids))])
        return np.diff(self.covered(ends)), np.diff(np.interp(ends, self.knots, cumulated))

    def _distinct_in_segments(self, ids: float) -> np.ndarray:
        rows, mass = np.diff(self.knots), np.diff(self.shares)
        each = mass / np.maximum(rows, 1e-12)
        return rows * -np.expm1(ids * np.log1p(-np.minimum(each, 1 - 1e-12)))
