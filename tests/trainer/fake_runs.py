"""Run folders as the trainer leaves them, made up: for the tests of the report."""

import json
import math
from pathlib import Path
from typing import Any

CARDINALITIES = (1460, 583, 100_000, 90_000, 305, 24, 12_517, 633, 3, 93_145, 5_683, 95_000, 3_194)
CARDINALITIES = CARDINALITIES + (27, 14_992, 98_000, 10, 5_652, 2_173, 4, 97_000, 18, 15, 28_618, 105, 14_257)
SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel", "table_row_wise")


def write(run_dir: Path, *, report: dict, events: list[dict], plan: dict | None = None, config: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "report.json").write_text(json.dumps(report))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    if plan is not None:
        (run_dir / "plan.json").write_text(json.dumps(plan))
    if config:
        (run_dir / "config.toml").write_text(config)
    return run_dir


def plan(tables: int = 26, world_size: int = 2, name: str = "C{}") -> dict[str, Any]:
    made = []
    for t in range(tables):
        rows, sharding = CARDINALITIES[t % 26], SHARDINGS[0]
        if rows > 50_000:
            sharding = "row_wise"
        elif t % 9 == 8:
            sharding = "data_parallel"
        elif t % 11 == 10:
            sharding = "column_wise"
        made.append(_table(name.format(t + 1), rows, sharding, first_rank=t % world_size, world_size=world_size))
    ranks = []
    for rank in range(world_size):
        held = sum(s["bytes"] for t in made for s in t["shards"] if s["rank"] == rank)
        ranks.append(
            {
                "rank": rank,
                "device": "cpu",
                "table_bytes": held,
                "optimizer_bytes": held // 16,
                "id_map_bytes": 100_000 * rank,
                "filter_bytes": 524_288 * rank,
            }
        )
    words = "large tables by rows over all ranks, the others whole, largest first to the emptiest rank"
    return {"world_size": world_size, "planner": words, "ranks": ranks, "tables": made}


