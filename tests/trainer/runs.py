"""Small whole runs for the tests of checkpoints: data, config, training that ends or is stopped after a step."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trainer import config as configs
from trainer.checkpoint import restore
from trainer.checkpoint import session as sessions
from trainer.checkpoint.chain import open_chain
from trainer.trainer import train
from trainer.world import World

ROWS = 900
FEATURES = {"a": 40, "b": 64, "c": 50, "d": 120}


def write_data(folder: Path) -> Path:
    """One label, two dense columns, three single-hot features and a multi-hot one; files that nobody prepared."""
    rng = np.random.default_rng(3)
    for split, rows in (("train", ROWS), ("test", 97)):
        columns = {
            "click": (rng.random(rows) < 0.3).astype(np.float32),
            "x0": rng.normal(size=rows).astype(np.float32),
            "x1": rng.normal(size=rows).astype(np.float32),
            "d": pa.array([rng.integers(0, 120, rng.integers(0, 4)) for _ in range(rows)], type=pa.list_(pa.int32())),
            **{name: (rng.random(rows) ** 2 * size).astype(np.int32) for name, size in list(FEATURES.items())[:3]},
        }
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / split / "part.parquet", row_group_size=101)
    return folder


def write_config(data: Path, run_dir: Path, /, **sections: dict) -> Path:
    """A run folder with a config of 28 steps; `sections` change it, None takes a key away."""
    values = {
        "name": "t",
        "data": {
            "path": str(data),
            "streams": 4,
            "shuffle_window": 32,
            "features": {"labels": ["click"], "dense": ["x0", "x1"], "categorical": FEATURES},
        },
        "tables": {
            "dim": 8,
            "override": [{"match": "b", "sharding": "row_wise"}, {"match": "c", "sharding": "data_parallel"}],
        },
        "model": {"kind": "dlrm", "bottom": [8, 8], "top": [16, 1]},
        "optim": {"sparse": {"kind": "rowwise_adagrad", "lr": 0.2}, "dense": {"kind": "adam", "lr": 0.01}},
        "train": {"batch_size": 64, "max_steps": 28, "log_every": 4},
        "checkpoint": {"every_steps": 10},
    }
    for section, changes in sections.items():
        values[section] = {k: v for k, v in (values.get(section, {}) | changes).items() if v is not None}
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(configs.validate(configs.Config, values, where="test").to_toml())
    return run_dir


def run(run_dir: Path, *, resume: str | None = None, stop_after: int | None = None) -> dict | str:
    """Train in the ranks that are up; the report, or what a stop said.

    stop_after: the last rank sends itself SIGTERM after this step, and all must save after the same one.
    """
    world = World.from_env()
    after_step = sessions.Session.after_step

    def signalled(self, progress):
        if progress.step == stop_after and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self, progress)

    sessions.Session.after_step = signalled
    try:
        return train(configs.load(run_dir / "config.toml"), run_dir, world, resume=resume)
    except sessions.Stopped as stopped:
        return str(stopped)
    finally:
        sessions.Session.after_step = after_step


def losses(run_dir: Path) -> dict[int, float]:
    """step -> logged loss, the last one written for each step."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {e["step"]: e["loss"] for e in events if e["event"] == "train"}


def run_as_text(run_dir: Path) -> str:
    return (run_dir / "metrics.jsonl").read_text()


def tensors(run_dir: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint (the newest one) but the ranks' own."""
    place = restore.place_of(run_dir, None)
    chain = restore.newest(place) if name is None else open_chain(place, name)
    return {n: chain.read(n) for n in chain.tensors if not n.startswith("ranks/")}
