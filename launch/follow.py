"""Run a job to its end: submit it, show how it goes, stop it on Ctrl-C, and say why when it fails."""

import json
import os
import re
import shutil
import time
from collections import deque
from pathlib import Path

from launch import failure, machine
from launch.failure import Failure
from launch.job import Job
from launch.progress import Display
from launch.schedulers.base import Scheduler, State
from trainer import quiet

_POLL_SECONDS = 0.1
_HOLD_SECONDS = 2.0  # lines of stderr this close to a failure are part of it: the cause is shown in their place


def run(job: Job, scheduler: Scheduler, display: Display) -> Failure | None:
    """Run the job and return None when it succeeded, otherwise why it did not.

    Ctrl-C cancels the job and gives a Failure of kind "interrupted". Whatever else happens here, the job is cancelled
    before the exception goes up.
    """
    failure.clear(job)
    for old in (*job.logs.glob("rank_*.*"), *job.logs.glob("agent*.pid")):
        old.unlink()
    for old in job.logs.glob("attempt_*"):
        shutil.rmtree(old)
    job.write()
    kills = machine.oom_kills()
    events = Lines(job.run_dir / "metrics.jsonl", from_end=True)
    output = Output(job, display)
    display.event({"event": "phase", "name": f"starting {job.nproc} {'rank' if job.nproc == 1 else 'ranks'}"})
    id = scheduler.submit(job)
    final = False
    try:
        while not final:
            final = scheduler.status(id).final
            _show(events, display)
            output.show()
            if not final:
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        display.close()
        display.line("stopping the ranks (again Ctrl-C: at once) ...", "yellow")
        scheduler.cancel(id)
        final = True
        _show(events, display)
        saved = failure.explain(job).exit_code == 75
        word = failure.saved(job.run_dir) if saved else "stopped by Ctrl-C or SIGTERM"
        return Failure(kind="interrupted", message=word, exit_code=75 if saved else 1)
    finally:
        if not final:
            scheduler.cancel(id)
        display.close()
    if scheduler.status(id) is State.SUCCEEDED:
        output.show(all=True)
        return None
    said = "\n".join(scheduler.logs(id, job.run_dir))
    return failure.explain(job, oom_kills=machine.oom_kills() - kills, agent_output=said)


def _show(events: "Lines", display: Display) -> None:
    for line in events.new():
        try:
            event = json.loads(line)
        except ValueError:  # a rank was killed in the middle of a line, and another wrote on
            continue
        if isinstance(event, dict):
            display.event(event)


class Lines:
    """The lines added to a file that may not exist yet; a line is given once its end is there."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._at = path.stat().st_size if from_end and path.exists() else 0
        self._file: int | None = None  # inode: after a restart of the ranks it is another file
        self._rest = b""

    def new(self) -> list[str]:
        try:
            with open(self._path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if self._file not in (None, inode):
                    self._at, self._rest = 0, b""
                self._file = inode
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return []
        self._at += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


class Output:
    """What the ranks print, as far as it is for the user's eyes: every rank's stderr and the first one's stdout.

    Known noise is dropped, a line that several ranks print is shown once, and tracebacks are held back: after a
    failure the cause stands for them and the log has them whole.
    """

    def __init__(self, job: Job, display: Display) -> None:
        self._display = display
        self._nproc = job.nproc
        self._files = [(rank, Lines(job.logs / f"rank_{rank}.err")) for rank in range(job.nproc)]
        self._files.append((0, Lines(job.logs / "rank_0.out")))
        self._filters = [Filter() for _ in self._files]
        self._held: deque[tuple[float, int, str]] = deque()
        self._tracebacks: list[tuple[int, str]] = []
        self._first: dict[str, int] = {}  # text without numbers -> the rank that said it first

    def show(self, *, all: bool = False) -> None:
        """Print what has been held long enough, or, after success, all there is."""
        now = time.monotonic()
        for (rank, lines), noise in zip(self._files, self._filters, strict=True):
            for line in lines.new():
                kind = noise.classify(line)
                if kind == "traceback":
                    self._tracebacks.append((rank, line))
                elif kind == "text":
                    self._held.append((now, rank, line))
        while self._held and (all or now - self._held[0][0] >= _HOLD_SECONDS):
            _, rank, line = self._held.popleft()
            self._print(rank, line)
        if all:
            for rank, line in self._tracebacks:
                self._print(rank, line)
            self._tracebacks.clear()

    def _print(self, rank: int, line: str) -> None:
        if self._first.setdefault(re.sub(r"\d+", "#", line), rank) == rank:
            self._display.line(f"rank {rank}: {line}" if self._nproc > 1 else line, "yellow")


class Filter:
    """Sorts the lines of one stream into "noise", "text" and "traceback" (Python's and faulthandler's)."""

    _START = re.compile(r"(Traceback \(most recent call last\)|Fatal Python error|(Current t|T)hread 0x)")
    _BETWEEN = re.compile(r"(During handling of|The above exception was)")
    _WARNING = re.compile(r"\S+:\d+: \w*Warning: ")  # python prints the source line under it, indented

    def __init__(self) -> None:
        self._in_traceback = False
        self._after_noise = False

    def classify(self, line: str) -> str:
        bare = re.sub(r"^\[rank\d+\]:\s?", "", line)
        after_noise, self._after_noise = self._after_noise, False
        if quiet.is_noise(line):
            self._after_noise = self._WARNING.match(bare) is not None
            return "noise"
        if after_noise and bare.startswith("  "):
            return "noise"
        if self._START.match(bare) or self._BETWEEN.match(bare):
            self._in_traceback = True
            return "traceback"
        if self._in_traceback:
            if bare[:1].isspace():
                return "traceback"
            self._in_traceback = False
            return "traceback" if bare else "noise"
        return "text" if bare.strip() else "noise"
