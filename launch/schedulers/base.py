"""The contract of a scheduler: what starts a job somewhere and says how it goes.

A kind is a module in this folder with a class `Scheduler` that has the methods below and takes no arguments. The
command line asks for a kind by its file name and calls `request` alone for `--dry-run`; otherwise `submit` once, and
`reach` before it where data is prepared first. Then

- `tablemesh train` (kind "local") calls `status` a few times a second until it is final, and `cancel` on Ctrl-C;
- `tablemesh submit` leaves; `tablemesh status`, `logs` and `cancel` come later, in other processes, with the id alone.

Where the run folder (`job.run_dir`) is shared with the ranks, progress, results and errors are read from its files; a
scheduler reports no more than the job's state. What runs on each node of a submitted job is launch/node.py.
Whatever goes wrong is a UserError with the scheduler's own words and a way out, and leaves no job behind.
"""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from kernels.errors import UserError
from launch.job import Job


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Forgotten(UserError):
    """The scheduler knows no such job, or no longer."""


class Scheduler(Protocol):
    shares_files: bool  # the nodes see the run folder and the data at the paths they have here

    def request(self, job: Job) -> str:
        """Exactly what `submit` would start, as text for people. Starts nothing and writes nothing."""

    def reach(self, job: Job) -> None:
        """UserError when nobody would take the job now. Starts nothing and writes nothing."""

    def submit(self, job: Job) -> str:
        """Start the job and return its id at once. UserError when this machine lacks what the kind needs."""

    def status(self, id: str) -> State:
        """The job's state now; Forgotten for an id that it does not know."""

    def detail(self, id: str) -> str:
        """The scheduler's own words on that state: why it waits, on which nodes it runs; "" for none."""

    def logs(self, id: str, run_dir: Path | None) -> Iterator[str]:
        """What the job's agents, not its ranks, have printed so far, line by line.

        run_dir: the job's, where this machine sees it.
        """

    def cancel(self, id: str) -> None:
        """Stop the job: SIGTERM to every rank, time to save (`job.grace` seconds), then SIGKILL.

        Returns when nothing of it is left, or when the scheduler has taken the order. Harmless after the end.
        """
