"""Several nodes: the roll call, one job of two nodes on this machine, the preflight's verdicts, CPUs near a GPU."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from kernels.errors import UserError
from launch import attempts, gpu, preflight, roll_call, rundir
from launch import node as nodes_module
from tests.launch import ports

ROOT = Path(__file__).resolve().parent.parent.parent


def meet(ranks, *, count, seconds=60.0, gpus=0, own=roll_call.facts):
    """What each of these nodes gets: Nodes, or the exception."""
    port, found = ports.free_port(), {}

    def one(rank):
        try:
            found[rank] = roll_call.Nodes.meet(
                rank=rank,
                count=count,
                head="127.0.0.1",
                port=port,
                run_id="a",
                wait=timedelta(seconds=seconds),
                gpus=gpus,
                own=lambda: own() | {"rank": rank},
            )
        except (roll_call.Missing, UserError) as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_nodes_come_and_tell_how_they_ended():
    nodes, heard = meet([0, 1, 2], count=3), []
    told = {}
    others = [threading.Thread(target=lambda r=r: told.update({r: end(nodes[r], r)})) for r in (1, 2)]

    def end(node, code):
        heard.append(node.ready(0))
        assert node.gather(0, code) is None
        return node.verdict(0, default="9")

    for thread in others:
        thread.start()
    port = nodes[0].ready(0)
    assert nodes[0].gather(0, 0) == [0, 1, 2]
    nodes[0].tell(0, "again")
    for thread in others:
        thread.join()
    assert told == {1: "again", 2: "again"} and heard == [port, port]
    TCPStore("localhost", port, wait_for_workers=False).set("a rank", "can come")
    assert nodes[0].ready(1) not in (0, port)


def test_a_node_that_does_not_come_is_named():
    found = meet([0, 2], count=3, seconds=2, own=lambda: {"host": "h", "versions": {}})  # which takes no time
    for rank in (0, 2):
        assert isinstance(found[rank], roll_call.Missing)
        assert "node 1 of 3 did not come within 2 s" in str(found[rank])


def test_other_versions_are_named():
    def own():
        return {"host": "h", "versions": {"torch": f"2.{threading.get_ident()}"}}

    found = meet([0, 1], count=2, own=own)
    assert all(isinstance(error, UserError) and "torch is 2." in str(error) for error in found.values())


@pytest.mark.parametrize("count", [1, 2])
def test_nodes_without_the_gpus_that_are_asked_for_are_named(count):
    def own():
        return {"host": "h", "versions": {}, "gpus": 1}

    ranks = list(range(count))
    assert all(isinstance(found, roll_call.Nodes) for found in meet(ranks, count=count, gpus=1, own=own).values())
    for error in meet(ranks, count=count, gpus=2, own=own).values():
        said = [line for line in str(error).splitlines() if line.startswith("node ")]
        assert isinstance(error, UserError) and len(said) == count
        assert said[-1] == f"node {count - 1} (h): torch sees 1 GPUs, and the job asks for 2 on each node"


def start_nodes(tmp_path, *words, env=None):
    """Two nodes of two fake ranks on this machine; returns the processes."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text((ROOT / "configs/quickstart.toml").read_text())
    data = tmp_path / "data/quickstart"
    data.mkdir(parents=True)
    (data / "dataset.json").write_text("{}")
    (run_dir / "JOB.json").write_text(json.dumps({"action": "train", "run_dir": str(run_dir)}))
    port = str(ports.free_port())
    common = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HEAD": "127.0.0.1"} | (env or {})
    return run_dir, [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "launch.node", "--nodes", "2", "--node-rank", "$NODE", "--head", "HEAD"),
                *("--port", port, "--run-id", "x", "--nproc", "2", "--module", "tests.launch.fake_rank"),
                *("--job", str(run_dir / "JOB.json"), "--grace", "5", *words),
            ],
            cwd=tmp_path,
            env=common | {"NODE": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]


def test_two_nodes_number_their_ranks_in_order(tmp_path):
    run_dir, nodes = start_nodes(tmp_path)
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    found = [json.loads((run_dir / f"rank_{rank}.env").read_text()) for rank in range(4)]
    assert [env["WORLD_SIZE"] for env in found] == ["4"] * 4
    assert [env["NODE"] for env in found] == ["0", "0", "1", "1"]


def test_a_users_error_ends_both_nodes_at_once(tmp_path):
    run_dir, nodes = start_nodes(tmp_path, "--restarts", "3", env={"FAKE": "user"})
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    assert "error: table t7: id 9 is outside its 8 rows" in said[0] and "starting again" not in said[0]
    assert json.loads((run_dir / "report.json").read_text())["error"]["kind"] == "user"


