"""One node of a submitted job: meet the other nodes, examine the node if asked, start the ranks, start them again.

`python -m launch.node --nodes N --node-rank R --head NAME --port P --run-id ID --nproc G --job JOB.json [...]`

A scheduler runs this once on every node. R is a number or `$NAME`, an environment variable that holds it; NAME is the
environment variable with node 0's address. In order:

1. Roll call: every node tells node 0 its name and versions. The job ends with the names of the nodes that did not come
   within WAIT_SECONDS, that have other versions than most, or fewer GPUs than the job asks for (--gpus). The ranks then
   use the interface by which node 0 is reached (launch/network.py), and share the node's CPUs unless OMP_NUM_THREADS
   says otherwise.
2. Node 0 writes the run folder (config.toml, JOB.json) from TABLEMESH_CONFIG where the submitting machine could not,
   prepares the data where the config says how and it is missing, and lets the others go on.
3. With --preflight the ranks run launch.preflight first (once).
4. The ranks run under launch.agent. All nodes tell node 0 how that ended; launch/attempts.py has all start again, as
   --restarts allows, from the newest checkpoint.
5. Node 0 finds the cause of a failure, writes it into the report and prints it.

Exit code: 0 done, 2 the user's input was wrong, 75 stopped after a checkpoint (queue the job again; not for ever,
see launch/attempts.py), 1 anything else. Stopped before the ranks began, the nodes but the first end with 0: the job's
code is the highest.
"""

import argparse
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from kernels.errors import UserError
from launch import agent, attempts, job, machine, network, rank, roll_call, rundir
from launch.failure import Failure
from trainer import quiet

NOT_BEGUN = "stopped before the ranks began; `tablemesh train RUN --resume auto` goes on from the newest checkpoint"
CONFIG = "TABLEMESH_CONFIG"  # environment variable with the TOML of a run folder that is yet to be made


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if os.environ.pop(job.TIED, None):
        rank.die_with_parent(signal.SIGTERM)
    quiet.install()
    attempts.catch_signals()
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
            gpus=args.gpus,
        )
        if args.nodes > 1:
            network.choose(nodes.master)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // args.nproc)))
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
    except attempts.Stopped as stopped:
        print(f"node {args.node_rank}: stopped by {stopped} while no ranks ran", file=sys.stderr)
        if str(stopped) != "SIGUSR1":
            return 1
        if args.node_rank != 0:  # srun's exit code is the highest: node 0 decides whether the job is queued again
            return 0
        ended = attempts.count_stop(work, Failure(kind="interrupted", message=NOT_BEGUN, exit_code=75))
        _finish(args, work, ended, started)
        return ended.exit_code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.node")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node-rank", type=_number, required=True)
    parser.add_argument("--head", required=True, help="environment variable with the address of node 0")
    parser.add_argument("--port", type=_number, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="that each node has to have")
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
    """Preflight and training; this node's exit code."""
    there = agent.Agent(
        agent.Ranks(
            nproc=args.nproc,
            job=args.job,
            logs=work.logs,
            errors=work.errors,
            grace=args.grace,
            nodes=args.nodes,
            node_rank=args.node_rank,
            master=nodes.master,
        )
    )

    def again(why: Failure) -> None:
        print(f"{why.message}\nstarting again from the newest checkpoint", file=sys.stderr, flush=True)

    def conclude(ended: Failure) -> None:
        _finish(args, work, ended, started)

    if args.preflight:
        code = attempts.run(there, work, nodes, module="launch.preflight", queued=True, conclude=conclude)
        if code:
            return code
    return attempts.run(
        there,
        work,
        nodes,
        module=args.module,
        restarts=args.restarts,
        first=1 if args.preflight else 0,
        queued=True,
        again=again,
        conclude=conclude,
    )


def _finish(args: argparse.Namespace, work: job.Job, ended: Failure, started: float) -> None:
    """Say why the job ended, to people and in the report, where the ranks have not said so themselves."""
    if ended.exit_code == 75:
        print(ended.message, file=sys.stderr, flush=True)
        return
    for line in ended.message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    if args.node_rank == 0 and work.run_dir.is_dir():
        try:
            rundir.close(
                work.run_dir, name=work.name, world_size=args.nodes * args.nproc, started=started, failure=ended
            )
        except UserError as error:
            print(f"error: and the report could not be written: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
