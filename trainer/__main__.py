"""What each rank runs: `python -m trainer JOB.json`.

JOB.json: {"action": "train" | "eval" | "predict", "run_dir"}; for train also "resume" ("auto" or a checkpoint's path);
for eval and predict "dataset", "split", "out" and "result", the file that rank 0 writes the answer to.
On an error the rank writes errors/rank_R.json into the run folder; the command line makes one readable cause of what
all ranks wrote.
"""

import errno
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from trainer import quiet

quiet.install()

from kernels.errors import UserError  # noqa: E402  (the filters must be in place before torch is imported)


class Interrupted(BaseException):
    """A signal to stop before the training has begun: between two Python instructions of the main thread."""


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text())
    run_dir = Path(job["run_dir"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = _run(job, run_dir)
    except Interrupted as stopped:
        if job["action"] == "train" and rank == 0:
            _close_report(run_dir, error={"rank": 0, "kind": "interrupted", "message": str(stopped)})
        saved = job.get("resume") and any(run_dir.glob("checkpoints/step_*/manifest.json"))  # nothing is lost
        return _leave(75 if saved else 1)
    except BaseException as error:  # whatever it is, the other ranks and the user must hear of it
        kind, message = _classify(error)
        _write_error(run_dir, rank, kind, message)
        return _leave(2 if kind == "user" else 1)
    return _leave(code) if code else 0


def _run(job: dict[str, Any], run_dir: Path) -> int:
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
    world.connect(config.run.timeout_seconds)
    if job["action"] == "train":
        try:
            train(config, run_dir, world, resume=job.get("resume"), profiled=bool(job.get("profile")))
        except Stopped:
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
    dist.destroy_process_group()
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def _classify(error: BaseException) -> tuple[str, str]:
    """(kind, message) of an error: user, nan, peer or internal."""
    from trainer.task import NonFiniteLoss

    if isinstance(error, (NonFiniteLoss, FloatingPointError)):  # the loss, or the logits of an evaluation
        return "nan", str(error)
    if isinstance(error, UserError):
        return "user", str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return "user", f"the disk is full{where}; free some space: the checkpoints that were finished are whole"
    text = str(error)
    if isinstance(error, RuntimeError) and any(sign in text for sign in _PEER):
        return "peer", text
    if isinstance(error, RuntimeError) and any(sign in text for sign in _TIME_OUT):
        return "internal", f"another rank hangs, or fell behind by more than run.timeout_seconds: {text}"
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


def _write_error(run_dir: Path, rank: int, kind: str, message: str) -> None:
    """errors/rank_R.json; on stderr too where it cannot be written, so that it is never lost."""
    line = {"rank": rank, "time": time.time(), "kind": kind, "message": message, "traceback": traceback.format_exc()}
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
    """End at once: a normal exit would wait for threads and collectives whose other side may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
