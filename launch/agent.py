"""Starts the ranks of one node under torch's elastic agent, and writes down how each of them ended.

`python -m launch.agent --nproc N --module trainer --job JOB.json --logs DIR --errors DIR`
Of a job on several nodes each node has such an agent (launch/node.py starts it) with `--nodes --node-rank --master
--port`: the address of node 0 and a port there, which all ranks use to find each other.

When a rank ends with anything but 0, the others get SIGTERM and, FAILED_GRACE_SECONDS later, SIGKILL. Then
ERRORS/agent.json (agent_R.json on node R > 0) says which ranks ended first and how:
    {"time": unix, "stopped_by": null | signal name that the agent itself got, "exit_code": of the agent,
     "failures": [{"rank", "exit_code", "signal": null | name, "time"}]}     ranks that the agent stopped are left out
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
import sys
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

from trainer import quiet

FAILED_GRACE_SECONDS = 4  # for the others after a rank has failed
RENDEZVOUS_SECONDS = 120  # for the agents of all nodes, which have just met in launch/node.py


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.agent")
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--errors", type=Path, required=True)
    parser.add_argument("--grace", type=int, required=True, help="seconds to save and leave in when the job is stopped")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master", default="localhost")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args(argv)

    from launch.rank import die_with_parent

    if argv is None:  # a program of its own
        die_with_parent(signal.SIGTERM)
    quiet.install()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each rank it stops

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    context = _install_context(args.grace)
    signal.signal(signal.SIGUSR1, lambda number, frame: context.pass_on(number))
    args.logs.mkdir(parents=True, exist_ok=True)
    (args.logs / (f"agent_{args.node_rank}.pid" if args.node_rank else "agent.pid")).write_text(f"{os.getpid()}\n")
    config = LaunchConfig(
        nproc_per_node=args.nproc,
        role="trainer",
        **_rendezvous(args),
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=_logs_specs(args.logs),
        shutdown_timeout=args.grace,
    )
    stopped_by = None
    try:
        elastic_launch(config, sys.executable)("-m", "launch.rank", args.module, args.job)
    except ChildFailedError:
        pass
    except SignalException as stopped:
        stopped_by = stopped.sigval.name
    first = context.first
    if not first and stopped_by is None:
        return 0
    failures = [
        {"rank": rank, "exit_code": code, "signal": _signal_name(code), "time": at}
        for rank, (code, at) in sorted(first.items(), key=lambda item: item[1][1])
    ]
    codes = {code for code, _ in (context.ended if stopped_by else first).values()}
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


def _install_context(grace: int) -> Any:
    """Have torch's agent use a process context that keeps the order of deaths and does not wait 30 s for a stuck rank.

    Torch gives neither as an option: `SubprocessContext._poll` calls `close()` with its default timeout.
    """
    import torch.distributed.elastic.multiprocessing as multiprocessing

    torchs_own = getattr(multiprocessing.SubprocessContext, "torchs_own", multiprocessing.SubprocessContext)

    class Context(torchs_own):
        # rank -> (exit code, time): of those that ended badly by themselves, and of all after they were stopped
        first: ClassVar[dict[int, tuple[int, float]]] = {}
        ended: ClassVar[dict[int, tuple[int, float]]] = {}
        running: ClassVar[Any] = None

        def _start(self) -> None:
            super()._start()
            Context.running = self

        @classmethod
        def pass_on(cls, number: int) -> None:
            """Send a signal to every living rank."""
            for handler in cls.running.subprocess_handlers.values() if cls.running else ():
                if handler.proc.poll() is None:
                    handler.proc.send_signal(number)

        def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
            if not Context.first:
                self._note(Context.first)
            super()._close(death_sig, FAILED_GRACE_SECONDS if Context.first else min(timeout, grace))
            self._note(Context.ended)

        def _note(self, into: dict[int, tuple[int, float]]) -> None:
            for local_rank, handler in self.subprocess_handlers.items():
                code = handler.proc.poll()
                if code:
                    into[int(self.envs[local_rank]["RANK"])] = (code, time.time())

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
