"""Starts the ranks of one node under torch's elastic agent, restarts them, and writes down how each of them ended.

`python -m launch.agent --nproc N --module trainer --job JOB.json --logs DIR --errors DIR --grace SECONDS
        [--max-restarts N]`
Of a job on several nodes each node has such an agent (launch/node.py starts it) with `--nodes --node-rank --master
--port`: the address of node 0 and a port there, which all ranks use to find each other.

When a rank ends with anything but 0, the others hear of it on the board (trainer/pulse.py) and leave with a report of
their own; who has not left gets SIGINT at once and, FAILED_GRACE_SECONDS later, SIGKILL. SIGTERM is never sent for
that: to a rank it means "save a checkpoint and leave". Then ERRORS/agent.json (agent_R.json on node R > 0) says which
ranks ended first and how:
    {"time": unix, "stopped_by": null | signal name that the agent itself got, "exit_code": of the agent,
     "failures": [{"rank", "exit_code", "signal": null | name, "time", "at": monotonic seconds, "where": text, "hung"}]}
Ranks that the agent stopped are left out. hung: it made no progress and the agent killed it, as nobody else did.

Restarts: after a failure that need not come again, up to --max-restarts times. Every attempt is a launch of its own,
with new stores, so that no rank can read a dead one's address; what the failed attempt left in ERRORS and LOGS goes to
attempt_K/ in each, and TABLEMESH_ATTEMPT tells the ranks to resume from the newest valid checkpoint.

Exit code: 0, or 2 when every failed rank exited with 2 (the user's input), 75 likewise (stopped after a checkpoint),
otherwise 1. SIGUSR1 is passed on to the ranks, which save and end with 75.
LOGS/agent.pid (agent_R.pid) holds the agent's process id.
Torch's own error page is not printed: `launch.failure` makes one line of it.
"""

import argparse
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from trainer import pulse, quiet
from trainer.restarts import ATTEMPT, Restart

FAILED_GRACE_SECONDS = 4  # for the others after a rank has failed
RENDEZVOUS_SECONDS = 120  # for the agents of all nodes, which have just met in launch/node.py
HANG_GRACE_SECONDS = 5.0  # hung ranks end themselves, or the others do; the agent steps in this much later

_FINAL = ("user", "nan", "interrupted")  # kinds of failure that a restart would meet again, or that nobody wants undone


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.agent")
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--errors", type=Path, required=True)
    parser.add_argument("--grace", type=int, required=True, help="seconds to save and leave in when the job is stopped")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master", default="localhost")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-restarts", type=int, default=0, help="of a job on one node")
    args = parser.parse_args(argv)

    from launch.rank import die_with_parent

    if argv is None:  # a program of its own
        die_with_parent(signal.SIGTERM)
    quiet.install()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each rank it stops

    from torch.distributed.elastic.multiprocessing import SignalException

    context = _install_context(args.grace)
    signal.signal(signal.SIGUSR1, lambda number, frame: context.pass_on(number))
    args.logs.mkdir(parents=True, exist_ok=True)
    (args.logs / (f"agent_{args.node_rank}.pid" if args.node_rank else "agent.pid")).write_text(f"{os.getpid()}\n")
    try:
        for attempt in range(args.max_restarts + 1):
            code = _attempt(args, context, attempt)
            if code in (0, 2, 75) or attempt == args.max_restarts or not _prepare_restart(args, attempt + 1):
                return code
    except SignalException:  # between two attempts
        return 1
    raise AssertionError("the last attempt returns")


def _attempt(args: argparse.Namespace, context: Any, attempt: int) -> int:
    """One launch of all ranks to its end; returns the agent's exit code and writes agent.json unless it is 0."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        nproc_per_node=args.nproc,
        role="trainer",
        **_rendezvous(args),
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=_logs_specs(args.logs),
        shutdown_timeout=args.grace,
    )
    board = args.logs / f"board_{socket.gethostname()}"
    context.begin(pulse.Board.create(board, args.nproc))
    os.environ |= {pulse.BOARD_FILE: str(board), ATTEMPT: str(attempt)}
    stopped_by = None
    try:
        elastic_launch(config, sys.executable)("-m", "launch.rank", args.module, str(args.job))
    except ChildFailedError:
        pass
    except SignalException as stopped:
        stopped_by = stopped.sigval.name
    first = context.first
    if not first and stopped_by is None:
        return 0
    failures = sorted(first.values(), key=lambda failed: failed["at"])
    codes = set(context.ended.values()) if stopped_by else {failed["exit_code"] for failed in failures}
    exit_code = codes.pop() if codes in ({2}, {75}) else 1
    found = {"time": time.time(), "stopped_by": stopped_by, "exit_code": exit_code, "failures": failures}
    args.errors.mkdir(parents=True, exist_ok=True)
    (args.errors / (f"agent_{args.node_rank}.json" if args.node_rank else "agent.json")).write_text(
        json.dumps(found, indent=1) + "\n"
    )
    return exit_code


def _rendezvous(args: argparse.Namespace) -> dict[str, Any]:
    """How the agents find each other: one alone through a free port; several at a fixed address, in a fixed order.

    Not torch's dynamic rendezvous for several nodes: it numbers the nodes by their addresses, whoever was node 0, and
    its agents give up on each other by timeouts of their own.
    """
    nodes = {"min_nodes": args.nodes, "max_nodes": args.nodes}
    if args.nodes == 1:
        return nodes | {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "local_addr": "localhost",
        }
    return nodes | {
        "run_id": "tablemesh",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{args.master}:{args.port}",
        "rdzv_configs": {"rank": args.node_rank, "timeout": RENDEZVOUS_SECONDS},
    }


def _prepare_restart(args: argparse.Namespace, number: int) -> bool:
    """Note why attempt `number` is needed and put the last one's files aside; False when it would be in vain."""
    from launch import failure, rundir
    from launch.job import Job

    run_dir = args.job.parent
    job = Job(name=run_dir.name, action="train", run_dir=run_dir, nproc=args.nproc, threads=1)
    why = failure.explain(job)
    if why.kind in _FINAL:
        return False
    for folder in (args.errors, args.logs):
        aside = folder / f"attempt_{number}"
        aside.mkdir(exist_ok=True)
        for path in [*folder.glob("rank_*"), *folder.glob("agent*.json")]:
            path.replace(aside / path.name)
    restart = Restart(number=number, of=args.max_restarts, rank=why.rank, kind=why.kind, message=why.message)
    restart.write(args.errors)
    rundir.append_event(run_dir, "restart", **restart.as_json())
    return True


