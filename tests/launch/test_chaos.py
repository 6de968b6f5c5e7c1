"""Ranks killed with SIGKILL in real runs, of two ranks and of one; the long soak is in docs/failures.md."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch import chaos
from launch.chaos import Worlds
from trainer.faults import Fault, Strike, due_of

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


def test_options_that_make_no_sense_together():
    same, other = Worlds.parse("2", 2), Worlds.parse("2->1", 2)
    config = type("C", (), {"check_world_size": lambda self, size: None})()
    for options, words in (
        ({"during": "lunch"}, "--during lunch: it can be data, step, eval, save"),
        ({"rank": 2}, "--rank 2: there are the ranks 0 to 1"),
        ({"each": 3}, "--each 3: is for --soak N"),
        ({"kills": 3, "kill_at": 4, "rank": 0}, "leave --kill-at and --rank out"),
        ({"kills": 3, "each": 2, "signal": "TERM"}, "--each 2: with --signal TERM a run is struck once"),
        ({"kills": 3, "each": 2, "worlds": other}, "--each 2: with another --world a run is struck once"),
    ):
        with pytest.raises(UserError, match=words):
            chaos.check_options(config, **{"worlds": same, "signal": "KILL"} | options)
    chaos.check_options(config, other, signal="KILL", kills=3, each=1)


def test_a_fault_counts_once_it_is_delivered(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((note.exists(), number)))
    fault, note = Fault(step=3, phase="save", rank=0, signal="KILL"), tmp_path / "fault_0"
    strike = Strike(fault, note)
    for phase, step in (("save", 2), ("data", 3)):
        strike.on_mark(phase, step)
    assert not sent and not list(tmp_path.iterdir())
    strike.on_mark("save", 4)
    strike.on_mark("save", 8)
    assert sent == [(True, 9)] and note.read_text() == "save 4\n" and not due_of(note).exists()

    monkeypatch.setattr(threading, "Timer", lambda seconds, call, args: threading.Thread(target=time.sleep, args=(0,)))
    late = Strike(replace(fault, delay_ms=3.6e6), tmp_path / "fault_1")
    late.on_mark("save", 4)
    assert not (tmp_path / "fault_1").exists() and due_of(tmp_path / "fault_1").read_text() == "save 4\n"
    kill = {"signal": "KILL", "delay_ms": 3.6e6, "struck": None, "due": "save 4"}
    said = chaos.why_not_struck(chaos.Outcome(kills=[kill], run_dir=tmp_path), 3, "save")
    assert "ended before the KILL that was due 3600000 ms into save of step 4" in said
    said = chaos.why_not_struck(chaos.Outcome(kills=[kill | {"due": None}], run_dir=tmp_path), 3, "save")
    assert "the run had no save at or after this step" in said


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
