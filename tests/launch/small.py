"""For the tests that start real hosts: a training of seconds, on one host and submitted."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 400.0  # for a run on a loaded machine; on two idle cores 10 to 40 s

CONFIG = """
name = "{name}"
[data]
path = "{data}"
prepare = "synthetic:criteo"
prepare_options = {{ rows = {rows}, seed = 1, scale = 0.01 }}
[tables]
dim = 8
sharding = "row_wise"
[model]
kind = "dlrm"
bottom = [16, 8]
top = [16, 1]
[optim]
sparse = {{ kind = "rowwise_adagrad", lr = 0.05 }}
dense = {{ kind = "adam", lr = 0.002 }}
[train]
batch_size = {batch}
epochs = {epochs}
log_every = {log_every}
"""


def write(
    folder: Path,
    *,
    name: str,
    data: Path,
    rows: int = 6000,
    batch: int = 256,
    epochs: int = 1,
    log_every: int = 2,
    more: str = "",
) -> Path:
    """FOLDER/NAME.toml. more: TOML that comes after it."""
    path = folder / f"{name}.toml"
    text = CONFIG.format(name=name, data=data, rows=rows, batch=batch, epochs=epochs, log_every=log_every)
    path.write_text(text + more)
    return path


def losses(run: Path) -> dict[int, float]:
    """Loss by step, the last word on each: a resumed run repeats the steps since its checkpoint."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


def state(run: Path) -> dict[str, Any]:
    """The tensors of the run's last checkpoint: weights and optimizer state."""
    from trainer.checkpoint import restore

    files = restore.newest(restore.place_of(run, None))
    return {name: files.read(name) for name in files.tensors if not name.startswith("ranks/")}


def train_here(config: Path, *more: str, nproc: int = 2, seconds: float = SECONDS) -> dict[str, Any]:
    """Train on this host, in the config's folder; the report. more: words for `tablemesh train`."""
    words = [sys.executable, "-m", "launch.cli", "train", config.name, "--nproc", str(nproc), *more, "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=config.parent, env=env, capture_output=True, text=True, check=False, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(folder: Path, env: Mapping[str, str]) -> Callable[..., Any]:
    """command(*words) -> the JSON object that `tablemesh WORDS --json` prints in a process of its own, in this folder;
    an error is its text. text=True: what it prints without --json.

    env: what it needs to find the cluster.
    """
    own = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}

    def run(*words: object, text: bool = False) -> Any:
        full = [sys.executable, "-m", "launch.cli", *map(str, words), *([] if text else ["--json"])]
        done = subprocess.run(
            full, cwd=folder, env=os.environ | env | own, capture_output=True, text=True, check=False, timeout=400
        )
        if done.returncode:
            return done.stderr
        return done.stdout if text else json.loads(done.stdout)

    return run


def until(
    command: Callable[..., Any], handle: str, true: Callable[[Any], bool], what: str, seconds: float = SECONDS
) -> Any:
    """`tablemesh status` of the job once it is as wanted."""
    deadline = time.monotonic() + seconds
    while not true(found := command("status", handle)):
        assert time.monotonic() < deadline, f"{what}: {found}\n{command('logs', handle, text=True)}"
        time.sleep(0.3)
    return found


def ended(found: dict[str, Any]) -> bool:
    return found["state"] in ("succeeded", "failed", "cancelled")
