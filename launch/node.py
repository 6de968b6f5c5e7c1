"""One node of a submitted job: meet the other nodes, examine the node if asked, start the ranks, start them again.

`python -m launch.node --nodes N --node-rank R --head NAME --port P --run-id ID --nproc G --job JOB.json [...]`

A scheduler runs this once on every node. R is a number or `$NAME`, an environment variable that holds it; NAME is the
environment variable with node 0's address. In order:

1. Roll call: every node tells node 0 its name and versions. The job ends with the names of the nodes that did not come
   within WAIT_SECONDS, or that have other versions than most.
2. Node 0 writes the run folder (config.toml, JOB.json) from TABLEMESH_CONFIG where the submitting machine could not,
   prepares the data where the config says how and it is missing, and lets the others go on.
3. With --preflight the ranks run launch.preflight first (once).
4. The ranks run under launch.agent. All nodes tell node 0 how that ended. After a failure that is not the user's, node
   0 has all start again, --restarts times at most; the ranks go on from the newest checkpoint.
5. Node 0 finds the cause of a failure, writes it into the report and prints it.

Exit code: 0 done, 2 the user's input was wrong, 75 stopped after a checkpoint (queue the job again), 1 anything else.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from launch import failure, job, roll_call, rundir
from launch.failure import Failure
from trainer import quiet

CONFIG = "TABLEMESH_CONFIG"  # environment variable with the TOML of a run folder that is yet to be made
RESTART_SECONDS = 1.0  # between two attempts: sockets of the last one close
AGAIN = "again"


class Stopped(BaseException):
    """A signal came while no ranks ran."""


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    quiet.install()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    work = job.Job(
        name=args.job.parent.name,
        action="train",
        run_dir=args.job.parent,
        nproc=args.nproc,
        nodes=args.nodes,
        threads=1,
    )
    started = time.time()
    try:
        nodes = roll_call.Nodes.meet(
            rank=args.node_rank,
            count=args.nodes,
            head=args.head,
            port=args.port,
            run_id=args.run_id,
            wait=timedelta(seconds=args.wait),
        )
        if args.node_rank == 0:
            _deliver(work)
        return _run(args, work, nodes, started)
    except roll_call.Missing as missing:
        ended = Failure(kind="launch", message=str(missing))
        _finish(args, work, ended, started)
        return 1
    except UserError as error:
        _finish(args, work, Failure(kind="user", message=str(error), exit_code=2), started)
        return 2
    except Stopped as stopped:
        print(f"node {args.node_rank}: stopped by {stopped} before the ranks had started", file=sys.stderr)
        return 75 if str(stopped) == "SIGUSR1" else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.node")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node-rank", type=_number, required=True)
    parser.add_argument("--head", required=True, help="environment variable with the address of node 0")
    parser.add_argument("--port", type=_number, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--grace", type=int, default=60, help="seconds to save in when the job is stopped")
    parser.add_argument("--preflight", action="store_true")
    parser.add_argument("--module", default="trainer")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--wait", type=float, default=job.WAIT_SECONDS, help="seconds for all nodes to come")
    args = parser.parse_args(argv)
    args.head = os.environ.get(args.head, "localhost")
    args.run_id = os.path.expandvars(args.run_id)
    return args


def _number(text: str) -> int:
    return int(os.path.expandvars(text))


def _stop(number: int, frame: Any) -> None:
    raise Stopped(signal.Signals(number).name)


def _deliver(work: job.Job) -> None:
    """Make the run folder where it comes with the job, and the data set where it is missing."""
    text = os.environ.get(CONFIG)
    if text is not None:
        try:
            work.run_dir.mkdir(parents=True, exist_ok=True)
            (work.run_dir / "config.toml").write_text(text)
        except OSError as error:
            raise UserError(f"{work.run_dir}: cannot make the run folder: {error.strerror}; mount a volume") from error
        job.resuming(work).write()
    from rich.console import Console

    from launch import dataset
    from trainer import config as configs

    dataset.prepare_missing(Console(stderr=True), configs.load(work.run_dir / "config.toml"))


def _run(args: argparse.Namespace, work: job.Job, nodes: roll_call.Nodes, started: float) -> int:
    """All attempts; returns this node's exit code."""
    modules = ["launch.preflight"] if args.preflight else []
    left = args.restarts
    for attempt, module in enumerate([*modules, *[args.module] * (left + 1)]):
        if args.node_rank == 0:
            failure.clear(work)
        nodes.ready(attempt)
        code = _agent(args, work, nodes, module, port=args.port + 1 + attempt)
        codes = nodes.gather(attempt, code)
        if codes is not None:  # node 0, which decides
            verdict = _verdict(args, work, codes, again=module == args.module and left > 0, started=started)
            if verdict == "0" and module != args.module:
                verdict = AGAIN
            nodes.tell(attempt, verdict)
        else:
            verdict = nodes.verdict(attempt, default=str(code or 1))
        if verdict != AGAIN:
            return int(verdict)
        if module == args.module:
            left -= 1
        time.sleep(RESTART_SECONDS)
    raise AssertionError("the last attempt returns")


