"""The run folder as the command line makes and closes it; the ranks fill it."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from launch.failure import Failure
from launch.terminal import shown
from trainer import report as reports


def create(parent: Path, name: str, *, latest: bool = True) -> Path:
    """Make parent/NAME, or NAME-2, NAME-3, ... where that exists, and point parent/latest at it.

    latest=False leaves that to `make_latest`, once it is sure that the folder stays.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        if latest:
            make_latest(path)
    except OSError as error:
        raise UserError(f"{parent / name}: cannot make the run folder: {error.strerror}") from error
    return path.resolve()


def make_latest(run_dir: Path) -> None:
    """Point `latest` beside it at this run folder; something else of that name is left alone."""
    link = run_dir.parent / "latest"
    if link.is_symlink() or not link.exists():
        beside = run_dir.parent / f".latest-{os.getpid()}"
        beside.symlink_to(run_dir.name)
        beside.replace(link)


def newest(parent: Path, name: str) -> Path | None:
    """The last run of this name, of parent/NAME, NAME-2, NAME-3, ...; None when there is none."""
    found = [(1, parent / name)] if (parent / name / "config.toml").is_file() else []
    for path in parent.glob(f"{name}-*") if parent.is_dir() else ():
        number = path.name.removeprefix(f"{name}-")
        if number.isdigit() and (path / "config.toml").is_file():
            found.append((int(number), path))
    return max(found)[1].resolve() if found else None


def reopen(run_dir: Path, resolved: Any) -> "Before":
    """Before a run goes on in its folder: how it is now. Changes nothing.

    UserError while another process writes there, or when the config differs in what must not differ.
    """
    from trainer import config as configs
    from trainer.checkpoint import compare, lock

    check_writable(run_dir)
    lock.check(run_dir)
    fatal, _ = compare.differences(configs.load(run_dir / "config.toml"), resolved)
    if fatal:
        raise UserError(
            f"{run_dir}: the run cannot go on with this config; it differs in\n"
            + "\n".join(fatal)
            + "\nput these back, or start a new run without --resume"
        )
    return Before.of(run_dir)


@dataclass(frozen=True, kw_only=True)
class Before:
    """A run as it was before somebody asked it to go on: what it has to be again when that is refused, or stopped by
    hand before its first step.

    Otherwise a slip in `--resume` would cost a finished run its report, and stay in its config.
    """

    run_dir: Path
    texts: dict[str, str]  # file -> its text
    events: int  # bytes of metrics.jsonl

    FILES = ("config.toml", "JOB.json", "plan.json", "report.json", "errors/*.json")

    @classmethod
    def of(cls, run_dir: Path) -> "Before":
        files = [path for pattern in cls.FILES for path in run_dir.glob(pattern)]
        log = run_dir / "metrics.jsonl"
        return cls(
            run_dir=run_dir,
            texts={str(path.relative_to(run_dir)): path.read_text() for path in files},
            events=log.stat().st_size if log.exists() else 0,
        )

    def taken(self) -> bool:
        """Whether another process writes there now: it was faster, and the folder is its own."""
        from trainer.checkpoint import lock

        try:
            lock.check(self.run_dir)
        except UserError:
            return True
        return False

    def still(self) -> bool:
        """Whether no step was tried since, and nobody else writes there now."""
        if self.taken():
            return False
        try:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                file.seek(self.events)
                return not any(b'"phase"' in line and b'"training"' in line for line in file)
        except FileNotFoundError:
            return True

    def put_back(self) -> None:
        """Only while `still`. UserError when the files cannot be written."""
        for pattern in self.FILES:
            for path in self.run_dir.glob(pattern):
                if str(path.relative_to(self.run_dir)) not in self.texts:
                    path.unlink()
        for name, text in self.texts.items():
            (self.run_dir / name).parent.mkdir(exist_ok=True)
            reports.write_text(self.run_dir / name, text)
        if (self.run_dir / "metrics.jsonl").exists():
            size = (self.run_dir / "metrics.jsonl").stat().st_size
            os.truncate(self.run_dir / "metrics.jsonl", min(self.events, size))
        reports.write_html(self.run_dir)


def way_on(run_dir: Path, resolved: Any, *, nproc: int) -> str:
    """The command that goes on after a failure; empty where there is no checkpoint, or not on a disk of ours."""
    from trainer.checkpoint import restore

    try:
        place = restore.place_of(run_dir, resolved.checkpoint.dir)
        names = [] if place.url else place.names()
    except (OSError, UserError):  # a disk that has gone may be why the run failed
        return ""
    ranks = "" if nproc == resolved.train.nproc else f" --nproc {nproc}"
    return f"`tablemesh train {shown(run_dir)} --resume auto{ranks}` goes on from {names[-1]}" if names else ""


def check_writable(run_dir: Path) -> None:
    """UserError when nothing can be written in the run folder, as on a read-only disk or in somebody else's run."""
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise UserError(
            f"{run_dir}: cannot be written to, and the ranks leave their logs and results there; "
            "copy the run to where you may write, or mend the folder's rights"
        )


def find(run: Path) -> Path:
    """The run folder that `run` names. UserError when it is none."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; `ls runs` shows those there are, runs/latest is the newest")
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: not a run folder: it has no config.toml")
    return run.resolve()


def report(run_dir: Path) -> dict[str, Any]:
    """report.json as it is now; empty when there is none yet."""
    try:
        return reports.read(run_dir)
    except UserError:
        return {}


def close(
    run_dir: Path, *, name: str, world_size: int, started: float, failure: Failure, began: float | None = None
) -> None:
    """Write how a training run ended early into report.json, metrics.jsonl and report.html.

    The cause found over all ranks stands above what one of them thought: a rank that was stopped because another one
    failed has noted that it was interrupted. started: unix seconds; began: the same on the monotonic clock,
    of this process, without which a clock that was set meanwhile shows in the event's seconds.
    UserError when the files cannot be written.
    """
    found = report(run_dir)
    by_rank = failure.kind == "interrupted" and found.get("status") == "interrupted"  # it has written it down itself
    if by_rank:
        return
    if failure.kind != "interrupted" or found.get("status") in (None, "running"):
        found |= {
            "name": found.get("name", name),
            "status": "interrupted" if failure.kind == "interrupted" else "failed",
            "error": failure.as_json(),
            "started": found.get("started", started),
            "finished": time.time(),
            "world_size": found.get("world_size", world_size),
        }
        reports.write_json(run_dir, found)
    seconds = time.time() - started if began is None else time.monotonic() - began
    append_event(run_dir, "end", status=found["status"], seconds=seconds)
    reports.write_html(run_dir)


def append_event(run_dir: Path, name: str, /, **values: Any) -> None:
    """Add an event to metrics.jsonl (trainer/runlog.py) while no rank writes there; UserError when that fails."""
    path = run_dir / "metrics.jsonl"
    event = {"event": name, "time": time.time(), **values}
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the rank was stopped in the middle of a line
                    file.write(b"\n")
            file.write(json.dumps(event).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
