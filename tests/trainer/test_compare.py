"""Table kinds beside each other: cells, budgets, resuming, and the page."""

import json
import tomllib
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from kernels.errors import UserError
from sharding.compute_kernel import kernels_of
from sharding.embeddings import build_embeddings
from sharding.parallelize import parallelize
from sharding.plan import make_plan
from tests.models import CPU
from tests.ranks import run_ranks
from tests.trainer.test_tables import DATASET, config
from tests.trainer.test_trainer import data, make_config  # noqa: F401  (data is a fixture)
from trainer import compare
from trainer import config as configs
from trainer.data.dataset import Categorical
from trainer.data.parquet import open_dataset
from trainer.models.base import init_dense
from trainer.optim import sgd
from trainer.tables import resolve

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


def test_a_row_type_is_asked_for_like_an_option():
    asked = ["standard:row_type=int8", "unified:lookups=2:row_type=bf16"]
    cells, refused = compare.plan_cells(config({"dim": 8}), DATASET, kinds=asked, budgets=[0.4], seeds=1)
    assert not refused
    assert [t["row_type"] for t in tomllib.loads(cells[0].config)["tables"]["override"]] == ["int8"] * 4
    assert {t["row_type"] for t in tomllib.loads(cells[1].config)["tables"]["override"]} == {"bf16"}


BIG = DATASET.model_copy(
    update={"categorical": tuple(Categorical(name=f"f{i}", cardinality=3000 + i) for i in range(3))}
)
ASKED = ["hashed", "compositional", "unified:lookups=2", "collisionless", "hashed:row_type=int8", "mixed_dim"]
ADMITTING = ["collisionless:admit_after=2", "collisionless:admit_after=2:evict=lfu:expire_steps=9"]


def held(asked, budgets):
    """(kind, budget, bytes that the memory of its tables has) of every cell that can be."""
    base = config({"dim": 8})
    cells, refused = compare.plan_cells(base, BIG, kinds=asked, budgets=budgets, seeds=1)
    found = []
    for cell in cells:
        resolved = resolve(configs.validate(configs.Config, tomllib.loads(cell.config), where=cell.kind), BIG)
        task = nn.Module()
        task.embeddings = build_embeddings(tables=resolved.tables, features=resolved.features)
        plan = make_plan(task, world_size=1, local_world_size=1, device=CPU, batch_size=4)
        optim = sgd.table(sgd.Config(lr=1.0))
        parallelize(task, plan, device=CPU, seed=1, init_dense=init_dense, kernel="cpu", optimizer=optim)
        size = sum(kernel.bags.state.bytes() for kernel in kernels_of(task)) + map_bytes(task)
        size += sum(p.numel() * p.element_size() for p in task.embeddings.combine.parameters())
        found.append((cell.kind, cell.budget, size))
    return found, [(r["kind"], r["budget"]) for r in refused]


def map_bytes(task) -> int:
    """Of the id maps and filters of the tables that have them, filled up to their limits."""
    collection, size = task.embeddings.ebc_by_id, 0
    for given in (given for kernel in (collection.kernels if collection else ()) for given in kernel.rows):
        for clock in range(1, given.by_id.policy.admit_after + 1):
            given.map.admit(torch.arange(given.map.limit), clock=clock)
        store = given.map._store
        assert given.map.size > 0.99 * given.map.limit
        size += sum(array.nbytes for array in (store.slots, store.filter, store.free, store.uses))
    return size


def test_the_memory_that_tables_have_is_at_most_a_twentieth_above_the_budget():
    budgets = [0.5, 0.25]
    ((found, refused),) = run_ranks(held, 1, ASKED, budgets)
    assert len(found) + len(refused) == len(ASKED) * len(budgets) and len(refused) <= 1, refused
    full = 4 * 8 * sum(c.cardinality for c in BIG.categorical)
    shares = {(kind, budget): size / (budget * full) for kind, budget, size in found}
    assert all(0.9 < share <= 1.05 for share in shares.values()), shares


def test_filters_are_in_the_budget_or_the_cell_is_refused_with_its_reason():
    ((found, refused),) = run_ranks(held, 1, ADMITTING, [1.0, 0.25])
    full = 4 * 8 * sum(c.cardinality for c in BIG.categorical)
    shares = {(kind, budget): size / (budget * full) for kind, budget, size in found}
    assert all(share <= 1.05 for share in shares.values()), shares
    assert all(share > 0.5 for share in shares.values()), shares  # a filter grows in steps of 32 KiB
    assert {kind for kind, budget in refused} == set(ADMITTING) and all(budget == 0.25 for _, budget in refused)
    cells, why = compare.plan_cells(config({"dim": 8}), BIG, kinds=ADMITTING[:1], budgets=[1.0, 0.25], seeds=1)
    (table, *_) = tomllib.loads(cells[0].config)["tables"]["override"]
    assert table["options"]["window"] == 4 * table["options"]["rows"]
    assert "rows, id map and filter of 256 ids" in why[0]["why"] and "'f0'" in why[0]["why"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("standard:row_type=int4", ["int4", "int8"]),
        ("hasht", ["hasht", "hashed"]),
        ("unified:two", ["'two'", "option=value"]),
        ("hashed:seds=2", ["--kinds 'hashed:seds=2'", "'seds'", "'seeds'", "combine, hash"]),
        ("standard:lookups=2", ["'lookups'", "it has none"]),
        ("unified:lookups=0", ["lookups = 0"]),
        ("mixed_dim:alpha=wide", ["alpha = 'wide'"]),
        ("hashed:rows=50", ["--kinds 'hashed:rows=50'", "a budget is what chooses rows"]),
        ("collisionless:evict=fifo", ["evict = 'fifo'", "lru"]),
    ],
)
def test_a_kind_that_cannot_be_read_is_named(kind, words):
    with pytest.raises(UserError) as error:  # also where others are right, and other budgets
        compare.plan_cells(config({"dim": 8}), DATASET, kinds=["hashed", kind], budgets=[1.0, 0.5], seeds=1)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_a_cell_would_stumble_over_is_left_out_before_any_is_trained():
    """Ids of 64 bits, of which a table with a row for each of so many cannot have any."""
    wide = DATASET.model_copy(
        update={
            "categorical": tuple(
                c.model_copy(update={"ids": "hash64", "cardinality": 3000}) for c in DATASET.categorical
            )
        }
    )
    base = config({"dim": 8, "override": [{"match": "*", "kind": "collisionless"}]})
    base = base.model_copy(update={"data": base.data.model_copy(update={"id_policy": "error"})})
    cells, refused = compare.plan_cells(base, wide, kinds=["collisionless", "hashed"], budgets=[1.0], seeds=1)
    assert [c.kind for c in cells] == ["collisionless"]
    assert [r["kind"] for r in refused] == ["hashed"] and 'id_policy = "hash"' in refused[0]["why"]