def _agent(args: argparse.Namespace, work: job.Job, nodes: roll_call.Nodes, module: str, port: int) -> int:
    """Start the ranks of this node and wait for their end; an agent's exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException

    from launch import agent

    words = [
        *("--nproc", str(args.nproc)),
        *("--module", module),
        *("--job", str(args.job)),
        *("--logs", str(work.logs)),
        *("--errors", str(work.errors)),
        *("--grace", str(args.grace)),
        *("--nodes", str(args.nodes)),
        *("--node-rank", str(args.node_rank)),
        *("--master", nodes.master),
        *("--port", str(port)),
    ]
    try:
        return agent.main(words)
    except SignalException:  # a second signal, after the ranks have gone
        return 1
    except (OSError, RuntimeError) as error:  # the other nodes' agents did not come, or this one's port is taken
        note(work, args.node_rank, "launch", f"node {args.node_rank} ({socket.gethostname()}): {error}")
        return 1


def _verdict(args: argparse.Namespace, work: job.Job, codes: list[int | None], *, again: bool, started: float) -> str:
    """What all nodes do now: AGAIN, or leave with this exit code. codes: of the nodes, None where one is silent."""
    if all(code == 0 for code in codes):
        return "0"
    if all(code == 75 for code in codes):
        print("stopped after a checkpoint; the job can go on from there", file=sys.stderr)
        return "75"
    silent = [nodes for nodes, code in enumerate(codes) if code is None]
    ended = failure.explain(work)
    if silent and ended.kind in ("launch", "interrupted"):
        ended = Failure(kind="launch", message=f"node {silent[0]} of {args.nodes} has gone")
    if again and not silent and ended.kind not in ("user", "nan", "interrupted"):
        print(f"{ended.message}\nstarting again from the newest checkpoint", file=sys.stderr, flush=True)
        return AGAIN
    _finish(args, work, ended, started)
    return str(ended.exit_code)


def _finish(args: argparse.Namespace, work: job.Job, ended: Failure, started: float) -> None:
    """Say why the job ended, to people and in the report."""
    for line in ended.message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    if args.node_rank == 0 and work.run_dir.is_dir():
        try:
            rundir.close(
                work.run_dir, name=work.name, world_size=args.nodes * args.nproc, started=started, failure=ended
            )
        except UserError as error:
            print(f"error: and the report could not be written: {error}", file=sys.stderr)


def note(work: job.Job, node_rank: int, kind: str, message: str) -> None:
    """errors/node_R.json, which launch/failure.py reads."""
    work.errors.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"time": time.time(), "at": time.monotonic(), "kind": kind, "message": message}, indent=1)
    (work.errors / f"node_{node_rank}.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
