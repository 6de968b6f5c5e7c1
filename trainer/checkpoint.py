"""Checkpoints: `checkpoints/step_N/`, complete or not there.

The ranks write together through torch.distributed.checkpoint into `step_N.partial`; when all are done, rank 0 writes
`checkpoint.json` and renames the folder. So a folder without the suffix is whole, and one that is read back may have
another world size and another plan than the one that wrote it.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from kernels.errors import UserError

PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the run a checkpoint was taken, and of what."""

    step: int  # steps done
    epoch: int  # of the next step
    samples: int
    world_size: int
    config_sha256: str
    data_fingerprint: str


def save(folder: Path, state: dict[str, Any], position: Position, *, keep: int) -> tuple[Path, int, float]:
    """Write `state` on all ranks; returns (path, bytes on disk, seconds). The newest `keep` checkpoints stay.

    state: nested dict of tensors, ShardedTensors and plain values; sharded values are written by their owners.
    Raises UserError, on all ranks, when a rank cannot write (a full disk, say); earlier checkpoints stay as they are.
    """
    started = time.perf_counter()
    final = folder / f"step_{position.step}"
    partial = final.with_name(final.name + PARTIAL)
    first = dist.get_rank() == 0
    if first:
        for left_over in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    except dcp.api.CheckpointException as error:  # raised on every rank
        free = shutil.disk_usage(folder).free
        dist.barrier()
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{partial}: the checkpoint could not be written: {_first_cause(error)} "
            f"({free / 2**20:,.0f} MiB were free on this disk); nothing is left of it, and the "
            f"{len(found(folder))} finished checkpoints in {folder} are whole"
        ) from error
    dist.barrier()
    size = 0
    if first:
        size = sum(f.stat().st_size for f in partial.iterdir())
        _write_synced(partial / "checkpoint.json", json.dumps(asdict(position), indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync_folder(folder)
        for old in found(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final, size, time.perf_counter() - started


def found(folder: Path) -> list[Path]:
    """The whole checkpoints in a `checkpoints/` folder, oldest first."""
    if not folder.is_dir():
        return []
    steps = [p for p in folder.glob("step_*") if p.suffix != PARTIAL and (p / "checkpoint.json").is_file()]
    return sorted(steps, key=lambda p: int(p.name.removeprefix("step_")))


def newest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run, or UserError."""
    there = found(run_dir / "checkpoints")
    if not there:
        raise UserError(f"{run_dir / 'checkpoints'}: no finished checkpoint; train the run to its end first")
    return there[-1]


def position(checkpoint: Path) -> Position:
    try:
        return Position(**json.loads((checkpoint / "checkpoint.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / 'checkpoint.json'}: cannot be read: {error}") from error


def load(checkpoint: Path, state: dict[str, Any]) -> None:
    """Read into `state` in place, whatever world size and plan wrote it."""
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        raise UserError(
            f"{checkpoint}: cannot be loaded into this model: {_first_cause(error)}; "
            "was it written with other tables, or is a file damaged?"
        ) from error


def _first_cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {inner}"
    return str(error)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
