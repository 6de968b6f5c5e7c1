"""Whole runs in real ranks: train, evaluate, predict."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from kernels.errors import UserError
from tests.ranks import run_ranks
from trainer import config as configs
from trainer.checkpoint.place import Place
from trainer.data.parquet import open_dataset
from trainer.trainer import build, evaluate_run, predict_run, train
from trainer.world import World

ROWS = {"train": 1500, "valid": 333, "test": 401}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Parquet files that nobody prepared: two labels, dense columns, single- and multi-hot ids, weights."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    effect = {f"c{i}": rng.normal(size=40 * (i + 1)) for i in range(3)}
    for split, rows in ROWS.items():
        ids = {name: rng.integers(0, len(values), rows) for name, values in effect.items()}
        bags = [rng.integers(0, 30, rng.integers(0, 4)) for _ in range(rows)]
        dense = rng.normal(size=(2, rows))
        score = 2 * sum(effect[name][ids[name]] for name in effect) + dense[0]
        chance = 1 / (1 + np.exp(-score))
        columns = {
            "click": (rng.random(rows) < chance).astype(np.float32),
            "buy": (rng.random(rows) < chance / 2).astype(np.int8),
            "x0": dense[0].astype(np.float32),
            "x1": dense[1],
            "tags": pa.array(bags, type=pa.list_(pa.int32())),
            "w": rng.choice([0.5, 1.0, 2.0], rows),
            **{name: values.astype(np.int32) for name, values in ids.items()},
        }
        (folder / split).mkdir()
        pq.write_table(pa.table(columns), folder / split / "part.parquet", row_group_size=97)
    return folder


def make_config(data, run_dir, **sections):
    values = {
        "name": "t",
        "data": {
            "path": str(data),
            "streams": 4,
            "shuffle_window": 64,
            "features": {
                "labels": ["click", "buy"],
                "dense": ["x0", "x1"],
                "categorical": {"c0": 40, "c1": 80, "tags": 30, "c2": 120},
                "weight": "w",
            },
        },
        "tables": {"dim": 8, "override": [{"match": "c2", "sharding": "row_wise"}]},
        "model": {"kind": "dlrm", "bottom": [16, 8], "top": [32, 2]},
        "optim": {
            "sparse": {"kind": "rowwise_adagrad", "lr": 0.2},
            "dense": {"kind": "adam", "lr": 0.01},
            "schedule": {"warmup_steps": 5},
            "clip_grad_norm": 10.0,
        },
        "train": {"batch_size": 64, "epochs": 2, "log_every": 10},
        "eval": {"every": 15},
        "checkpoint": {"every_steps": 20},
    }
    for section, changes in sections.items():
        values[section] = {k: v for k, v in (values[section] | changes).items() if v is not None}
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(configs.validate(configs.Config, values, where="test").to_toml())


def run(run_dir):
    return train(configs.load(run_dir / "config.toml"), run_dir, World.from_env())


def run_eval(run_dir, split):
    return evaluate_run(configs.load(run_dir / "config.toml"), run_dir, World.from_env(), dataset=None, split=split)


def run_predict(run_dir, data, out):
    config = configs.load(run_dir / "config.toml")
    return predict_run(config, run_dir, World.from_env(), dataset=str(data), split="test", out=out)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    make_config(data, run_dir)
    return run_dir, run_ranks(run, 2, run_dir)


def test_the_run_folder(trained):
    run_dir, reports = trained
    report = json.loads((run_dir / "report.json").read_text())
    assert report["status"] == "finished" and report["error"] is None
    assert report["steps"] == 48 and report["samples_seen"] == 2 * ROWS["train"] and report["world_size"] == 2
    assert report["eval"]["split"] == "test" and report["eval"]["rows"] == ROWS["test"]
    assert set(report["eval"]["tasks"]) == {"click", "buy"}
    assert report["eval"]["auc"] > 0.75
    assert report["bayes"] is None
    assert len(report["memory"]["per_rank"]) == 2 and report["memory"]["peak_bytes"] > 0
    assert report["train"]["step_ms"]["p50"] <= report["train"]["step_ms"]["p99"]
    assert set(report["train"]["phases_ms"]) == {"data_wait", "forward", "backward", "optimizer", "other"}
    assert report["kernels"]["embedding_bag"]["backend"] == "cpu"
    assert [r["eval"]["auc"] for r in reports] == [report["eval"]["auc"]] * 2
    assert "<html" in (run_dir / "report.html").read_text()
    plan = json.loads((run_dir / "plan.json").read_text())
    assert {t["name"] for t in plan["tables"]} == {"c0", "c1", "c2", "tags"}
    assert next(t for t in plan["tables"] if t["name"] == "c2")["sharding"] == "row_wise"
    assert report["memory"]["tables_per_rank"] == pytest.approx(plan["predicted"]["table_and_state_bytes"], rel=0.05)
    step, tables, peak = report["foretold"]
    assert step["measured"] == report["train"]["step_ms"]["p50"] and step["predicted"] == plan["predicted"]["step_ms"]
    assert tables["measured"] == max(report["memory"]["tables_per_rank"]) and 0.95 < tables["ratio"] < 1.05
    assert peak["measured"] == report["memory"]["peak_bytes"]
    assert "estimates" in step["note"] and not tables["note"] and peak["note"].startswith("not counted")


def test_the_events(trained):
    run_dir, _ = trained
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    by_kind = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    assert by_kind["start"][0]["steps_total"] == 48
    assert [e["step"] for e in by_kind["train"]] == [10, 20, 30, 40, 48]
    assert [(e["step"], e["split"], e["final"]) for e in by_kind["eval"]] == [
        (15, "valid", False),
        (30, "valid", False),
        (45, "valid", False),
        (48, "test", True),
    ]
    assert by_kind["eval"][0]["rows"] == ROWS["valid"]
    assert [e["step"] for e in by_kind["checkpoint"]] == [20, 40, 48]
    assert events[-1]["event"] == "end" and events[-1]["status"] == "finished"
    assert Place(run_dir / "checkpoints").names() == ["step_40", "step_48"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_eval_on_any_world_size_is_the_runs_own(trained, world_size):
    run_dir, reports = trained
    for figures in run_ranks(run_eval, world_size, run_dir, None):
        assert figures["split"] == "test" and figures["rows"] == ROWS["test"]
        assert figures["auc"] == pytest.approx(reports[0]["eval"]["auc"], abs=1e-6)
        assert figures["logloss"] == pytest.approx(reports[0]["eval"]["logloss"], abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_predictions_stand_in_file_order_and_have_the_evals_figures(trained, data, tmp_path, world_size):
    run_dir, reports = trained
    out = tmp_path / "predictions.parquet"
    results = run_ranks(run_predict, world_size, run_dir, data, out)
    assert results[0]["rows"] == ROWS["test"]
    found = pq.read_table(out)
    source = pq.read_table(data / "test" / "part.parquet")
    assert found.column_names == ["row", "click", "prediction_click", "buy", "prediction_buy"]
    assert found["row"].to_pylist() == list(range(ROWS["test"]))
    assert found["click"].to_pylist() == source["click"].to_pylist()
    weights = source["w"].to_numpy()
    for task in ("click", "buy"):
        labels, scores = found[task].to_numpy(), found[f"prediction_{task}"].to_numpy()
        figures = reports[0]["eval"]["tasks"][task]
        auc = roc_auc_score(labels, scores, sample_weight=weights)
        assert auc == pytest.approx(figures["auc"], abs=figures["auc_error_bound"] + 1e-6)
        assert log_loss(labels, scores, sample_weight=weights) == pytest.approx(figures["logloss"], abs=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.parquet"]


def test_the_losses_do_not_depend_on_the_number_of_ranks(data, tmp_path):
    """fp32 and SGD: after 48 steps every logged loss is that of one rank, up to the order of float additions."""
    sgd = {"sparse": {"kind": "sgd", "lr": 0.5}, "dense": {"kind": "sgd", "lr": 0.05}}
    losses = {}
    for world_size, pipeline in ((1, "plain"), (1, "overlapped"), (2, "overlapped"), (4, "overlapped")):
        run_dir = tmp_path / f"{world_size}{pipeline}"
        train = {"pipeline": pipeline}
        make_config(data, run_dir, optim=sgd, train=train, eval={"max_rows": 100})
        run_ranks(run, world_size, run_dir)
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [e["rows"] for e in events if e["event"] == "eval"] == [128, 128, 128, ROWS["test"]]
        losses[world_size, pipeline] = [e["loss"] for e in events if e["event"] == "train"] + [
            e["logloss"] for e in events if e["event"] == "eval"
        ]
    first = losses.pop((1, "plain"))
    assert len(first) == 9
    for key, values in losses.items():
        assert values == pytest.approx(first, abs=1e-5), key


def test_one_task_weight_for_each_label(data, tmp_path):
    make_config(data, tmp_path, train={"task_weights": [1.0, 2.0, 3.0]})
    config = configs.load(tmp_path / "config.toml")
    with pytest.raises(UserError, match=r"task_weights = .* has 3 values, but .* 2 labels \(click, buy\)"):
        build(config, open_dataset(data, config.data.features), data, World.from_env())
