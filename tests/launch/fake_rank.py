"""Stands in for `python -m trainer`: writes what a rank writes, and fails in the way that FAKE names."""

import json
import os
import signal
import sys
import time
from pathlib import Path

DEPRECATION = (
    "site-packages/torch/x.py:1: FutureWarning: Please use DTensor instead and we are deprecating ShardedTensor."
)


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    run_dir, rank, mode = Path(job["run_dir"]), int(os.environ["RANK"]), os.environ.get("FAKE", "ok")
    _write(run_dir / f"rank_{rank}.pid", str(os.getpid()))
    _write(run_dir / f"rank_{rank}.env", json.dumps(dict(os.environ)))
    print(f"{DEPRECATION}\n  a line of torch's source\nreal trouble ahead", file=sys.stderr, flush=True)
    if rank == 0:
        _event(run_dir, event="start", run=run_dir.name, world_size=int(os.environ["WORLD_SIZE"]), device="cpu")
    if mode == "ok":
        if rank == 0:
            _event(run_dir, event="train", step=1, loss=0.5, auc=0.7, samples=10, samples_per_second=100.0)
            _finish(run_dir, job)
        return 0
    while len(list(run_dir.glob("rank_*.pid"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    if mode == "wait" or rank == 0:
        if mode == "stuck":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
    return _fail(run_dir, rank, mode)


def _write(path: Path, text: str) -> None:
    """In one move: the tests, and the other rank, take a file that is there for a whole one."""
    made = path.with_name(f".{path.name}")
    made.write_text(text)
    made.replace(path)


def _fail(run_dir: Path, rank: int, mode: str) -> int:
    if mode == "user":
        _report(run_dir, rank, "user", "table t7: id 9 is outside its 8 rows\nset id_policy = 'hash'")
        return 2
    if mode in ("kill", "stuck"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "kill_agent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(300)
    if mode == "exit_75":
        return 75
    raise RuntimeError("boom")


def _finish(run_dir: Path, job: dict) -> None:
    figures = {"split": "test", "auc": 0.79, "ne": 0.9, "logloss": 0.45, "calibration": 1.0, "rows": 60000}
    if "result" in job:
        Path(job["result"]).write_text(json.dumps(figures | {"job": job}))
        return
    report = {"name": run_dir.name, "status": "finished", "world_size": 2, "eval": figures, "bayes": {"auc": 0.795}}
    (run_dir / "report.json").write_text(json.dumps(report))


def _report(run_dir: Path, rank: int, kind: str, message: str) -> None:
    (run_dir / "errors").mkdir(exist_ok=True)
    error = {"rank": rank, "time": time.time(), "kind": kind, "message": message, "traceback": "..."}
    (run_dir / "errors" / f"rank_{rank}.json").write_text(json.dumps(error))


def _event(run_dir: Path, **values: object) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"time": time.time(), **values}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
