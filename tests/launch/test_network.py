"""Training across two hosts (tests/launch/two_hosts.py): as it should be, losing packets, slowly, and unplugged.

The real launcher on both: roll call, preflight, agents, ranks, gloo over the link. `make test-network` runs all, of
which `make test` runs the first one; without root they are skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import network
from tests.launch import small, two_hosts

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = "29611"

RUN = """
[run]
hang_seconds = 12
timeout_seconds = 40
grace_seconds = 10
"""  # of runs that are to hang; others may compile for a minute, or wait for packets that are sent again


@pytest.fixture
def hosts():
    why = two_hosts.missing()
    if why:
        pytest.skip(why)
    with two_hosts.Hosts() as made:
        yield made


class Training:
    """One node on each host, one rank each, started; the run folder is on the disk that both see."""

    def __init__(self, hosts, folder, *words, epochs=1, more="", second=()):
        """second: words before the second host's command."""
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        small.write(self.run_dir, name="config", data=folder / "data", epochs=epochs, more=more)
        (self.run_dir / "JOB.json").write_text(json.dumps({"action": "train", "run_dir": str(self.run_dir)}))
        env = {key: value for key, value in os.environ.items() if key != network.GLOO}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HEAD": two_hosts.ADDRESSES[0]}
        full = [sys.executable, "-m", "launch.node", "--nodes", "2", "--head", "HEAD", "--port", PORT]
        full += ["--run-id", "x", "--nproc", "1", "--job", str(self.run_dir / "JOB.json"), "--grace", "10", *words]
        self.nodes = [
            hosts.start(
                node, *before, *full, "--node-rank", str(node), cwd=folder, env=env, stderr=subprocess.PIPE, text=True
            )
            for node, before in ((0, ()), (1, second))
        ]

    def end(self):
        """(exit codes, what the nodes said)"""
        deadline = time.monotonic() + small.SECONDS
        said = [node.communicate(timeout=max(1.0, deadline - time.monotonic()))[1] for node in self.nodes]
        return [node.returncode for node in self.nodes], said

    def until_step(self, step):
        deadline = time.monotonic() + small.SECONDS
        while max(small.losses(self.run_dir), default=0) < step:
            assert all(node.poll() is None for node in self.nodes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def report(self):
        return json.loads((self.run_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory):
    """Losses of the same training by two ranks of one host."""
    folder = tmp_path_factory.mktemp("one")
    small.train_here(small.write(folder, name="one", data=folder / "data"))
    return small.losses(folder / "runs/one")


def test_two_hosts_that_lose_packets_train_to_the_losses_of_one(hosts, tmp_path, on_one_host):
    """5% each way: TCP sends again. Host names resolve nowhere, so gloo has to be told its interface."""
    hosts.lose(0.05)
    training = Training(hosts, tmp_path)
    codes, said = training.end()
    assert codes == [0, 0], said
    assert small.losses(training.run_dir) == pytest.approx(on_one_host, rel=1e-6) and len(on_one_host) > 5
    assert training.report()["world_size"] == 2
    assert hosts.dropped(0) > 10 and hosts.dropped(1) > 10


@pytest.mark.cluster
def test_a_pulled_cable_ends_both_hosts_with_a_name(hosts, tmp_path):
    training = Training(hosts, tmp_path, "--restarts", "2", epochs=500, more=RUN)
    training.until_step(10)
    hosts.unplug()
    codes, said = training.end()
    assert codes == [1, 1], said
    error = training.report()["error"]
    assert error["kind"] == "hang"
    assert "is frozen, or the network to its host is down: nothing heard of it for" in error["message"]
    assert error["message"] in said[0] and "starting again" not in said[0]
    for rank, other in ((0, 1), (1, 0)):
        found = json.loads((training.run_dir / f"errors/rank_{rank}.json").read_text())
        assert found["hung"] == [other] and f"rank {other} " in found["message"], found


@pytest.mark.cluster
def test_two_hosts_train_to_the_losses_of_one(hosts, tmp_path, on_one_host):
    training = Training(hosts, tmp_path, "--preflight")
    codes, said = training.end()
    assert codes == [0, 0], said
    assert small.losses(training.run_dir) == pytest.approx(on_one_host, rel=1e-6)
    preflight = json.loads((training.run_dir / "preflight.json").read_text())
    assert [rank["host"] for rank in preflight["ranks"]] == list(two_hosts.NAMES)


@pytest.mark.cluster
def test_a_slow_link_is_slow_and_right(hosts, tmp_path, on_one_host):
    hosts.limit("20mbit")
    training = Training(hosts, tmp_path)
    codes, said = training.end()
    assert codes == [0, 0], said
    assert small.losses(training.run_dir) == pytest.approx(on_one_host, rel=1e-6)


@pytest.mark.cluster
def test_a_preflight_names_the_bad_host(hosts, tmp_path):
    """The second host sees 16 MB of shared memory, as in a container that nobody gave more."""
    little = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    training = Training(hosts, tmp_path, "--preflight", second=("unshare", "--mount", "sh", "-c", little, "sh"))
    codes, said = training.end()
    assert codes == [2, 2], said
    (line,) = [line for line in said[0].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: preflight: rank 1 on right: /dev/shm has 16"), line
    assert not small.losses(training.run_dir), "it stopped before the first step"
    assert training.report()["error"]["kind"] == "user"


@pytest.mark.cluster
def test_a_preflight_holds_the_link_against_the_profile(hosts, tmp_path):
    (tmp_path / "profiles.toml").write_text('[profiles.cpu]\nlike = "cpu"\ninter_bandwidth = "1Gb/s"\n')
    hosts.limit("100mbit")
    training = Training(hosts, tmp_path, "--preflight", more=f'[plan]\nprofiles = "{tmp_path}/profiles.toml"\n')
    codes, said = training.end()
    assert codes == [2, 2], said
    assert "error: preflight: rank 0 on left: 0." in said[0] and "rank 1 on right: 0." in said[0]
    assert "profile cpu has 1.00" in said[0]
    assert training.report()["error"]["kind"] == "user"
    assert not small.losses(training.run_dir), "it stopped before the first step"
    found = json.loads((training.run_dir / "preflight.json").read_text())
    assert not found["ok"] and max(found["links_gbit_s"]) < 0.2 and found["expected"]["profile"] == "cpu"


def test_the_interface_that_leads_to_a_host():
    names = {name for _, name in socket.if_nameindex()}
    assert network.interface_to("127.0.0.1") is None
    assert network.interface_to("no.such.host.invalid") is None
    assert network.interface_to("192.0.2.77") in {None, *names}
