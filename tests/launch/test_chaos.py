"""Ranks killed with SIGKILL in real runs, of two ranks and of one; the long soak is in docs/failures.md."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch import chaos
from launch.chaos import Worlds

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = """
name = "tiny"
train = { batch_size = 128, nproc = 2 }
tables = { dim = 4, sharding = "row_wise" }
model = { kind = "dlrm", bottom = [16, 4], top = [16, 1] }
optim = { sparse = { kind = "rowwise_adagrad", lr = 0.05 }, dense = { kind = "adam", lr = 0.002 } }
checkpoint = { every_steps = 4 }
eval = { every = 5 }

[data]
path = "data"
prepare = "synthetic:criteo"
prepare_options = { rows = 2000, seed = 1, scale = 0.002 }
streams = 4
shuffle_window = 64
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


def command(folder, module, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", module, *words]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_two_kills_of_two_ranks_lose_nothing(folder):
    done = command(folder, "launch.cli", "chaos", "tiny.toml", "--soak", "2", "--each", "2", "--seed", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["identical"] and found["kills"] == 2 and found["restarts"] == 2
    assert found["rows"] == 1600 and found["first_difference"] is None
    assert not Path(found["disturbed"][0]["run_dir"]).exists(), "runs that agree are removed"


def test_one_rank_is_killed_in_a_save(folder):
    words = ("--kill-at", "3", "--during", "save", "--world", "1", "--json")
    done = command(folder, "launch.cli", "chaos", "tiny.toml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] and found["disturbed"][0]["kills"][0]["struck"] == "save 4"


def test_a_clock_that_jumps_changes_nothing(folder):
    words = ("tiny.toml", "--module", "tests.launch.jumping_clock", "--nproc", "1", "--set", "train.max_steps=5")
    done = command(folder, "launch.cli", "train", *words, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "finished" and 0 < report["train"]["seconds"] < 3600


def test_worlds():
    assert Worlds.parse(None, 2) == Worlds(before=2, after=2)
    assert Worlds.parse("4", 2) == Worlds(before=4, after=4)
    assert Worlds.parse("2->1", 2) == Worlds(before=2, after=1) and Worlds.parse("2->1", 2).change
    for text in ("2->", "a", "0->1", "2-1"):
        with pytest.raises(UserError, match="write 2->1"):
            Worlds.parse(text, 2)


def test_signals_that_are_none(tmp_path):
    with pytest.raises(UserError, match="--signal NAP: it can be KILL"):
        chaos.Chaos(None, Worlds.parse("1", 1), None, None, signal="NAP")


def test_drawn_points_lie_ahead_of_each_other(tmp_path):
    trial = object.__new__(chaos.Chaos)
    trial.steps, trial.worlds, trial.signal = 12, Worlds(before=2, after=2), "KILL"
    trial._events = [{"event": "eval", "seconds": 0.1}]
    trial.report = {"train": {"step_ms": {"p50": 5.0}}}
    trial.config = type("C", (), {"eval": type("E", (), {"every": 5}), "checkpoint": type("S", (), {"every_steps": 4})})
    for seed in range(50):
        faults = trial.draw(6, random.Random(seed))
        at = [trial._strikes_at(fault) for fault in faults]
        assert faults and at == sorted(set(at)) and at[-1] <= 12
