"""`tablemesh bench ckpt`: saving and restoring beside a plain write and read of the same bytes on the same disk.

A made-up model of 8 tables of 64 columns with row-wise Adagrad's state, 2 GB together, on one rank.  Save and restore
do all they do in a run: DCP's planning, hashing, fsync, manifest, verification.  The baselines write the bytes to one
new file in pieces of 16 MiB, fsync it and put it in the old one's place, as a checkpoint replaces one of its step
(fresh page cache costs more than the disk where a virtual machine has to be given it), and read it back.  Before each
read the page cache is told to forget the file.
The pause is what the training waits for when a save goes on in the background, as in a run: tables are copied beside
the steps (the rows that these keep meanwhile are not counted here); its baseline is a save that copies nothing.  The
last row is the size of a delta after 1% of the rows were touched, beside the full one's.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.base import Row, paired, rate_row, report
from sharding.snapshot import Snapshot
from trainer.checkpoint import storage
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.files import bytes_of, verify
from trainer.checkpoint.manifest import Manifest, Position
from trainer.checkpoint.place import Place
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.storage import Part
from trainer.config import Checkpoint
from trainer.runlog import RunLog
from trainer.world import World

TABLES, COLUMNS = 8, 64
TOUCHED = 0.01
PAIRS = 3
PIECE = 16 << 20


def main(*, json: bool = False, folder: Path | None = None, gigabytes: float = 2.0) -> int:
    """Run everything, print it; the exit code.  folder: on the disk to measure; default the system's temporary one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="tablemesh-bench-", dir=folder) as work:
        rows = measure(Path(work), gigabytes)
    return report("ckpt", rows, json=json)


def measure(work: Path, gigabytes: float) -> list[Row]:
    parts = model(gigabytes)
    size = sum(part.nbytes for part in parts)
    place, plain = Place(work / "c"), work / "plain"

    def save() -> None:
        storage.write(parts, place, "step_1", about)

    def plain_write() -> None:
        with open(work / "new", "wb", buffering=0) as file:
            for part in parts:
                data = bytes_of(part.tensor)
                for at in range(0, len(data), PIECE):
                    file.write(data[at : at + PIECE])
            os.fsync(file.fileno())
        os.replace(work / "new", plain)

    saves = paired(save, plain_write, pairs=PAIRS)
    manifest = open_chain(place, "step_1").manifest
    whole = not verify(place, "step_1", manifest)
    found = [rate_row("save", saves, count=size, baseline_name="plain write + fsync", correct=whole, unit="B/s")]

    read = [replace(part, tensor=torch.zeros_like(part.tensor)) for part in parts]
    buffer = bytearray(PIECE)

    def restore() -> None:
        open_chain(place, "step_1").load(read)

    def plain_read() -> None:
        with open(plain, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    files = [Path(place.path("step_1", file)) for file in manifest.files]
    runs = paired(cold(restore, files), cold(plain_read, [plain]), pairs=PAIRS)
    equal = all(torch.equal(a.tensor, b.tensor) for a, b in zip(parts, read, strict=True))
    found.append(rate_row("restore", runs, count=size, baseline_name="plain read", correct=equal, unit="B/s"))
    plain.unlink()
    free_save = statistics.median(ours.seconds for ours, _ in saves)
    found.append(pause(parts, place, work, free_save))
    found.append(delta(parts, place, size))
    return found


def model(gigabytes: float) -> list[Part]:
    rows = int(gigabytes * 1e9 / TABLES / (4 * COLUMNS + 4))
    generator = torch.Generator().manual_seed(1)
    parts = []
    for t in range(TABLES):
        weights = torch.randn(rows, COLUMNS, generator=generator)
        for name, tensor in (("weight", weights), (f"sum:0-{COLUMNS}", weights[:, 0].square().contiguous())):
            part = storage.whole(f"tables/t{t}/{name}", tensor)
            parts.append(replace(part, table=f"t{t}"))
    return parts


def about(files: dict, tensors: dict) -> Manifest:
    position = Position(step=1, epoch=0, samples=0, world_size=1, config_sha256="", data_fingerprint="")
    return Manifest(position=position, config="", values={}, files=files, tensors=tensors)


def cold(work, files: list[Path]):
    """`work` after the page cache has been told to forget the files; that is part of neither side's work."""

    def run() -> None:
        for path in files:
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        work()

    return run


def pause(parts: Sequence[Part], place: Place, work: Path, free_save: float) -> Row:
    """Two background saves: what the second one's steps would have waited for (the first makes the buffers)."""
    saver = Saver(place, Checkpoint(background=True), World.from_env(), RunLog(work, enabled=False))
    watched = [replace(part, watched=True) for part in parts]
    pauses = []
    for step in (2, 3, 4, 5):
        before = time.perf_counter()
        saver.save(watched, about, step=step, snapshot=Snapshot(()))
        pauses.append(time.perf_counter() - before)
        saver.wait()
    right = not verify(place, "step_5", open_chain(place, "step_5").manifest)
    ours = statistics.median(pauses[1:])
    return Row(
        name="pause of a background save",
        unit="ms",
        ours=1e3 * ours,
        baseline=1e3 * free_save,
        baseline_name="a save that copies nothing",
        ratio=free_save / ours,
        correct=right,
    )


def delta(parts: Sequence[Part], place: Place, size: int) -> Row:
    """The bytes on the disk of a delta with 1% of every table's rows, read back together with what it is a delta to."""
    base = open_chain(place, "step_5")
    generator = torch.Generator().manual_seed(2)
    changed: list[Part] = []
    for t in range(TABLES):
        weights, sums = parts[2 * t].tensor, parts[2 * t + 1].tensor
        rows_U = torch.randperm(len(weights), generator=generator)[: int(TOUCHED * len(weights))].sort().values
        weights[rows_U] += 1
        sums[rows_U] += 1
        values = {"rows": rows_U, "weight": weights[rows_U], "sum": sums[rows_U]}
        for what, tensor in values.items():
            changed.append(replace(storage.whole(f"tables/t{t}/delta:0-0/{what}", tensor), table=f"t{t}"))

    def as_delta(files: dict, tensors: dict) -> Manifest:
        return replace(about(files, tensors), kind="delta", parent={"name": base.name, "id": base.manifest.id})

    storage.write(changed, place, "step_6", as_delta)
    chain = open_chain(place, "step_6")
    right = all(torch.equal(chain.read(part.name), part.tensor) for part in parts)
    taken = sum(place.sizes("step_6").values())
    shutil.rmtree(place.path("step_6"))
    return Row(
        name="delta after touching 1% of the rows",
        unit="MB",
        ours=taken / 1e6,
        baseline=size / 1e6,
        baseline_name="a full checkpoint",
        ratio=size / taken,
        correct=right,
    )
