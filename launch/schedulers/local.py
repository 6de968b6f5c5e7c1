"""Ranks on this machine, through TorchX's local scheduler."""

import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launch.job import Job
from launch.schedulers.base import State

_ROLE = "trainer"


class Scheduler:
    def __init__(self) -> None:
        self._runner: Any = None
        self._job: Job | None = None

    def request(self, job: Job) -> str:
        env = "".join(f"  {key}={shlex.quote(value)}\n" for key, value in sorted(job.env.items()))
        command = shlex.join([sys.executable, *job.agent_args()])
        rank = shlex.join([sys.executable, "-m", job.module, str(job.file)])
        return (
            f"{job.nproc} ranks on this machine, {job.threads} threads each\n"
            f"each rank:   {rank}\n"
            f"started by:  {command}\n"
            f"in:          {os.getcwd()}\n"
            f"with:\n{env}"
        )

    def submit(self, job: Job) -> str:
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

    def logs(self, id: str) -> Iterator[str]:
        try:
            yield from self._runner.log_lines(id, _ROLE, 0)
        except OSError as error:
            _only_full(error)

    def cancel(self, id: str) -> None:
        """TorchX kills the agent 10 s after its SIGTERM, which may be too short to save; so the agent is told first."""
        assert self._job is not None
        try:
            os.kill(int((self._job.logs / "agent.pid").read_text()), signal.SIGTERM)
            end = time.monotonic() + self._job.grace
            while not self.status(id).final and time.monotonic() < end:
                time.sleep(0.1)
        except (OSError, ValueError):  # it has ended, or has not begun
            pass
        finally:
            self._runner.cancel(id)


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