def row(kind, budget, seed, auc):
    return {
        "kind": kind, "budget": budget, "seed": seed, "bytes": int(1000 * budget), "auc": auc, "logloss": 1 - auc,
        "train_samples_per_second": 1e5, "lookup_ms": 1.5, "split": "test",
    }  # fmt: skip


def trained(run_dir, kinds, budgets):
    asked = configs.load(run_dir / "config.toml")
    dataset = open_dataset(asked.data.path, asked.data.features)
    cells, refused = compare.plan_cells(asked, dataset, kinds=kinds, budgets=budgets, seeds=1)
    rows = [compare.run_cell(c) | {"kind": c.kind, "budget": c.budget, "seed": c.seed} for c in cells]
    return compare.result(asked, dataset, rows, refused, compare.full_bytes(asked, dataset))


def test_cells_are_trained_and_measured(data, tmp_path):  # noqa: F811
    """On features of one and of several ids a row, and two labels."""
    make_config(data, tmp_path / "run", train={"epochs": 1}, tables={"override": []})
    (found,) = run_ranks(trained, 1, tmp_path / "run", ["unified:lookups=2", "compositional"], [1.0, 0.5])
    assert [(r["kind"], r["budget"]) for r in found["rows"]] == [
        (kind, budget) for kind in ("unified:lookups=2", "compositional") for budget in (1.0, 0.5)
    ]
    for row in found["rows"]:
        assert 0 < row["bytes"] <= 1.05 * row["budget"] * found["full_bytes"] and row["rows_used"] > 0, row
        assert row["steps"] > compare.WARM_UP and row["split"] == "test" and 0.4 < row["auc"] < 1 and row["logloss"] > 0
        assert row["train_samples_per_second"] > 0 and row["lookup_ms"] > 0, row
    page = compare.write(tmp_path, found).read_text()
    assert page.count("<svg") == 4 and all(f"{entry['auc']:.4f}" in page for entry in found["summary"])


def test_cells_come_seed_by_seed():
    cells, _ = compare.plan_cells(config({"dim": 8}), DATASET, kinds=["hashed", "unified"], budgets=[1.0, 0.5], seeds=2)
    assert [cell.seed for cell in cells] == [1] * 4 + [2] * 4


def test_long_kinds_are_cut_after_colons():
    lines = compare.kind_lines("collisionless:admit_after=10:evict=lfu")
    assert lines == ["collisionless:", "admit_after=10:", "evict=lfu"]
    assert compare.kind_lines("unified:lookups=2") == ["unified:lookups=2"]


def test_finished_cells_are_read_back_and_the_page_stands_alone(tmp_path):
    cells, refused = compare.plan_cells(
        config({"dim": 8}), DATASET, kinds=["hashed", "standard"], budgets=[0.5], seeds=3
    )
    (tmp_path / "cells").mkdir()
    for cell, auc in zip(cells, (0.70, 0.72, 0.74), strict=True):
        (tmp_path / "cells" / f"{cell.key}.json").write_text(
            json.dumps(row("?", 0.0, 0, auc) | {"processes": 1, "threads": 1})
        )
    said = []
    rows = compare.run_cells(cells, tmp_path, processes=1, threads=1, progress=lambda *args: said.append(args))
    assert said == [(3, 3, "kept from before")]
    beside = {"processes": 2, "threads": 1}
    assert compare._read(tmp_path / "cells", cells[0], beside) is None, "its speeds are of one process"
    assert [(r["kind"], r["budget"], r["seed"]) for r in rows] == [("hashed", 0.5, seed) for seed in (1, 2, 3)]
    found = compare.result(config({"dim": 8}), DATASET, rows, refused, FULL)
    (entry,) = found["summary"]
    assert entry["auc"] == pytest.approx(0.72) and entry["auc_spread"] == pytest.approx(0.04)
    assert entry["auc_range"] == [0.70, 0.74] and entry["train_samples_per_second_spread"] == 0
    page = compare.write(tmp_path, found).read_text()
    drawn = ElementTree.fromstring((tmp_path / "compare.svg").read_text())
    assert [e.text for e in drawn.iter() if e.get("class") == "title"] == ["AUC", "Log loss"]
    assert len([e for e in drawn.iter() if e.get("class") == "span s1"]) == 2
    assert "0.7200" in page and "below the smallest possible" in page and "http" not in page.split("</style>")[1]
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][0]["auc"] == 0.70
