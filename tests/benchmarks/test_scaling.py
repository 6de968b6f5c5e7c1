"""The simulated step beside published throughputs, and where its two fitted constants come from."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import scaling, scaling_curves
from benchmarks.scaling import ROW_SECONDS, ROWS, TOLERANCE, seconds_of
from sharding.topology import parse


def test_every_row_is_within_a_fifth_and_most_are_held_out(capsys):
    assert scaling.main(json=True) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["name"] for r in rows] == [r.name for r in ROWS] and TOLERANCE == 0.2
    assert all(abs(r["ratio"] - 1) <= TOLERANCE for r in rows)
    assert sum(not row.fitted for row in ROWS) > sum(row.fitted for row in ROWS) == 2
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    for row in rows:  # the figures shown are those of this program
        assert f"| {row['baseline']:,.0f} | {row['ours']:,.0f} | {row['ratio']:.2f} |" in page, row["name"]


def test_the_fitted_constants_are_those_of_the_fitted_rows():
    """Two rows whose steps the host bounds, two constants: seconds = launch + rows of a rank * row."""
    small, large = (row for row in ROWS if row.fitted)
    assert all(row.step().bound_by == "host" for row in (small, large))
    rank_rows = [row.batch_size / row.topology().world_size for row in (small, large)]
    per_row = (seconds_of(large) - seconds_of(small)) / (rank_rows[1] - rank_rows[0])
    launch = seconds_of(small) - rank_rows[0] * per_row
    assert per_row == pytest.approx(ROW_SECONDS, rel=0.01)
    assert launch == pytest.approx(parse("a100-40gb").launch_seconds, rel=0.01)


def test_curves_of_weak_and_strong_scaling():
    found = scaling_curves.curves(hosts=(4, 8))
    weak, strong, *_ = found
    assert [p.batch_size for p in weak.points] == [67_584, 135_168] and {p.batch_size for p in strong.points} == {
        135_168
    }
    assert weak.points[1].samples_per_second == strong.points[1].samples_per_second
    assert all(c.points[0].efficiency == 1.0 >= c.points[1].efficiency > 0 for c in found)
    drawn = ElementTree.fromstring(scaling_curves.svg(found))
    assert sum(e.tag.endswith("polyline") for e in drawn.iter()) == 1 + len(found)
