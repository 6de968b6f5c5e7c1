"""Slurm for real: two nodes on this machine (tests/launch/slurm_cluster.py), trained on. `make test-slurm`.

Marked "cluster": minutes, root and Debian's slurm packages, so not among what `make test` runs.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.launch import slurm_cluster, small

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART_SECONDS = 900.0  # for a run on a loaded machine; on two idle cores 20 s
RUN = """
[checkpoint]
every_steps = 20
[run]
timeout_seconds = 60
grace_seconds = 30
"""


@pytest.fixture(scope="module")
def cluster():
    why = slurm_cluster.missing()
    if why:
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="tm") as folder:  # short: munge's socket is in it
        made = slurm_cluster.Cluster(Path(folder) / "slurm")
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "small"


@pytest.fixture
def command(cluster, tmp_path):
    return small.command(tmp_path, cluster.env)


def write(tmp_path, data, name, epochs=1):
    return small.write(tmp_path, name=name, data=data, rows=60_000, batch=512, epochs=epochs, log_every=5, more=RUN)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Losses, AUC and last state of the same training with two ranks on this machine, no Slurm."""
    folder = tmp_path_factory.mktemp("alone")
    report = small.train_here(write(folder, data, "alone", epochs=2))
    return small.losses(folder / "runs/alone"), report["eval"]["auc"], small.state(folder / "runs/alone")


def check_equal(run, undisturbed):
    wanted, auc, state = undisturbed
    assert small.losses(run) == pytest.approx(wanted, rel=1e-6)
    assert json.loads((run / "report.json").read_text())["eval"]["auc"] == pytest.approx(auc, abs=1e-6)
    found = small.state(run)
    assert found.keys() == state.keys() and len(state) > 20
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def submit(command, tmp_path, data, name, *words):
    path = write(tmp_path, data, name, epochs=2)
    told = command("submit", path, "--on", "slurm", "--nodes", "2", "--nproc", "1", "--cpus", "1", *words)
    assert isinstance(told, dict), told
    return told["handle"], Path(told["run_dir"])


def test_two_nodes_train_to_the_result_of_one(command, cluster, tmp_path, data, undisturbed):
    handle, run = submit(command, tmp_path, data, "two", "--preflight")
    found = small.until(command, handle, small.ended, "the end")
    assert found["state"] == "succeeded", command("logs", handle, text=True)
    check_equal(run, undisturbed)
    preflight = json.loads((run / "preflight.json").read_text())
    assert preflight["ok"] and len(preflight["ranks"]) == 2 and len(preflight["links_gbit_s"]) == 2
    assert "run 0 ended with exit code 0" in command("logs", handle, text=True)
    assert command("status", run)["handle"] == handle


def test_the_quickstart_on_two_nodes_ends_with_the_auc_of_one_host(command, cluster, tmp_path):
    config = tmp_path / "quickstart.toml"
    shutil.copy(ROOT / "configs/quickstart.toml", config)
    wanted = small.train_here(config, "--set", "name=alone", seconds=QUICKSTART_SECONDS)
    told = command("submit", config, "--on", "slurm", "--nodes", "2", "--nproc", "1", "--cpus", "1")
    assert isinstance(told, dict), told
    found = small.until(command, told["handle"], small.ended, "the end", seconds=QUICKSTART_SECONDS)
    assert found["state"] == "succeeded", command("logs", told["handle"], text=True)
    report = json.loads((Path(told["run_dir"]) / "report.json").read_text())
    assert report["world_size"] == 2 and report["eval"]["rows"] == wanted["eval"]["rows"] > 0
    assert report["eval"]["auc"] == pytest.approx(wanted["eval"]["auc"], abs=1e-6)
    assert abs(report["eval"]["auc"] - report["bayes"]["auc"]) <= 0.01


