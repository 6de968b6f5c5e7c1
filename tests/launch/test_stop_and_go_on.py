"""Stopped by a signal and continued, as a scheduler would: by the command and its exit code alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_chaos import CONFIG, command
from trainer.checkpoint import tools

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = CONFIG.replace("rows = 2000", "rows = 12000").replace("every_steps = 4", "every_minutes = 0.005")
LONG = LONG.replace("eval = { every = 5 }", "").replace("batch_size = 128,", "batch_size = 128, log_every = 10,")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The config, its data, and the run that nobody stopped: runs/whole."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "tiny.toml").write_text(LONG)
    done = command(folder, "launch.cli", "train", "tiny.toml", "--nproc", "1", "--set", "name=whole", "--json")
    assert done.returncode == 0, done.stderr
    return folder


def events(run_dir):
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_signals_save_and_the_same_command_goes_on(folder):
    words = [sys.executable, "-m", "launch.cli", "train", "tiny.toml", "--nproc", "1", "--set", "name=cut"]
    words += ["--resume", "auto", "--module", "tests.launch.slow_rank", "--json"]
    run_dir = folder / "runs/cut"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    stopped = 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        seen = len(events(run_dir))
        with subprocess.Popen(
            words, cwd=folder, env=env | {"SLOW": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as ran:
            give_up = time.monotonic() + 400
            while not any(e["event"] == "train" for e in events(run_dir)[seen:]):
                assert ran.poll() is None and time.monotonic() < give_up, ran.communicate()
                time.sleep(0.02)
            ran.send_signal(number)
            _, told = ran.communicate(timeout=400)
        assert ran.returncode == 75 and "stopped after a checkpoint" in told, told
        report = json.loads((run_dir / "report.json").read_text())
        assert report["status"] == "interrupted" and "stopped by SIG" in report["error"]["message"]
        assert tools.verify(str(run_dir))["ok"]
        assert stopped < (stopped := report["steps"]) == tools.ls(str(run_dir))["checkpoints"][-1]["step"]

    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["resumed"]["step"] == stopped < found["steps"] == 75 and found["samples_seen"] == 9600
    assert tools.diff(str(folder / "runs/whole"), str(run_dir))["same"]


def test_it_saves_by_the_clock(folder):
    saved = [e for e in events(folder / "runs/whole") if e["event"] == "checkpoint"]
    assert len(saved) > 1 and all(e["background"] for e in saved[:-1]), "every 0.3 s, and at the end"
