"""The real thing, small: prepare, train on two ranks, evaluate, predict and report, each as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 4000
SMALL = ("--set", "train.batch_size=256", "--set", "train.log_every=2")
NOISE = ("Warning", "WARNING", "deprecated", "OMP_NUM_THREADS", "c10d", "elastic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config and the small data set it names, made by `tablemesh prepare`."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "quickstart.toml").write_text((ROOT / "configs/quickstart.toml").read_text())
    words = ("prepare", "synthetic:criteo", "data/quickstart", "--rows", str(ROWS), "--scale", "0.01", "--json")
    done = tablemesh(folder, *words)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["splits"]) >= {"train", "test"}
    return folder


def command(*words):
    return [sys.executable, "-m", "launch.cli", *words]


def tablemesh(folder, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*words), cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_train_eval_predict_report(folder):
    trained = tablemesh(folder, "train", "quickstart.toml", "--set", "tables.sharding=row_wise", *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1] == "report: runs/quickstart/report.html"
    assert "best possible" in trained.stdout
    noise = [line for line in (trained.stdout + trained.stderr).splitlines() if any(word in line for word in NOISE)]
    assert not noise
    run_dir = folder / "runs/quickstart"
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["status"], report["world_size"]) == ("finished", 2)
    assert (run_dir / "report.html").stat().st_size > 0

    # From another folder than the one that the config's relative data.path was meant for.
    again = tablemesh(folder / "data", "eval", "../runs/latest", "--split", "test", "--nproc", "1", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["auc"] == pytest.approx(report["eval"]["auc"], abs=1e-6)

    predicted = tablemesh(
        folder, "predict", "runs/latest", "data/quickstart", "out.parquet", "--split", "test", "--nproc", "1"
    )
    assert predicted.returncode == 0, predicted.stderr
    assert pq.read_metadata(folder / "out.parquet").num_rows == report["eval"]["rows"]

    shown = tablemesh(folder, "report", "runs/latest", "--json")
    assert json.loads(shown.stdout)["report_html"] == str(run_dir.resolve() / "report.html")


def test_a_killed_rank_ends_the_run_with_one_cause(folder):
    words = ("train", "quickstart.toml", "--name", "killed", "--set", "train.epochs=100000", *SMALL)
    words += ("--set", "checkpoint.every_steps=4")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command(*words), cwd=folder, env=env, text=True, **pipes)
    try:
        run_dir = folder / "runs/killed"
        deadline = time.monotonic() + 240
        while '"checkpoint"' not in text_of(run_dir / "metrics.jsonl"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        victims = ranks_of(run_dir)
        assert len(victims) == 2
        os.kill(victims[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
    finally:
        process.terminate()
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("error:")] == [errors.splitlines()[0]]
    assert "rank 1 was killed by SIGKILL" in errors
    _, story, way_on = errors.splitlines()
    assert "the whole story" in story and "`tablemesh train runs/killed --resume auto` goes on from step_" in way_on
    assert not ranks_of(run_dir)
    assert json.loads((run_dir / "report.json").read_text())["status"] == "failed"


def test_a_refused_resume_leaves_the_run_as_it_was(folder):
    """Neither its report, nor its config, nor its checkpoints: with the old words it goes on as if nothing had been."""
    one = ("--nproc", "1", "--set", "train.max_steps=6", "--set", "checkpoint.every_steps=2")
    done = tablemesh(folder, "train", "quickstart.toml", "--name", "whole", *one, *SMALL)
    assert done.returncode == 0, done.stderr
    run_dir = folder / "runs/whole"
    kept = ("config.toml", "report.json", "plan.json", "metrics.jsonl", "JOB.json")
    before = {name: (run_dir / name).read_text() for name in kept}
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())

    earlier = str(run_dir / "checkpoints/step_4")
    words = ("--nproc", "1", "--set", "train.max_steps=3", "--json")
    refused = tablemesh(folder, "train", "runs/whole", "--resume", earlier, *words)
    assert refused.returncode == 2 and "was taken after 4 steps, but the config asks for 3" in refused.stderr
    assert json.loads(refused.stdout)["status"] == "failed"
    assert {name: (run_dir / name).read_text() for name in kept} == before
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == checkpoints
    assert not list(run_dir.glob("errors/*.json"))
    page = (run_dir / "report.html").read_text()
    assert "was taken after" not in page and f"{json.loads(before['report.json'])['eval']['auc']:.4f}" in page


def text_of(path):
    return path.read_text() if path.exists() else ""


def ranks_of(run_dir):
    """Process ids of the run's living ranks, in rank order."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[1:4] == ["-m", "trainer", str(run_dir / "JOB.json")]:
                text = (entry / "environ").read_bytes().decode(errors="replace")
                env = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
                found[int(env["RANK"])] = int(entry.name)
        except (OSError, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]
