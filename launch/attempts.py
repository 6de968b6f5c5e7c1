"""The one place that starts the ranks of a job again: on one node, or on all of them together.

Every node runs this loop beside the others. After each attempt all nodes tell node 0 how it ended; node 0 finds the
cause and decides for all: done, over, or once more from the newest checkpoint. Before that it puts what the attempt
left in errors/ and logs/ into attempt_K/ of each, notes why attempt K was needed (trainer/restarts.py) and adds an
event to metrics.jsonl; TABLEMESH_ATTEMPT tells the ranks to resume.

A job that a scheduler queues again whenever it was stopped (exit code 75) ends for good when that happens STOPS times
with no new checkpoint between: it would be queued for ever.

No restart helps where the cause is the user's, a loss that is not finite, or a wish to stop; nor where a whole node is
gone: that one only the scheduler can replace.
"""

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from kernels.errors import UserError
from launch import failure, machine, rundir
from launch.agent import Agent
from launch.failure import Failure
from launch.job import Job
from launch.roll_call import Nodes
from trainer import runlog
from trainer.restarts import Restart

STOPS = 4  # more than a few evictions in a row make likely
RESTART_SECONDS = 1.0  # between two attempts of several nodes: sockets of the last one close
AGAIN = "again"
_FINAL = ("user", "nan", "interrupted")  # kinds of failure that a restart would meet again, or that nobody wants undone


class Stopped(BaseException):
    """A signal came while no ranks ran; its text is the signal's name."""


def catch_signals() -> None:
    """SIGTERM and SIGUSR1 raise Stopped from now on, but while ranks run: those get them (launch/agent.py)."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    raise Stopped(signal.Signals(number).name)


def run(
    agent: Agent,
    job: Job,
    nodes: Nodes,
    *,
    module: str,
    restarts: int = 0,
    first: int = 0,
    queued: bool = False,
    again: Callable[[Failure], None] = lambda why: None,
    conclude: Callable[[Failure], None] = lambda ended: None,
) -> int:
    """All attempts to run `module` in every rank; this node's exit code (launch/node.py lists them).

    first: number of the first attempt among all that these nodes make together: each has its own words in the nodes'
        store.
    queued: whether exit code 75 has a scheduler start the job again by itself.
    again, conclude: called on node 0, before the others hear of it, with the cause of a restart, and with that of the
        end when the job is over and has not succeeded.
    """
    for attempt in range(restarts + 1):
        turn = first + attempt
        if nodes.rank == 0 and attempt == 0:
            failure.clear(job)
        port = nodes.ready(turn)
        kills = machine.oom_kills()
        code = _launch(agent, job, nodes, module, attempt=attempt, port=port)
        codes = nodes.gather(turn, code)
        if codes is None:
            verdict = nodes.verdict(turn, default=str(code or 1))
        else:  # node 0
            verdict, ended = _decide(job, codes, again=attempt < restarts, oom_kills=machine.oom_kills() - kills)
            if verdict == AGAIN:
                _prepare_restart(agent, job, ended, number=attempt + 1, of=restarts)
                again(ended)
            elif ended is not None:
                if queued and verdict == "75":
                    ended = count_stop(job, ended)
                    verdict = str(ended.exit_code)
                conclude(ended)
            nodes.tell(turn, verdict)
        if verdict != AGAIN:
            return int(verdict)
        if nodes.count > 1:
            time.sleep(RESTART_SECONDS)
    raise AssertionError("the last attempt returns")


def _launch(agent: Agent, job: Job, nodes: Nodes, module: str, *, attempt: int, port: int) -> int:
    if nodes.count == 1:
        return agent.launch(module, attempt=attempt)
    try:
        return agent.launch(module, attempt=attempt, port=port)
    except (OSError, RuntimeError) as error:  # the other nodes' agents did not come
        note(job, nodes.rank, "launch", f"node {nodes.rank} ({socket.gethostname()}): {error}")
        return 1


def _decide(job: Job, codes: list[int | None], *, again: bool, oom_kills: int) -> tuple[str, Failure | None]:
    """What all nodes do now, AGAIN or the exit code that they leave with, and the cause where one failed.

    codes: of the nodes, None where one is silent. again: there may be another attempt. oom_kills: of this node's kernel
    in the meantime.
    """
    if all(code == 0 for code in codes):
        return "0", None
    if all(code == 75 for code in codes):
        return "75", Failure(kind="interrupted", message=failure.saved(job.run_dir), exit_code=75)
    ended = failure.explain(job, oom_kills=oom_kills)
    silent = [node for node, code in enumerate(codes) if code is None]
    if silent and ended.kind in ("launch", "interrupted"):
        ended = Failure(kind="launch", message=f"node {silent[0]} of {len(codes)} has gone")
    if again and not silent and ended.kind not in _FINAL:
        return AGAIN, ended
    return str(ended.exit_code), ended


def count_stop(job: Job, ended: Failure) -> Failure:
    """On node 0, of a job that is to be queued again: note it in metrics.jsonl; another cause where it was the STOPS-th
    stop with no new checkpoint between."""
    try:
        rundir.append_event(job.run_dir, "stopped")
    except UserError as error:  # there may be no run folder yet
        print(f"the stop could not be noted: {error}", file=sys.stderr)
        return ended
    stops, step = 0, None
    for event in runlog.events(job.run_dir / "metrics.jsonl"):
        if event["event"] == "checkpoint":
            stops, step = 0, event.get("step")
        elif event["event"] == "end" and event.get("status") == "failed":  # as below: the user has heard of it
            stops = 0
        elif event["event"] == "stopped":
            stops += 1
    if stops < STOPS:
        return ended
    last = "there is none" if step is None else f"the last one is of step {step}"
    message = (
        f"stopped {stops} times with no new checkpoint between ({last}), so the job is not queued again: it needs "
        "longer to start than it is left to run; give it more time (--time) and submit the run again"
    )
    return Failure(kind="user", message=message, exit_code=2)


def _prepare_restart(agent: Agent, job: Job, why: Failure, *, number: int, of: int) -> None:
    """Put the last attempt's files aside and note why another one is needed."""
    for folder in (agent.ranks.errors, agent.ranks.logs):
        aside = folder / f"attempt_{number}"
        aside.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("rank_*"), *folder.glob("agent*.json"), *folder.glob("node_*.json")]:
            path.replace(aside / path.name)
    restart = Restart(number=number, of=of, rank=why.rank, kind=why.kind, message=why.message)
    restart.write(agent.ranks.errors)
    rundir.append_event(job.run_dir, "restart", **restart.as_json())


def note(job: Job, node_rank: int, kind: str, message: str) -> None:
    """errors/node_R.json, which launch/failure.py reads."""
    job.errors.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"time": time.time(), "at": time.monotonic(), "kind": kind, "message": message}, indent=1)
    (job.errors / f"node_{node_rank}.json").write_text(text + "\n")