@pytest.mark.parametrize(("stops", "code"), [(0, 75), (attempts.STOPS - 1, 2)])
def test_a_signal_before_the_time_limit_that_finds_ranks_starting_is_not_lost(tmp_path, stops, code):
    """They die of it, or have nothing to save; a restart would have no second signal before the limit.

    A job that has been queued again for nothing STOPS - 1 times is not queued once more.
    """
    run_dir, nodes = start_nodes(tmp_path, "--restarts", "3", env={"FAKE": "wait"})
    for _ in range(stops):
        rundir.append_event(run_dir, "stopped")
    deadline = time.monotonic() + 200
    while len(list(run_dir.glob("rank_*.pid"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for node in nodes:
        node.send_signal(signal.SIGUSR1)
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [code, code], said
    assert "starting again" not in said[0]
    if code == 2:
        assert (
            "no new checkpoint between (there is none)"
            in json.loads((run_dir / "report.json").read_text())["error"]["message"]
        )


SIGNALLED = """
import os, signal, sys
from torch.distributed.elastic.multiprocessing import SubprocessContext

start = SubprocessContext._start

def signalled(self):
    os.kill(os.getpid(), signal.SIGUSR1)
    start(self)

SubprocessContext._start = signalled
from launch.agent import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_before_the_time_limit_that_finds_an_agent_without_ranks_is_not_lost(tmp_path):
    """It waits for the other nodes' agents, say; the ranks would train on until the limit kills them."""
    (tmp_path / "JOB.json").write_text(json.dumps({"action": "train", "run_dir": str(tmp_path)}))
    words = ["--nproc", "2", "--module", "tests.launch.fake_rank", "--job", tmp_path / "JOB.json", "--grace", "5"]
    words += ["--logs", tmp_path / "logs", "--errors", tmp_path / "errors", "--max-restarts", "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "FAKE": "wait"}
    done = subprocess.run([sys.executable, "-c", SIGNALLED, *words], env=env, check=False, timeout=200)
    assert done.returncode == 75


def test_a_job_stopped_before_its_ranks_is_not_queued_for_ever(tmp_path, monkeypatch):
    def stop(**_):
        raise attempts.Stopped("SIGUSR1")

    monkeypatch.setattr(attempts, "catch_signals", lambda: None)
    monkeypatch.setattr(roll_call.Nodes, "meet", stop)
    words = ["--head", "HEAD", "--port", "1", "--run-id", "x", "--nproc", "2", "--job", str(tmp_path / "JOB.json")]
    codes = [nodes_module.main(["--nodes", "2", "--node-rank", "0", *words]) for _ in range(attempts.STOPS)]
    assert codes == [75] * (attempts.STOPS - 1) + [2]
    assert nodes_module.main(["--nodes", "2", "--node-rank", "1", *words]) == 0, "srun takes the highest code, node 0's"
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "failed"


def rank(**changes):
    good = {"host": "a", "time": 0.0, "device": "cpu", "disk_bytes": 1 << 40, "shm_bytes": 1 << 40, "unreadable": None}
    return good | changes


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"unreadable": "x: gone"}, "rank 1 on b: cannot read the data: x: gone"),
        ({"disk_bytes": 1000}, "rank 1 on b: 1000 B left"),
        ({"shm_bytes": 1000}, "/dev/shm has"),
        ({"time": -60.0}, "its clock is -60 s off"),
        ({"device": "H100"}, "computes on H100"),
    ],
)
def test_the_preflight_names_a_bad_rank(bad, said):
    assert preflight.complaints([rank(), rank(host="c"), rank(host="d")]) == []
    lines = preflight.complaints([rank(), rank(host="b", **bad), rank(host="c")])
    assert len(lines) == 1 and said.split(" ")[-1] in lines[0] and "rank 1 on b" in lines[0]


def test_data_that_cannot_be_read(tmp_path):
    assert "no Parquet file" in preflight.unreadable(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    assert preflight.unreadable(tmp_path) is None
    (tmp_path / "b.parquet").write_bytes(b"PAR1....")
    assert "b.parquet: not a whole Parquet file" in preflight.unreadable(tmp_path)


def test_the_cpus_near_a_gpu(tmp_path):
    for node, cpus in enumerate(("0-1,4\n", "2-3\n")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    device = tmp_path / "bus/pci/devices/0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    found = gpu.numa({0, 1, 2, 3}, ["00000000:1B:00.0", "00000000:2C:00.0"], tmp_path)
    assert found == gpu.Numa({0: (0, 1), 1: (2, 3)}, (1, -1))
    assert gpu.several_numa_nodes(tmp_path)
    assert gpu.near(0, 2, found) == (2, 3)
    assert gpu.near(1, 2, found) == ()
    assert [gpu.near(r, 4, gpu.Numa(found.cpus)) for r in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert gpu.near(0, 1, gpu.Numa(found.cpus)) == ()
