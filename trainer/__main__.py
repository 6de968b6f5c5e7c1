"""What each rank runs: `python -m trainer JOB.json`.

JOB.json: {"action": "train" | "eval" | "predict", "run_dir"}; for train also "resume" ("auto" or a checkpoint's path)
and, in a chaos run, "faults" (trainer/faults.py) and "rows" (trainer/rowlog.py); for eval and predict "dataset",
"split", "out" and "result", the file that rank 0 writes the answer to.
On an error the rank writes errors/rank_R.json into the run folder; the command line makes one readable cause of what
all ranks wrote. Another rank's death is noticed in three ways, whichever is first: the watching thread
(trainer/watch.py) reads of it, a collective breaks, or the agent sends SIGINT. All give a report of kind "peer".
"""

import errno
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import pulse, quiet, restarts
from trainer.faults import Fault, Strike
from trainer.watch import Watch, end_in_words

quiet.install()

from kernels.errors import UserError  # noqa: E402  (the filters must be in place before torch is imported)

START_SECONDS = 300.0  # for imports; then the config's run.timeout_seconds
PEER_SECONDS = 3.0  # for the watching thread to name the rank that broke a collective


class Interrupted(BaseException):
    """A signal to stop before the training has begun: between two Python instructions of the main thread."""


class PeerFailed(BaseException):
    """SIGINT: the agent says that another rank has failed."""


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text())
    run_dir = Path(job["run_dir"])
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGINT, _peer_failed)
    rank = int(os.environ.get("RANK", "0"))
    watch = _watch(job, run_dir, rank)
    try:
        code = _run(job, run_dir, watch)
    except PeerFailed:
        return _leave_for_peer(watch, run_dir, rank, "another rank failed")
    except Interrupted as stopped:
        if job["action"] == "train" and rank == 0:
            _close_report(run_dir, error={"rank": 0, "kind": "interrupted", "message": str(stopped)})
        saved = job.get("resume") and any(run_dir.glob("checkpoints/step_*/manifest.json"))  # nothing is lost
        return _leave(75 if saved else 1)
    except BaseException as error:  # whatever it is, the other ranks and the user must hear of it
        kind, message = _classify(error)
        if kind == "peer":
            return _leave_for_peer(watch, run_dir, rank, message)
        if kind == "timeout":
            return _leave_for_timeout(watch, run_dir, rank, message)
        _write_error(run_dir, rank, kind, message)
        return _leave(2 if kind == "user" else 1)
    return _leave(code)


def _watch(job: dict[str, Any], run_dir: Path, rank: int) -> Watch:
    """Begin to say where this rank is, and to look where the others are. Faults on order strike from here."""
    own = pulse.start(hang_seconds=START_SECONDS, first_seconds=START_SECONDS)
    faults, attempt = job.get("faults", []), restarts.attempt()
    if attempt < len(faults) and faults[attempt]["rank"] == rank:
        own.on_mark = Strike(Fault(**faults[attempt]), Path(f"{job['rows']}.fault_{attempt}")).on_mark

    def on_verdict(verdict: pulse.Verdict, mine: bool) -> None:
        hung = [r.rank for r in verdict.ranks] if verdict.kind == "hang" else []
        kind = "hang" if mine and hung else "peer"
        _write_error(run_dir, rank, kind, verdict.message(end_in_words), stack=watch.stack(), hung=hung)
        _leave(1)

    watch = Watch(own, rank=rank, local_rank=int(os.environ.get("LOCAL_RANK", "0")), on_verdict=on_verdict)
    watch.start()
    return watch


