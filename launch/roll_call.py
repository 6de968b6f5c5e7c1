"""The nodes of a job meet before their ranks do: who is there, with which versions, and how each attempt ended.

Node 0 keeps a TCPStore; every node writes into it under its own number and reads what node 0 decides. A node that is
missing is named, which no collective can do: there all that is known is that somebody is silent. For each attempt node
0 opens one more store, on a port that the kernel finds free, for the agents and ranks of that attempt.

No call outlives its limit here: a TCPStore's own limits do not hold where the network is gone, as it then waits, in
the middle of a message, for as long as TCP does (a quarter of an hour).
"""

import json
import platform
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch.distributed import DistNetworkError, TCPStore

from kernels.errors import UserError

T = TypeVar("T")

VERSIONS = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numba", "numpy", "pyarrow", "tablemesh")
GATHER_SECONDS = 60  # for the other nodes to say how they ended, after this one has: they notice within a timeout
PREPARE_HOURS = 24  # for node 0 to prepare the data
CALL_SECONDS = 10  # for one call to the store
POLL_SECONDS = 0.05  # of node 0, which has the store in its own process
HEAR_SECONDS = 0.2  # between two looks over the network


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; DistNetworkError when it does neither in this time. It is then left to itself."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise DistNetworkError(f"no answer within {seconds:.0f} s")
    value, error = found[0]
    if error is not None:
        raise error
    return value


class Missing(RuntimeError):
    """Nodes did not come in time, or node 0 cannot be reached."""