def _install_context(grace: int) -> Any:
    """Have torch's agent use a process context that keeps the order of deaths, tells the ranks of them, and does not
    wait 30 s for a stuck one.

    Torch gives none of it as an option: `SubprocessContext._poll` calls `close()` with its default signal and timeout.
    """
    import torch.distributed.elastic.multiprocessing as multiprocessing

    torchs_own = getattr(multiprocessing.SubprocessContext, "torchs_own", multiprocessing.SubprocessContext)

    class Context(torchs_own):
        first: ClassVar[dict[int, dict[str, Any]]] = {}  # by rank: the failures of agent.json
        ended: ClassVar[dict[int, int]] = {}  # by rank: exit codes of all that ended badly, after they were stopped
        hung: ClassVar[dict[int, pulse.Seen]] = {}
        board: ClassVar[pulse.Board]
        running: ClassVar[Any] = None

        @classmethod
        def begin(cls, board: pulse.Board) -> None:
            cls.first, cls.ended, cls.hung, cls.board, cls.running = {}, {}, {}, board, None

        @classmethod
        def pass_on(cls, number: int) -> None:
            """Send a signal to every living rank."""
            for handler in cls.running.subprocess_handlers.values() if cls.running else ():
                if handler.proc.poll() is None:
                    handler.proc.send_signal(number)

        def _start(self) -> None:
            super()._start()
            Context.running = self

        def _poll(self) -> Any:
            if not Context.hung:
                self._end_hung()
            return super()._poll()

        def _end_hung(self) -> None:
            """Kill ranks that hang and that no rank has reported: all are frozen, or there is but one."""
            seen = Context.board.seen(first_rank=self._rank(0))
            verdict = pulse.judge(replace(r, limit=r.limit + HANG_GRACE_SECONDS, ended=0) for r in seen)
            for rank in verdict.ranks if verdict else ():
                Context.hung[rank.rank] = rank
                self.subprocess_handlers[rank.rank - self._rank(0)].proc.kill()

        def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
            if not Context.first:
                self._note_first()
            codes = {failed["exit_code"] for failed in Context.first.values()}
            if codes - {75}:
                super()._close(signal.SIGINT, FAILED_GRACE_SECONDS)
            else:
                super()._close(death_sig, min(timeout, grace))
            for local_rank, handler in self.subprocess_handlers.items():
                if code := handler.proc.poll():
                    Context.ended[self._rank(local_rank)] = code

        def _note_first(self) -> None:
            seen = Context.board.seen(first_rank=self._rank(0))
            for local_rank, handler in self.subprocess_handlers.items():
                code, rank = handler.proc.poll(), self._rank(local_rank)
                if not code:
                    continue
                if code != 75:
                    Context.board.set_ended(local_rank, code)
                Context.first[rank] = {
                    "rank": rank,
                    "exit_code": code,
                    "signal": _signal_name(code),
                    "time": time.time(),
                    "at": time.monotonic(),
                    "where": (Context.hung.get(rank) or seen[local_rank]).where if seen[local_rank].marks else "",
                    "hung": rank in Context.hung,
                }

        def _rank(self, local_rank: int) -> int:
            return int(self.envs[local_rank]["RANK"])

    Context.torchs_own = torchs_own  # launch/node.py comes here once an attempt
    multiprocessing.SubprocessContext = Context
    return Context


def _logs_specs(folder: Path) -> Any:
    """Each rank's stdout and stderr in FOLDER/rank_R.out and FOLDER/rank_R.err, nothing else."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Logs(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(folder)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            folder.mkdir(parents=True, exist_ok=True)
            paths = {local_rank: str(folder / f"rank_{env['RANK']}") for local_rank, env in envs.items()}
            for env in envs.values():
                env["TORCHELASTIC_ERROR_FILE"] = ""  # the ranks write ERRORS/rank_R.json
            return LogsDest(
                stdouts={r: p + ".out" for r, p in paths.items()},
                stderrs={r: p + ".err" for r, p in paths.items()},
                error_files=dict.fromkeys(paths, os.devnull),
                filtered_stdout=os.devnull,
                filtered_stderr=os.devnull,
            )

    return Logs()


def _signal_name(exit_code: int) -> str | None:
    return signal.Signals(-exit_code).name if exit_code < 0 else None


if __name__ == "__main__":
    sys.exit(main())
