"""Table kinds beside each other: cells, budgets, resuming, and the page."""

import json

import pytest

from kernels.errors import UserError
from tests.trainer.test_tables import DATASET, config
from trainer import compare

FULL = 4 * 8 * (1000 + 900 + 52 + 24)


def test_every_cell_keeps_to_its_budget_and_has_a_name_of_its_own():
    asked = ["standard", "hashed", "compositional:op=add", "unified:lookups=2"]
    cells, refused = compare.plan_cells(config({"dim": 8}), DATASET, kinds=asked, budgets=[1.0, 0.5], seeds=2)
    assert {(c.kind, c.budget, c.seed) for c in cells} == {
        (kind, budget, seed) for kind in asked for budget in (1.0, 0.5) for seed in (1, 2)
    } - {("standard", 0.5, seed) for seed in (1, 2)}
    assert len({c.key for c in cells}) == len(cells)
    assert [(r["kind"], r["budget"]) for r in refused] == [("standard", 0.5)]
    assert "0.5" not in refused[0]["why"] and "standard" in refused[0]["why"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("hasht", ["hasht", "hashed"]), ("unified:two", ["'two'", "option=value"]), ("hashed:seds=2", ["seds", "seeds"])],
)
def test_a_kind_that_cannot_be_read_is_named(kind, words):
    with pytest.raises(UserError) as error:
        compare.plan_cells(config({"dim": 8}), DATASET, kinds=[kind], budgets=[0.5], seeds=1)
    assert all(word in str(error.value) for word in words), str(error.value)


def row(kind, budget, seed, auc):
    return {
        "kind": kind, "budget": budget, "seed": seed, "bytes": int(1000 * budget), "auc": auc, "logloss": 1 - auc,
        "train_samples_per_second": 1e5, "lookup_ms": 1.5, "split": "test",
    }  # fmt: skip


def test_finished_cells_are_read_back_and_the_page_stands_alone(tmp_path):
    cells, refused = compare.plan_cells(
        config({"dim": 8}), DATASET, kinds=["hashed", "standard"], budgets=[0.5], seeds=3
    )
    (tmp_path / "cells").mkdir()
    for cell, auc in zip(cells, (0.70, 0.72, 0.74), strict=True):
        (tmp_path / "cells" / f"{cell.key}.json").write_text(json.dumps(row("?", 0.0, 0, auc)))
    said = []
    rows = compare.run_cells(cells, tmp_path, processes=1, threads=1, progress=lambda *args: said.append(args))
    assert said == [(3, 3, "kept from before")]
    assert [(r["kind"], r["budget"], r["seed"]) for r in rows] == [("hashed", 0.5, seed) for seed in (1, 2, 3)]
    found = compare.result(config({"dim": 8}), DATASET, rows, refused, FULL)
    (entry,) = found["summary"]
    assert entry["auc"] == pytest.approx(0.72) and entry["auc_spread"] == pytest.approx(0.04)
    page = compare.write(tmp_path, found).read_text()
    assert "0.7200" in page and "below the smallest possible" in page and "http" not in page.split("</style>")[1]
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][0]["auc"] == 0.70
