"""Ranks on this machine: through TorchX's local scheduler, or, for a detached job, in a session of their own.

TorchX's local scheduler keeps its jobs in memory and stops them when it ends, so it has none that outlive a command. A
detached job is launch/node.py in the background; its id is its run folder, where node.json says which process it is.
"""

import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from launch import gpu, rundir
from launch.job import Job
from launch.schedulers.base import State

_ROLE = "trainer"
STOP_SECONDS = 90  # from SIGTERM to SIGKILL: more than the ranks take to save


class Scheduler:
    shares_files = True

    def __init__(self) -> None:
        self._runner: Any = None
        self._job: Job | None = None

    def request(self, job: Job) -> str:
        _check(job)
        env = "".join(f"  {key}={shlex.quote(value)}\n" for key, value in sorted(job.env.items()))
        command = shlex.join([sys.executable, *(_node_args(job) if job.detached else job.agent_args())])
        rank = shlex.join([sys.executable, "-m", job.module, str(job.file)])
        return (
            f"{job.nproc} ranks on this machine, {job.threads} threads each\n"
            f"each rank:   {rank}\n"
            f"started by:  {command}\n"
            f"in:          {os.getcwd()}\n"
            f"with:\n{env}"
        )

    def reach(self, job: Job) -> None:
        """UserError when this machine has not the GPUs that are asked for."""
        found = len(gpu.bus_ids())
        if job.place.gpus > found:  # which says nothing of UUIDs and MIG slices; torch takes a second to ask
            import torch

            found = max(found, torch.cuda.device_count())
        if job.place.gpus > found:
            raise UserError(
                f"--gpus-per-node {job.place.gpus}: this machine has {found} GPUs (`nvidia-smi` lists them); "
                "without --gpus-per-node a run takes those that are there, or the CPU"
            )

    def submit(self, job: Job) -> str:
        _check(job)
        return _detach(job) if job.detached else self._attach(job)

    def _attach(self, job: Job) -> str:
        from torchx import specs
        from torchx.runner import get_runner

        role = specs.Role(
            name=_ROLE,
            image="",  # local_cwd runs what lies here
            entrypoint=sys.executable,
            args=job.agent_args(),
            env=dict(job.env),
            num_replicas=job.nodes,
        )
        self._runner, self._job = get_runner(), job
        with _signal_handlers_kept():
            return self._runner.run(specs.AppDef(name=job.name, roles=[role]), "local_cwd", {"log_dir": str(job.logs)})

    def status(self, id: str) -> State:
        if self._runner is None:
            return _detached_state(Path(id))
        from torchx.specs import AppState

        try:
            status = self._runner.status(id)
        except OSError as error:
            _only_full(error)
            return State.FAILED
        names = {
            AppState.SUCCEEDED: State.SUCCEEDED,
            AppState.FAILED: State.FAILED,
            AppState.CANCELLED: State.CANCELLED,
            AppState.RUNNING: State.RUNNING,
        }
        return names.get(status.state, State.WAITING) if status else State.FAILED

    def detail(self, id: str) -> str:
        process = _process(Path(id))
        return f"process {process}" if process else ""

    def logs(self, id: str, run_dir: Path | None) -> Iterator[str]:
        if self._runner is None:
            with contextlib.suppress(FileNotFoundError):
                yield from _output(Path(id)).read_text(errors="replace").splitlines()
            return
        try:
            yield from self._runner.log_lines(id, _ROLE, 0)
        except OSError as error:
            _only_full(error)

    def cancel(self, id: str) -> None:
        """TorchX kills the agent 10 s after its SIGTERM, which may be too short to save; so the agent is told first."""
        if self._job is None:
            _stop(Path(id))
            return
        try:
            os.kill(int((self._job.logs / "agent.pid").read_text()), signal.SIGTERM)
            end = time.monotonic() + self._job.grace
            while not self.status(id).final and time.monotonic() < end:
                time.sleep(0.1)
        except (OSError, ValueError):  # it has ended, or has not begun
            pass
        finally:
            self._runner.cancel(id)


def _check(job: Job) -> None:
    place = job.place
    if job.nodes > 1:
        raise UserError(f"--nodes {job.nodes}: --on local is this machine alone; use --nproc for more ranks on it")
    if place.image:
        raise UserError("--image: --on local runs what is installed here; --on docker runs an image")
    if place.mounts:
        raise UserError("--mount: --on local sees this machine's folders as they are; --on docker mounts them")
    if place.options:
        raise UserError(f"--option {next(iter(place.options))}: --on local has no options")
    if place.time_minutes:
        raise UserError("--time: --on local has no time limit")
    if place.memory_mb:
        raise UserError("--memory: --on local takes what this machine has; --on docker sets a limit")


def _node_args(job: Job) -> list[str]:
    return job.node_args(node_rank="0", head="TABLEMESH_HEAD", run_id=job.name)


def _output(run_dir: Path) -> Path:
    return run_dir / "logs" / "node.log"


def _detach(job: Job) -> str:
    """Start the job's one node in a session of its own, which no terminal's end and no Ctrl-C reaches."""
    output = _output(job.run_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    pid = os.posix_spawn(  # and not subprocess: nobody here waits for it
        sys.executable,
        [sys.executable, *_node_args(job)],
        os.environ | job.env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    found = {"pid": pid, "start": _start_time(pid), "host": socket.gethostname()}
    (job.run_dir / "node.json").write_text(json.dumps(found) + "\n")
    return str(job.run_dir)


def _start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: a number is given to another process some day. None: it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _process(run_dir: Path) -> int | None:
    """The job's process while it runs. UserError when it is another machine's, or there never was one."""
    try:
        found = json.loads((run_dir / "node.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{run_dir}: no job was submitted from this run folder with --on local") from None
    if found["host"] != socket.gethostname():
        raise UserError(f"{run_dir}: its job runs on {found['host']}; ask there")
    return found["pid"] if found["start"] is not None and _start_time(found["pid"]) == found["start"] else None


def _detached_state(run_dir: Path) -> State:
    if _process(run_dir) is not None:
        return State.RUNNING
    status = rundir.report(run_dir).get("status")
    return {"finished": State.SUCCEEDED, "interrupted": State.CANCELLED}.get(status, State.FAILED)


def _stop(run_dir: Path) -> None:
    """SIGTERM to the node, which stops its ranks and waits for them; SIGKILL when that takes too long."""
    pid = _process(run_dir)
    if pid is None:
        return
    deadline = time.monotonic() + STOP_SECONDS
    os.kill(pid, signal.SIGTERM)
    while _process(run_dir) is not None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # the ranks end with it
        time.sleep(0.1)


def _only_full(error: OSError) -> None:
    """Raise the error again unless the disk is full: then all ranks have ended, and TorchX cannot write down that they
    did, which it tries whenever it is asked for anything."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """TorchX takes SIGINT and SIGTERM for itself; what a Ctrl-C means is the command line's business."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