def _table(name: str, rows: int, sharding: str, *, first_rank: int, world_size: int) -> dict[str, Any]:
    dim = 16
    if sharding == "row_wise":
        cut = math.ceil(rows / world_size)
        parts = [(r, [r * cut, min(rows, (r + 1) * cut)], [0, dim]) for r in range(world_size)]
    elif sharding == "column_wise" and world_size > 1:
        parts = [(r, [0, rows], [r * dim // 2, (r + 1) * dim // 2]) for r in range(2)]
    elif sharding == "data_parallel":
        parts = [(r, [0, rows], [0, dim]) for r in range(world_size)]
    else:
        parts = [(first_rank, [0, rows], [0, dim])]
    shards = [
        {"rank": r, "rows": rows_, "cols": cols, "bytes": 4 * (rows_[1] - rows_[0]) * (cols[1] - cols[0])}
        for r, rows_, cols in parts
    ]
    return {
        "name": name,
        "rows": rows,
        "dim": dim,
        "features": [name],
        "kind": "standard",
        "sharding": sharding,
        "bytes": 4 * rows * dim,
        "optimizer_bytes": 4 * rows,
        "shards": shards,
    }


def events(steps: int = 147, *, every: int = 5, bayes: dict | None = None, world_size: int = 2) -> list[dict]:
    """A run that learns towards AUC 0.795, with an evaluation every 60 steps and at the end."""
    found: list[dict] = [
        {"event": "start", "time": 1e9, "run": "quickstart", "world_size": world_size, "device": "cpu",
         "steps_total": 147, "steps_per_epoch": 147, "epochs": 1, "batch_size": 4096, "train_rows": 600_000,
         "tables": 26, "table_bytes": 38_000_000, "bayes": bayes},
        {"event": "phase", "time": 1e9, "name": "training"},
    ]  # fmt: skip
    for step in range(every, steps + 1, every):
        wobble = math.sin(step * 1.7) + math.sin(step * 0.61)
        gained = 1 - math.exp(-step / 30)
        found.append(
            {"event": "train", "time": 1e9 + step / 10, "epoch": 0, "step": step, "samples": step * 4096,
             "loss": 0.69 - 0.19 * gained + 0.003 * wobble, "ne": 1.15 - 0.32 * gained + 0.005 * wobble,
             "auc": 0.5 + 0.292 * gained + 0.004 * wobble, "calibration": 1.0, "lr_factor": 1.0,
             "samples_per_second": 81_000 + 2_500 * wobble - (9_000 if step < 12 else 0),
             "step_ms_p50": 50.5 - 1.5 * wobble, "data_wait_ms": 0.3 + 0.1 * abs(wobble), "memory_bytes": 6e8}
        )  # fmt: skip
        if step % 60 == 0:
            gained = 1 - math.exp(-step / 26)
            found.append(
                {"event": "eval", "time": 1e9 + step / 10, "step": step, "split": "valid", "auc": 0.5 + 0.2905 * gained,
                 "auc_error_bound": 1e-5, "ne": 1.15 - 0.32 * gained, "logloss": 0.7 - 0.19 * gained,
                 "calibration": 1.0, "rows": 75_000, "seconds": 0.4, "final": False}
            )  # fmt: skip
    return found


def features(tables: int = 26, name: str = "C{}") -> list[dict[str, Any]]:
    found = []
    for t in range(tables):
        rows, top = CARDINALITIES[t % 26], 1 / (1 + math.log(CARDINALITIES[t % 26]))
        multi_hot = t % 7 == 3
        shares = {n: min(1.0, top * (1 + math.log(int(n)))) for n in ("1", "10", "100", "1000")}
        stats = {"rows": 600_000, "ids": 1_900_000 if multi_hot else 588_000, "distinct": int(rows * 0.93),
                 "distinct_is_estimate": rows > 50_000, "top_share": shares, "missing": 600 * (t % 5),
                 "max_per_bag": 12 if multi_hot else 1, "unseen": 37 * t}  # fmt: skip
        found.append(
            {"name": name.format(t + 1), "cardinality": rows, "multi_hot": multi_hot, "ids": "vocab", "stats": stats}
        )
    return found


def tables(name: str = "C{}") -> list[dict[str, Any]]:
    """One table as it is, one in two parts, one whose rows are given to ids."""

    def table(number: int, **changes: Any) -> dict[str, Any]:
        called = name.format(number)
        made = {"name": called, "kind": "standard", "options": {}, "row_type": "fp32", "rows": 10_000, "dim": 16,
                "pooling": "sum", "features": [called], "physical": [called], "physical_rows": 10_000,
                "sharding": ["row_wise"], "tier": ["device"], "bytes": 640_000, "optimizer_bytes": 40_000,
                "id_map_bytes": 0, "filter_bytes": 0, "dense_bytes": 0, "standard_bytes": 640_000,
                "optimizer": "rowwise_adagrad", "ids_per_bag": {called: 1.0}, "of_standard": 1.0}  # fmt: skip
        return made | changes

    parts = [f"{name.format(2)}#0", f"{name.format(2)}#1"]
    given = {"limit": 10_000, "ids": 7_000, "rows": 7_100, "occurrences": 600_000, "defaulted": 60_000,
             "admitted": 7_200, "expired": 200, "evicted": 0}  # fmt: skip
    return [
        table(1, balance={name.format(1): 1.62}),
        table(2, kind="compositional", options={"op": "mult", "sizes": [100, 100]}, physical=parts, physical_rows=200,
              bytes=12_800, optimizer_bytes=800, of_standard=0.02, sharding=["table_wise"], pooling="mean"),
        table(3, kind="collisionless", options={"admit_after": 10}, physical_rows=10_256, bytes=656_384,
              id_map_bytes=204_096, filter_bytes=1_048_576, of_standard=2.983, id_map=given,
              ids_per_bag={name.format(3): 2.5}),
    ]  # fmt: skip


def calibration_bins(tilt: float = 1.0) -> list[dict[str, float]]:
    return [
        {"predicted": p, "actual": min(1.0, p**tilt), "weight": 3750.0}
        for p in (0.01 + (i / 21) ** 2 for i in range(20))
    ]


def report(**changes: Any) -> dict[str, Any]:
    """report.json of a finished quickstart; `changes` replace its keys."""
    figures = {"auc": 0.7914, "auc_error_bound": 1.7e-5, "ne": 0.8312, "logloss": 0.4731, "calibration": 0.9962,
               "rows": 75_000, "calibration_bins": calibration_bins(1.03)}  # fmt: skip
    made = {
        "name": "quickstart", "status": "finished", "error": None, "started": 1.0e9, "finished": 1.0e9 + 31.4,
        "samples_seen": 600_000, "steps": 147, "world_size": 2, "device": "cpu",
        "train": {"seconds": 7.42, "samples_per_second": 80_863.0, "step_ms": {"p50": 50.1, "p90": 53.9, "p99": 71.3},
                  "phases_ms": {"data_wait": 0.31, "forward": 19.2, "backward": 24.8, "optimizer": 3.1, "other": 2.6}},
        "eval": {"split": "test", **figures, "seconds": 0.61, "tasks": {"click": figures}},
        "bayes": {"auc": 0.7956, "logloss": 0.4702, "sample_auc": 0.7949, "sample_logloss": 0.4711},
        "memory": {"peak_bytes": 698_000_000, "per_rank": [698_000_000, 688_000_000],
                   "tables_per_rank": [21_000_000, 20_000_000]},
        "foretold": [{"name": "step, median", "unit": "ms", "predicted": 42.7, "measured": 50.1, "ratio": 0.852},
                     {"name": "tables and their optimizer state, fullest rank", "unit": "bytes",
                      "predicted": 21_000_000, "measured": 21_000_000, "ratio": 1.0}],
        "tables": tables(), "id_maps": {t["name"]: t["id_map"] for t in tables() if "id_map" in t},
        "kernels": {"embedding_bag": {"backend": "fbgemm", "why": "float32 on cpu"}},
        "versions": {"python": "3.11.9", "tablemesh": "0.1.0", "torch": "2.13.0", "torchrec": "1.8.0"},
        "hardware": {"cpu": "Example CPU @ 2.0 GHz", "cores": 2, "memory_bytes": 16 * 2**30, "gpus": [],
                     "system": "Linux"},
        "config_sha256": "4f0c9a" * 10 + "beef", "data_fingerprint": "91d7e2" * 6,
        "dataset": {"name": "quickstart", "source": "planted Criteo-like data, 600,000 rows, seed 1",
                    "splits": {"train": 600_000, "valid": 75_000, "test": 75_000}, "features": features(),
                    "dense": [{"name": f"I{i}", "missing": 30 * i, "mean": i / 7, "std": 1.0 + i / 13,
                               "transform": {"log1p": True, "mean": 1.62, "std": 0.9}} for i in range(1, 14)]},
    }  # fmt: skip
    return made | changes


CONFIG = """name = "quickstart"
seed = 1

[data]
path = "data/quickstart"
prepare = "synthetic:criteo"

[model]
kind = "dlrm"
bottom = [64, 32, 16]
top = [128, 64, 1]

[train]
batch_size = 4096
nproc = 2
"""


def finished(run_dir: Path) -> Path:
    found = report()
    log = events(bayes=found["bayes"])
    log += [
        {"event": "eval", "time": 1e9 + 16, "step": 147, "split": "test", "final": True, **found["eval"]},
        {
            "event": "checkpoint",
            "time": 1e9 + 17,
            "step": 147,
            "path": "checkpoints/step_147",
            "seconds": 0.42,
            "bytes": 4e7,
        },
        {
            "event": "message",
            "time": 1e9,
            "level": "info",
            "text": "kernels: fbgemm for embedding_bag (float32 on cpu)",
        },
        {
            "event": "message",
            "time": 1e9,
            "level": "warning",
            "text": "37 ids of table C3 lay outside its rows and were clipped",
        },
        {"event": "end", "time": 1e9 + 18, "status": "finished", "seconds": 31.4},
    ]
    return write(run_dir, report=found, events=log, plan=plan(), config=CONFIG)


def failed(run_dir: Path) -> Path:
    message = (
        "step 62: the loss is NaN; feature C3 of rank 1 first had it\nlower optim.dense.lr or set optim.clip_grad_norm"
    )
    broken = report(status="failed", error={"rank": 1, "kind": "nan", "message": message}, eval=None, steps=62)
    broken["train"] = {"seconds": None, "samples_per_second": None, "step_ms": {}, "phases_ms": {}}
    write(run_dir, report=broken, events=events(62), plan=plan(), config=CONFIG)
    (run_dir / "errors").mkdir(exist_ok=True)
    for rank, kind in ((0, "peer"), (1, "nan")):
        text = message if kind == "nan" else "rank 1 is gone"
        body = {"rank": rank, "time": 1e9, "kind": kind, "message": text, "traceback": "Traceback ...\n  File x"}
        (run_dir / "errors" / f"rank_{rank}.json").write_text(json.dumps(body))
    return run_dir


def multi_task(run_dir: Path) -> Path:
    figures = report()["eval"]
    tasks = {
        task: {**figures, "auc": 0.79 - i / 30, "calibration_bins": calibration_bins(1 + i / 9)}
        for i, task in enumerate(("click", "like", "buy"))
    }
    tasks["buy"] |= {"auc": None, "auc_error_bound": None, "ne": None}
    made = report(eval={**figures, "tasks": tasks}, bayes=None)
    return write(run_dir, report=made, events=events(), plan=plan(), config=CONFIG)


def large(run_dir: Path, *, tables: int = 500, world_size: int = 8, name: str = "") -> Path:
    name = name or "advertiser_campaign_creative_landing_page_domain_cross_user_geography_bucket_{}"
    made = report(world_size=world_size, name="a-very-long-run-name." * 6 + "end")
    made["dataset"]["features"] = features(tables, name)
    return write(
        run_dir, report=made, events=events(20_000, every=20, bayes=made["bayes"]), plan=plan(tables, world_size, name),
        config=CONFIG,
    )  # fmt: skip
