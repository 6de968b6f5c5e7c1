"""Why a job failed: one readable cause out of what the ranks and their agent left behind.

The ranks write ERRORS/rank_R.json ({"rank", "time", "at", "kind", "message", "traceback"}; kind "peer" means that this
rank only noticed that others had died, or hang: then "hung" lists those that hang), each node's agent writes
ERRORS/agent.json or agent_N.json (who ended first, and by which signal), and a node that does not get as far as its
ranks ERRORS/node_N.json ({"time", "at", "kind", "message"}). What came first on one node is decided by "at", seconds on
its monotonic clock: "time" may jump. Between nodes there is "time" alone.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import Job
from launch.terminal import shown
from trainer import quiet

# A signal's death is noticed up to this long after it happened, in which time other ranks may already have reported
# the broken connection as an error of their own.
_NOTICE_SECONDS = 1.0

_FULL_BYTES = 64 << 10  # with less room than this left, a rank could not write down why it failed

_LIKELY = {
    "SIGKILL": "most likely the kernel's out-of-memory killer, or `kill -9`",
    "SIGSEGV": "a crash in native code",
    "SIGBUS": "a crash in native code, or /dev/shm is full",
    "SIGABRT": "native code gave up",
    "SIGILL": "a CPU instruction that this machine lacks",
    "SIGFPE": "a crash in native code",
    "SIGTERM": "something outside stopped it",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """kind: user | nan | memory | hang | internal | signal | launch | interrupted."""

    kind: str
    message: str  # for people; may have several lines
    rank: int | None = None
    details: Path | None = None  # where the whole story is
    exit_code: int = 1

    def as_json(self) -> dict[str, Any]:
        """The `error` of report.json."""
        return {"rank": self.rank, "kind": self.kind, "message": self.message}


def saved(run_dir: Path) -> str:
    """What to say of a run that was stopped and can go on."""
    return f"stopped after a checkpoint; `tablemesh train {shown(run_dir)} --resume auto` goes on from there"


def clear(job: Job) -> None:
    """Remove what an earlier job of this run folder left, so that it is not taken for this one's."""
    for pattern in ("rank_*.json", "agent*.json", "node_*.json"):
        for path in job.errors.glob(pattern):
            path.unlink(missing_ok=True)
    for folder in job.errors.glob("attempt_*"):
        shutil.rmtree(folder)


def explain(job: Job, *, oom_kills: int = 0, agent_output: str = "") -> Failure:
    """The cause of a job's end.

    oom_kills: how many processes the kernel killed for memory while the job ran.
    agent_output: what the agent printed, for when it could not write its own file.
    """
    agents = _read_all(job, "agent*.json")
    reports = _read_all(job, "rank_*.json")
    own = {r.get("rank"): r for r in reports if r.get("kind") != "peer"}
    clock = "at" if job.nodes == 1 else "time"
    causes: list[tuple[float, Failure]] = [(r.get(clock, 0.0), _of_report(job, r)) for r in own.values()]
    causes += [(node[clock], _of_node(node)) for node in _read_all(job, "node_*.json")]
    failures = [ended for agent in agents for ended in agent["failures"]]
    for ended in failures:
        if ended["signal"] and ended["rank"] not in own:
            causes.append((ended[clock] - _NOTICE_SECONDS, _of_signal(job, ended, oom_kills)))
    if causes:
        return min(causes, key=lambda cause: cause[0])[1]
    seen_to_hang = [r for r in reports if r.get("hung")]
    if seen_to_hang:  # the hung ranks were frozen: they have nothing to say, and the agent killed them after the others
        said = min(seen_to_hang, key=lambda r: r.get(clock, 0.0))
        return Failure(kind="hang", message=said["message"], rank=said["hung"][0], details=job.errors)
    if shutil.disk_usage(job.run_dir).free < _FULL_BYTES:
        message = f"the disk of {job.run_dir} is full; make room, or set run.dir to another one"
        return Failure(kind="user", message=message, exit_code=2)
    silent = [ended for ended in failures if not any(r.get("rank") == ended["rank"] for r in reports)]
    for ended in silent or failures:
        return _of_silent_exit(job, ended)
    if any(agent.get("exit_code") == 75 for agent in agents):
        return Failure(kind="interrupted", message=saved(job.run_dir), exit_code=75)
    for agent in agents:
        if agent["stopped_by"]:
            return Failure(kind="interrupted", message=f"stopped by {agent['stopped_by']}")
    last = _last_lines(agent_output)
    return Failure(
        kind="launch",
        message="the agent that starts the ranks ended without a word" + (f":\n{last}" if last else ""),
        details=job.logs,
    )


def _of_report(job: Job, report: dict[str, Any]) -> Failure:
    kind, rank = report.get("kind", "internal"), report.get("rank")
    message = str(report.get("message", "")).strip() or "no message"
    if kind == "user":
        return Failure(kind=kind, message=message, rank=rank, exit_code=2)
    if kind not in ("nan", "hang"):  # whose message says which rank it was, or it was all of them
        message = f"rank {rank} failed: {message}"
    return Failure(kind=kind, message=message, rank=rank, details=job.errors / f"rank_{rank}.json")


def _of_node(node: dict[str, Any]) -> Failure:
    return Failure(kind=node["kind"], message=node["message"], exit_code=2 if node["kind"] == "user" else 1)


def _of_signal(job: Job, ended: dict[str, Any], oom_kills: int) -> Failure:
    rank, name = ended["rank"], ended["signal"]
    where = f" {ended['where']}" if ended.get("where") else ""
    if ended.get("hung"):
        message = f"rank {rank} made no progress{where} and was killed"
        return Failure(kind="hang", message=message, rank=rank, details=job.logs)
    likely = _LIKELY.get(name, "see the log")
    if name == "SIGKILL" and oom_kills:
        likely = "memory ran out (the kernel counts an out-of-memory kill); use smaller tables, batches or fewer ranks"
    log = job.logs / f"rank_{rank}.err"
    last = "" if name in ("SIGKILL", "SIGTERM") else _last_lines(_text(log))
    message = f"rank {rank} was killed by {name}{where}: {likely}" + (f"\n{last}" if last else "")
    return Failure(kind="signal", message=message, rank=rank, details=log if _text(log) else job.logs)


def _of_silent_exit(job: Job, ended: dict[str, Any]) -> Failure:
    rank, code = ended["rank"], ended["exit_code"]
    log = job.logs / f"rank_{rank}.err"
    if code == 75:
        return Failure(kind="interrupted", message=saved(job.run_dir), exit_code=75)
    last = _last_lines(_text(log))
    message = f"rank {rank} ended with exit code {code}" + (f":\n{last}" if last else " and printed nothing")
    return Failure(kind="internal", message=message, rank=rank, details=log, exit_code=2 if code == 2 else 1)


def _last_lines(text: str, count: int = 3) -> str:
    """The last lines that say something: of a Python traceback its final line alone, of faulthandler's nothing."""
    lines = [
        line for line in text.split("Fatal Python error:")[0].splitlines() if line.strip() and not quiet.is_noise(line)
    ]
    start = max(
        (i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")), default=None
    )
    if start is not None:
        lines = [line for line in lines[start + 1 :] if not line.startswith((" ", "Traceback"))]
    return "\n".join(line.rstrip() for line in lines[-count:])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _read_all(job: Job, pattern: str) -> list[dict[str, Any]]:
    return [found for path in sorted(job.errors.glob(pattern)) if (found := _read(path)) is not None]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or its writer was killed in the middle
        return None
    return found if isinstance(found, dict) else None