def facts() -> dict[str, Any]:
    """What must be equal on all nodes, the GPUs that torch sees here, and the node's name."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"host": socket.gethostname(), "versions": versions, "gpus": torch.cuda.device_count()}


def differences(nodes: list[dict[str, Any]]) -> list[str]:
    """A line for each node whose versions are not those of most nodes.

    >>> differences([{"host": "a", "versions": {"torch": "1"}}, {"host": "b", "versions": {"torch": "2"}},
    ...              {"host": "c", "versions": {"torch": "1"}}])
    ['node 1 (b): torch is 2, on the other nodes 1']
    """
    lines = []
    for name in sorted({name for node in nodes for name in node["versions"]}):
        found = [node["versions"].get(name, "missing") for node in nodes]
        usual = max(found, key=found.count)
        lines += [
            f"node {rank} ({nodes[rank]['host']}): {name} is {version}, on the other nodes {usual}"
            for rank, version in enumerate(found)
            if version != usual
        ]
    return lines


def short_of_gpus(nodes: list[dict[str, Any]], wanted: int) -> list[str]:
    """A line for each node with fewer GPUs than the job asks for: its ranks would train on the CPU, or not at all.

    >>> short_of_gpus([{"host": "a", "gpus": 8}, {"host": "b", "gpus": 7}], 8)
    ['node 1 (b): torch sees 7 GPUs, and the job asks for 8 on each node']
    """
    return [
        f"node {rank} ({node['host']}): torch sees {node['gpus']} GPUs, and the job asks for {wanted} on each node"
        for rank, node in enumerate(nodes)
        if node["gpus"] < wanted
    ]


def _bad(nodes: list[dict[str, Any]], gpus: int) -> str:
    """Why these nodes cannot train together; "" when they can."""
    if different := differences(nodes):
        return "\n".join(["the nodes do not run the same software:", *different])
    if gpus and (short := short_of_gpus(nodes, gpus)):
        return "\n".join(["GPUs are missing (`nvidia-smi` on the node tells; is torch a CUDA build there?):", *short])
    return ""


@dataclass
class Nodes:
    """The nodes of one job, from node `rank`'s side. master: the address that all ranks can reach node 0 by."""

    rank: int
    count: int
    master: str
    _store: TCPStore | None  # None where there is one node: nobody to talk to
    _ranks: TCPStore | None = field(default=None, init=False)  # on node 0: found by its port

    @classmethod
    def alone(cls) -> "Nodes":
        return cls(0, 1, "localhost", None)

    @classmethod
    def meet(
        cls,
        *,
        rank: int,
        count: int,
        head: str,
        port: int,
        run_id: str,
        wait: timedelta,
        gpus: int = 0,
        own: Callable[[], dict[str, Any]] = facts,
    ) -> "Nodes":
        """Wait for all nodes. Missing when some do not come, UserError when their versions differ or GPUs are missing.

        head, port: where node 0 is to be found. run_id: the same on all nodes of a job; a node of another job that
        comes to this port is turned away by it. gpus: that each node has to have.
        """
        if count == 1:
            if bad := _bad([own()], gpus):
                raise UserError(bad)
            return cls.alone()
        try:
            store = TCPStore(head, port, None, rank == 0, wait, wait_for_workers=False)
        except RuntimeError as error:
            if rank == 0:
                raise Missing(f"node 0 ({socket.gethostname()}) cannot listen on port {port}: {error}") from error
            raise Missing(
                f"node {rank} ({socket.gethostname()}) cannot reach node 0 at {head}:{port} "
                f"within {wait.total_seconds():.0f} s; is the port open between the nodes?"
            ) from error
        nodes = cls(rank, count, head, store)
        store.set(f"{run_id}/{rank}", json.dumps(own()))
        if rank == 0:
            there = nodes._all(run_id, wait.total_seconds())
            missing = [str(n) for n, found in enumerate(there) if found is None]
            known = {found["host"] for found in there if found is not None}
            verdict = ""
            if missing:
                verdict = (
                    f"node {', '.join(missing)} of {count} did not come within {wait.total_seconds():.0f} s; "
                    f"there are {', '.join(sorted(known))}, and port {port} of {head} is where they meet"
                )
            store.set(f"{run_id}/missing", verdict)
            store.set(f"{run_id}/bad", "" if missing else _bad(there, gpus))
        try:
            store.wait([f"{run_id}/bad"], wait + timedelta(seconds=GATHER_SECONDS))
            verdict = store.get(f"{run_id}/missing").decode()
            bad = store.get(f"{run_id}/bad").decode()
        except RuntimeError as error:
            raise Missing(f"node {rank} ({socket.gethostname()}): no word from node 0 at {head}:{port}") from error
        if verdict:
            raise Missing(verdict)
        if bad:
            raise UserError(bad)
        return nodes

    def ready(self, attempt: int) -> int:
        """When node 0 is ready for this attempt (it may prepare data first), the port of its store for the agents and
        ranks; 0 with one node. Missing when node 0 has gone.

        A port of a fixed number could be in use: by another program, or as the near end of any connection.
        """
        if self._store is None:
            return 0
        if self.rank == 0:
            # The last attempt's store goes only then, so that no rank left of it can come to the new one.
            self._ranks = TCPStore(self.master, 0, None, True, multi_tenant=True, wait_for_workers=False)
            self._store.set(f"ready/{attempt}", str(self._ranks.port))
            return int(self._ranks.port)
        try:
            return int(self._hear(f"ready/{attempt}", PREPARE_HOURS * 3600))
        except RuntimeError as error:
            raise Missing(f"node {self.rank} ({socket.gethostname()}): node 0 has gone") from error

    def gather(self, attempt: int, code: int) -> list[int | None] | None:
        """Tell how this node's ranks ended. On node 0: the exit codes of all, None where a node is silent."""
        if self._store is None:
            return [code]
        store, text = self._store, json.dumps(code)
        try:
            _within(CALL_SECONDS, lambda: store.set(f"exit/{attempt}/{self.rank}", text))
        except RuntimeError:  # node 0 has gone, and its verdict with it
            return None
        return self._all(f"exit/{attempt}", GATHER_SECONDS) if self.rank == 0 else None

    def tell(self, attempt: int, verdict: str) -> None:
        """Node 0: let the others know what comes now, and hear that they do before leaving."""
        if self._store is None:
            return
        self._store.set(f"verdict/{attempt}", verdict)
        self._all(f"heard/{attempt}", 10, but=0)

    def verdict(self, attempt: int, *, default: str) -> str:
        """Node 0's word; `default` when it has gone without one."""
        assert self._store is not None
        store = self._store
        try:
            told = self._hear(f"verdict/{attempt}", 2 * GATHER_SECONDS)
            _within(CALL_SECONDS, lambda: store.set(f"heard/{attempt}/{self.rank}", "1"))
        except RuntimeError:
            return default
        return told

    def _hear(self, key: str, seconds: float) -> str:
        """What node 0 has set, once it is there; DistNetworkError when it is not in time, or node 0 has gone."""
        assert self._store is not None
        store, deadline = self._store, time.monotonic() + seconds
        while not _within(CALL_SECONDS, lambda: store.check([key])):
            if time.monotonic() > deadline:
                raise DistNetworkError(f"{key}: not set within {seconds:.0f} s")
            time.sleep(HEAR_SECONDS)
        return _within(CALL_SECONDS, lambda: store.get(key)).decode()

    def _all(self, prefix: str, seconds: float, *, but: int = -1) -> list[Any]:
        """What every node has set under the prefix; None for those that have not after this time."""
        assert self._store is not None
        found: list[Any] = [None] * self.count
        open_ = [rank for rank in range(self.count) if rank != but]
        deadline = time.monotonic() + seconds
        while True:
            for rank in list(open_):
                if self._store.check([f"{prefix}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{prefix}/{rank}"))
                    open_.remove(rank)
            if not open_ or time.monotonic() > deadline:
                return found
            time.sleep(POLL_SECONDS)