def test_cancel(command, cluster, tmp_path, data):
    handle, _ = submit(command, tmp_path, data, "cancelled", "--set", "train.epochs=200")
    small.until(command, handle, lambda found: found["progress"]["step"], "a step")
    assert command("cancel", handle)["state"] == "cancelled"
    assert "CANCELLED" in command("status", handle)["detail"]
    assert not cluster.call("squeue", "--noheader").stdout.strip()


def test_a_signal_before_the_time_limit_saves_and_queues_again(command, cluster, tmp_path, data, undisturbed):
    handle, run = submit(command, tmp_path, data, "requeued")
    small.until(command, handle, lambda found: (found["progress"]["step"] or 0) >= 30, "step 30")
    cluster.call("scancel", "--signal=USR1", handle.rsplit("/", 1)[1])
    found = small.until(command, handle, small.ended, "the end")
    said = command("logs", handle, text=True)
    assert found["state"] == "succeeded", said
    assert "run 0 ended with exit code 75" in said and "run 1 ended with exit code 0" in said
    check_equal(run, undisturbed)


def test_a_time_limit_saves_and_queues_again(command, cluster, tmp_path, data):
    """Slurm's own signal this time: 120 s before the limit of 4 minutes, and up to a minute earlier, as it pleases."""
    handle, run = submit(command, tmp_path, data, "limited", "--time", "4m", "--set", "train.epochs=1000")
    log = run / f"logs/slurm-{handle.rsplit('/', 1)[1]}.log"
    deadline = time.monotonic() + small.SECONDS
    while "run 0 ended with exit code" not in (said := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, said
        time.sleep(0.5)
    assert "run 0 ended with exit code 75" in said
    saved = max((int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")), default=0)
    small.until(command, handle, lambda found: (found["progress"]["step"] or 0) > saved + 20, "the run going on")
    assert command("cancel", handle)["state"] == "cancelled"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert steps == sorted(steps) and len(set(steps)) == len(steps), "no step twice: it went on from where it had saved"


def test_a_killed_worker_starts_all_again(command, cluster, tmp_path, data, undisturbed):
    handle, run = submit(command, tmp_path, data, "killed")
    small.until(command, handle, lambda found: (found["progress"]["step"] or 0) >= 30, "step 30")
    (victim,) = [
        pid
        for pid in slurm_cluster._processes_with("RANK=1", f"SLURM_CONF={cluster.folder}")
        if b"trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(victim, signal.SIGKILL)
    found = small.until(command, handle, small.ended, "the end")
    said = command("logs", handle, text=True)
    assert found["state"] == "succeeded", said
    assert "rank 1 was killed by SIGKILL" in said and "starting again from the newest checkpoint" in said
    check_equal(run, undisturbed)


def test_a_killed_node_brings_the_job_back(command, cluster, tmp_path, data, undisturbed):
    handle, run = submit(command, tmp_path, data, "lost")
    small.until(command, handle, lambda found: (found["progress"]["step"] or 0) >= 30, "step 30")
    node = slurm_cluster.NODES[1]
    cluster.kill_node(node)
    deadline = time.monotonic() + 90
    while not cluster.states()[node].startswith("down"):
        assert time.monotonic() < deadline, cluster.states()
        time.sleep(0.5)
    cluster.start_node(node)
    found = small.until(command, handle, small.ended, "the end")
    assert found["state"] == "succeeded", command("logs", handle, text=True)
    check_equal(run, undisturbed)


def test_bad_input_leaves_no_job(command, cluster, tmp_path, data):
    path = write(tmp_path, data, "bad")
    for words, said in (
        (("--option", "partition=nowhere"), "invalid partition"),
        (("--cpus", "64"), "sinfo"),
    ):
        told = command("submit", path, "--on", "slurm", *words)
        assert isinstance(told, str) and said in told and "error: " in told, (words, told)
    assert not cluster.call("squeue", "--noheader").stdout.strip()
    assert not list((tmp_path / "runs").iterdir()), "neither a run folder nor a link to it"
    assert "knows no job" in command("status", "slurm://tablemesh/999999")
