"""A job that was submitted earlier, by its handle: state, progress, output, end."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from launch import follow as following
from launch import handles, rundir, schedulers
from launch import job as jobs
from launch.progress import Display
from launch.schedulers.base import Forgotten, State
from trainer import runlog

_ENDS = {"finished": State.SUCCEEDED, "failed": State.FAILED, "interrupted": State.CANCELLED}  # of report.json
CANCEL_SECONDS = 60.0  # for the scheduler to say that the job has ended


def status(text: str) -> dict[str, Any]:
    """handle, state, detail (the scheduler's words), run_dir, and of a run folder: status, step, steps_total, ..."""
    job = handles.find(text)
    there = schedulers.named(job.kind)
    state, forgotten = _state(job, there)
    return {
        "handle": job.handle,
        "state": str(state),
        "detail": f"by the run's report; {job.kind} has forgotten it" if forgotten else there.detail(job.id),
        "run_dir": str(job.run_dir) if job.run_dir else None,
        "progress": progress(job.run_dir) if job.run_dir else None,
    }


def _state(job: handles.Submitted, there: Any) -> tuple[State, bool]:
    """The job's state, and whether the scheduler has forgotten the job, so that the run's report tells it."""
    try:
        return there.status(job.id), False
    except Forgotten:
        state = _ENDS.get(rundir.report(job.run_dir).get("status")) if job.run_dir else None
        if state is None:
            raise
        return state, True


def progress(run_dir: Path) -> dict[str, Any]:
    """How far the run has come, from metrics.jsonl; its status and error from report.json."""
    found: dict[str, Any] = {"status": None, "step": None, "steps_total": None, "samples_per_second": None, "auc": None}
    for event in runlog.events(run_dir / "metrics.jsonl"):
        if event["event"] in ("start", "train", "eval"):
            found |= {key: event[key] for key in found if event.get(key) is not None}
    report = rundir.report(run_dir)
    return found | {"status": report.get("status"), "error": (report.get("error") or {}).get("message")}


def lines(found: dict[str, Any]) -> list[str]:
    """`status` for people."""
    detail = f": {found['detail']}" if found["detail"] else ""
    out = [f"{found['handle']}  {found['state']}{detail}"]
    how = found["progress"]
    if how:
        parts = [f"step {how['step']} of {how['steps_total']}" if how["step"] else "no step yet"]
        if how["samples_per_second"]:
            parts.append(f"{how['samples_per_second']:,.0f} samples/s")
        if how["auc"]:
            parts.append(f"AUC {how['auc']:.4f}")
        out.append(f"{found['run_dir']}: {', '.join(parts)}")
        if how["error"]:
            out.append(f"error: {how['error']}")
    return out


def logs(text: str, *, rank: int | None, follow: bool, wait: Callable[[], None]) -> Iterator[str]:
    """Lines of the job's output, to its end with `follow`. wait: called between two looks."""
    job = handles.find(text)
    there = schedulers.named(job.kind)
    source = _of_rank(job, rank) if rank is not None else _of_all(job, there)
    while True:
        last = not follow or _state(job, there)[0].final
        yield from source(last)
        if last:
            return
        wait()


def cancel(text: str) -> dict[str, Any]:
    """Stop the job and wait until the scheduler says that it has ended; handle, what it was and is."""
    job = handles.find(text)
    there = schedulers.named(job.kind)
    was = now = _state(job, there)[0]
    if not was.final:
        there.cancel(job.id)
        deadline = time.monotonic() + CANCEL_SECONDS
        try:
            while not (now := there.status(job.id)).final and time.monotonic() < deadline:
                time.sleep(0.2)
        except Forgotten:  # it has ended, and the scheduler keeps no list of such jobs
            now = State.CANCELLED
    return {"handle": job.handle, "was": str(was), "state": str(now)}


def _of_rank(job: handles.Submitted, rank: int) -> Callable[[bool], Iterator[str]]:
    if job.run_dir is None:
        raise UserError(f"--rank {rank}: the run folder of {job.handle} is not to be seen from here")
    files = [following.Lines(job.run_dir / "logs" / "train" / f"rank_{rank}.{end}") for end in ("out", "err")]
    return lambda last: (line for file in files for line in file.new())


def _of_all(job: handles.Submitted, there: Any) -> Callable[[bool], Iterator[str]]:
    """The scheduler's lines, then the ranks' as far as they are for people; each line once."""
    seen = 0
    printed = _Collector()
    output = following.Output(_ranks_of(job.run_dir), printed) if job.run_dir else None

    def more(last: bool) -> Iterator[str]:
        nonlocal seen
        own = list(there.logs(job.id, job.run_dir))
        yield from own[seen:]
        seen = len(own)
        if output:
            output.show(all=last)
            yield from printed.take()

    return more


def _ranks_of(run_dir: Path) -> jobs.Job:
    count = len(list((run_dir / "logs" / "train").glob("rank_*.err")))
    return jobs.Job(name=run_dir.name, action="train", run_dir=run_dir, nproc=count, threads=1)


class _Collector(Display):
    """Takes the lines that launch.follow would print."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def line(self, text: str, style: str = "") -> None:
        self._lines.append(text)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken
