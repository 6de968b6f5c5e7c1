"""Starts the ranks of one node under torch's elastic agent, watches them, and writes down how each of them ended.

`python -m launch.agent --nproc N --module trainer --job JOB.json --logs DIR --errors DIR --grace SECONDS
        [--max-restarts N]`
is the agent of a job on one node; launch/node.py has one on each of several. Which failures start the ranks again is
decided in launch/attempts.py, for both.

When a rank ends with anything but 0, the others hear of it on the board (trainer/pulse.py) and leave with a report of
their own; who has not left gets SIGINT at once and, FAILED_GRACE_SECONDS later, SIGKILL. SIGTERM is never sent for
that: to a rank it means "save a checkpoint and leave". Then ERRORS/agent.json (agent_R.json on node R > 0) says which
ranks ended first and how:
    {"time": unix, "stopped_by": null | signal name that the agent itself got, "exit_code": of the agent,
     "failures": [{"rank", "exit_code", "signal": null | name, "time", "at": monotonic seconds, "where": text, "hung"}]}
Ranks that the agent stopped are left out. hung: it made no progress and the agent killed it, as nobody else did.

Exit code: 0, or 2 when every failed rank exited with 2 (the user's input), 75 likewise (stopped after a checkpoint),
otherwise 1. SIGUSR1 is passed on to the ranks, which save and end with 75; whatever else they end with then, but 2, the
agent ends with 75 all the same.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from launch.rank import AGENT, die_with_parent
from trainer import pulse, quiet
from trainer import store as stores
from trainer.restarts import ATTEMPT

FAILED_GRACE_SECONDS = 4  # for the others after a rank has failed
RENDEZVOUS_SECONDS = 120  # for the agents of all nodes, which have just met in launch/node.py
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)  # torch's agent takes four
HANG_GRACE_SECONDS = 5.0  # hung ranks end themselves, or the others do; the agent steps in this much later


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What to start on this node. master: the address of node 0, which the ranks of all nodes can reach."""

    nproc: int
    job: Path  # JOB.json
    logs: Path
    errors: Path
    grace: int  # seconds to save and leave in when the job is stopped
    nodes: int = 1
    node_rank: int = 0
    master: str = "localhost"


class Agent:
    """One for a process: torch's agent takes its signal handlers and a class of torch's is replaced."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each rank it stops
        self._context = _install_context(ranks.grace)
        suffix = f"_{ranks.node_rank}" if ranks.node_rank else ""
        self._found, self._pid = ranks.errors / f"agent{suffix}.json", ranks.logs / f"agent{suffix}.pid"

    def launch(self, module: str, *, attempt: int, port: int = 0) -> int:
        """All ranks, `python -m MODULE JOB.json`, to their end; the exit code, and agent.json unless it is 0.

        Every launch has stores of its own, so that no rank can read the address of a dead one. port: of this launch's
        with several nodes, open on node 0 (in this very process there).
        RuntimeError when the agents of the other nodes do not come.
        """
        from torch.distributed.elastic.multiprocessing import SignalException

        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            return self._launch(module, attempt, port)
        except SignalException:  # another one, after the ranks have gone
            return 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _launch(self, module: str, attempt: int, port: int) -> int:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        ranks, context = self.ranks, self._context
        ranks.logs.mkdir(parents=True, exist_ok=True)
        self._pid.write_text(f"{os.getpid()}\n")
        config = LaunchConfig(
            nproc_per_node=ranks.nproc,
            role="trainer",
            **_rendezvous(ranks, port),
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=_logs_specs(ranks.logs),
            shutdown_timeout=ranks.grace,
        )
        board = ranks.logs / f"board_{socket.gethostname()}_{ranks.node_rank}"
        context.begin(pulse.Board.create(board, ranks.nproc))
        asked = []  # to stop, by SIGUSR1

        def pass_on(number: int, frame: Any) -> None:
            asked.append(number)
            context.pass_on(number)

        signal.signal(signal.SIGUSR1, pass_on)
        os.environ |= {pulse.BOARD_FILE: str(board), ATTEMPT: str(attempt), AGENT: str(os.getpid())}
        # Another command's ranks may be starting in the same folder: the run's lock turns them away only later.
        store = ranks.logs / f"store_{socket.gethostname()}_{os.getpid()}"
        if ranks.nodes == 1:
            os.environ |= stores.prepare(store)
        stopped_by = None
        try:
            elastic_launch(config, sys.executable)("-m", "launch.rank", module, str(ranks.job))
        except ChildFailedError:
            pass
        except SignalException as stopped:
            stopped_by = stopped.sigval.name
        store.unlink(missing_ok=True)
        first = context.first
        if not first and stopped_by is None:
            return 0
        failures = sorted(first.values(), key=lambda failed: failed["at"])
        codes = set(context.ended.values()) if stopped_by else {failed["exit_code"] for failed in failures}
        exit_code = codes.pop() if codes in ({2}, {75}) else 1
        if asked and exit_code == 1:  # a rank that was starting, say, has nothing to save, and dies of the signal or of
            exit_code = 75  # another's end; a restart would run into the time limit, as the signal does not come twice
        found = {"time": time.time(), "stopped_by": stopped_by, "exit_code": exit_code, "failures": failures}
        ranks.errors.mkdir(parents=True, exist_ok=True)
        self._found.write_text(json.dumps(found, indent=1) + "\n")
        return exit_code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.agent")
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--errors", type=Path, required=True)
    parser.add_argument("--grace", type=int, required=True, help="seconds to save and leave in when the job is stopped")
    parser.add_argument("--max-restarts", type=int, default=0)
    args = parser.parse_args(argv)

    from launch import attempts, roll_call
    from launch.job import Job

    die_with_parent(signal.SIGTERM)
    quiet.install()
    attempts.catch_signals()
    run_dir = args.job.parent
    action = json.loads(args.job.read_text())["action"]
    job = Job(name=run_dir.name, action=action, run_dir=run_dir, nproc=args.nproc, threads=1)
    ranks = Ranks(nproc=args.nproc, job=args.job, logs=args.logs, errors=args.errors, grace=args.grace)
    try:
        return attempts.run(Agent(ranks), job, roll_call.Nodes.alone(), module=args.module, restarts=args.max_restarts)
    except attempts.Stopped:
        return 1


def _rendezvous(ranks: Ranks, port: int) -> dict[str, Any]:
    """How the agents find each other: one alone through a free port; several at a fixed address, in a fixed order.

    Not torch's dynamic rendezvous for several nodes: it numbers the nodes by their addresses, whoever was node 0, and
    its agents give up on each other by timeouts of their own.
    """
    nodes = {"min_nodes": ranks.nodes, "max_nodes": ranks.nodes}
    if ranks.nodes == 1:
        return nodes | {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "local_addr": "localhost",
        }
    return nodes | {
        "run_id": "tablemesh",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{ranks.master}:{port}",
        "rdzv_configs": {"rank": ranks.node_rank, "timeout": RENDEZVOUS_SECONDS},
    }


def _install_context(grace: int) -> Any:
    """Have torch's agent use a process context that keeps the order of deaths, tells the ranks of them, and does not
    wait 30 s for a stuck one.

    Torch gives none of it as an option: `SubprocessContext._poll` calls `close()` with its default signal and timeout.
    """
    import torch.distributed.elastic.multiprocessing as multiprocessing

    class Context(multiprocessing.SubprocessContext):
        first: ClassVar[dict[int, dict[str, Any]]] = {}  # by rank: the failures of agent.json
        ended: ClassVar[dict[int, int]] = {}  # by rank: exit codes of all that ended badly, after they were stopped
        hung: ClassVar[dict[int, pulse.Seen]] = {}
        board: ClassVar[pulse.Board]
        running: ClassVar[Any] = None
        early: ClassVar[list[int]] = []  # signals for the ranks that came before they were started

        @classmethod
        def begin(cls, board: pulse.Board) -> None:
            cls.first, cls.ended, cls.hung, cls.board, cls.running, cls.early = {}, {}, {}, board, None, []

        @classmethod
        def pass_on(cls, number: int) -> None:
            """Send a signal to every living rank, once there are any: the agents of several nodes wait for each
            other first."""
            if cls.running is None:
                cls.early.append(number)
                return
            for handler in cls.running.subprocess_handlers.values():
                if handler.proc.poll() is None:
                    handler.proc.send_signal(number)

        def _start(self) -> None:
            super()._start()
            Context.running = self
            for number in Context.early:
                Context.pass_on(number)

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
