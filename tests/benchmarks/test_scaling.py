"""The simulated step beside published throughputs, and where its two fitted constants come from."""

import json

import pytest

from benchmarks import scaling
from benchmarks.scaling import ROW_SECONDS, ROWS, TOLERANCE, seconds_of
from sharding.topology import parse


def test_every_row_is_within_a_fifth_and_most_are_held_out(capsys):
    assert scaling.main(json=True) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["name"] for r in rows] == [r.name for r in ROWS] and TOLERANCE == 0.2
    assert all(abs(r["ratio"] - 1) <= TOLERANCE for r in rows)
    assert sum(not row.fitted for row in ROWS) > sum(row.fitted for row in ROWS) == 2


def test_the_fitted_constants_are_those_of_the_fitted_rows():
    """Two rows whose steps the host bounds, two constants: seconds = launch + rows of a rank * row."""
    small, large = (row for row in ROWS if row.fitted)
    assert all(row.step().bound_by == "host" for row in (small, large))
    rank_rows = [row.batch_size / row.topology().world_size for row in (small, large)]
    per_row = (seconds_of(large) - seconds_of(small)) / (rank_rows[1] - rank_rows[0])
    launch = seconds_of(small) - rank_rows[0] * per_row
    assert per_row == pytest.approx(ROW_SECONDS, rel=0.01)
    assert launch == pytest.approx(parse("a100-40gb").launch_seconds, rel=0.01)