def _run(job: dict[str, Any], run_dir: Path, watch: Watch) -> int:
    """The exit code: 0, or 75 when the training was stopped and is saved."""
    import torch.distributed as dist

    from trainer import config as configs
    from trainer import report
    from trainer.checkpoint.session import Stopped
    from trainer.trainer import evaluate_run, predict_run, train
    from trainer.world import World

    config = configs.load(run_dir / "config.toml")
    world = World.from_env()
    config.check_world_size(world.size)
    watch.pulse.set_limits(hang_seconds=config.run.hang_seconds, first_seconds=config.run.timeout_seconds)
    pulse.mark("building", 0)
    watch.join_hosts(world.connect(config.run.timeout_seconds), world_size=world.size)
    if job["action"] == "train":
        try:
            resume = job.get("resume") or ("auto" if restarts.attempt() else None)
            train(config, run_dir, world, resume=resume, profiled=bool(job.get("profile")), rows=job.get("rows"))
        except Stopped:
            watch.stop()
            watch.pulse.done()
            dist.barrier()  # nobody leaves while another rank still needs it
            return 75
    else:
        options = {key: job.get(key) for key in ("dataset", "split")}
        if job["action"] == "eval":
            result = evaluate_run(config, run_dir, world, **options)
        else:
            result = predict_run(config, run_dir, world, out=Path(job["out"]), **options)
        if world.is_first:
            target = Path(job["result"])
            report.write_json(target.parent, result, name=target.name)
    watch.stop()
    watch.pulse.done()
    dist.destroy_process_group()
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def _peer_failed(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough, and the report is to be written in peace
    raise PeerFailed


def _leave_for_peer(watch: Watch, run_dir: Path, rank: int, message: str) -> int:
    """Another rank has gone: the watching thread, which knows more, reports it; if it does not see it, we do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch.join(PEER_SECONDS)
    _write_error(run_dir, rank, "peer", message)
    return _leave(1)


def _leave_for_timeout(watch: Watch, run_dir: Path, rank: int, message: str) -> int:
    """A collective waited run.timeout_seconds in vain, before the watching thread saw a reason to end the run."""
    watch.stop()
    now = pulse.judge(replace(r, limit=0.0) for r in watch.seen())
    culprits = now.ranks if now else ()
    said = f"{now.message(end_in_words)} (a collective waited for run.timeout_seconds)" if now else message
    mine = rank in [r.rank for r in culprits]
    _write_error(run_dir, rank, "hang" if mine else "peer", said, hung=[r.rank for r in culprits])
    return _leave(1)


def _classify(error: BaseException) -> tuple[str, str]:
    """(kind, message) of an error: user, nan, memory, peer, timeout or internal."""
    from trainer.task import NonFiniteLoss

    if isinstance(error, (NonFiniteLoss, FloatingPointError)):  # the loss, or the logits of an evaluation
        return "nan", str(error)
    if isinstance(error, UserError):
        return "user", str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return "user", f"the disk is full{where}; free some space: the checkpoints that were finished are whole"
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _MEMORY)):
        last = text.strip().splitlines()[0] if text.strip() else "no more could be had"
        return "memory", f"memory ran out ({last}); use smaller tables or batches, more ranks, or less data.prefetch"
    if isinstance(error, RuntimeError) and any(sign in text for sign in _PEER):
        return "peer", text
    if isinstance(error, RuntimeError) and any(sign in text for sign in _TIME_OUT):
        return "timeout", f"another rank hangs, or fell behind by more than run.timeout_seconds: {text}"
    return "internal", f"{type(error).__name__}: {text}"


# What gloo and NCCL say when another rank has gone or is silent. The latter is the first sign of a hung rank, not the
# echo of an error that another one reports.
_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",
)
_TIME_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout")
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # of torch's allocators


def _write_error(
    run_dir: Path, rank: int, kind: str, message: str, *, stack: str | None = None, hung: list[int] | None = None
) -> None:
    """errors/rank_R.json; on stderr too where it cannot be written, so that it is never lost.

    stack: of the main thread when another one writes. hung: the ranks that make no progress.
    """
    line = {"rank": rank, "time": time.time(), "at": time.monotonic(), "kind": kind, "message": message}
    line |= {"traceback": traceback.format_exc() if stack is None else stack, "hung": hung or []}
    try:
        (run_dir / "errors").mkdir(exist_ok=True)
        (run_dir / "errors" / f"rank_{rank}.json").write_text(json.dumps(line, indent=1))
    except OSError:
        print(f"rank {rank}: {message}", file=sys.stderr)


def _close_report(run_dir: Path, *, error: dict[str, Any]) -> None:
    from trainer import report

    try:
        found = report.read(run_dir)
    except UserError:  # stopped before there was one; the command line writes it
        return
    if found["status"] == "running":
        report.write_json(run_dir, found | {"status": "interrupted", "error": error, "finished": time.time()})
        report.write_html(run_dir)


def _leave(code: int) -> int:
    """End at once: a normal exit would wait for threads and collectives whose other side may be gone.

    And after success, too: Python ends a daemon thread that comes back from a call by unwinding its C++ stack, which
    aborts the process. The thread that talks to the other hosts is in such a call for as long as a lost packet takes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
