"""`tablemesh bench ckpt`: saving and restoring beside a plain write and read of the same bytes on the same disk.

The model is the one of `bench step` with tables so large that they and row-wise Adagrad's state take 2 GB, on one rank.
Save and restore do all they do in a run: DCP's planning, hashing, fsync, manifest, verification.

The baselines write the same bytes one after the other to a new file, in pieces of 16 MiB, and fsync it, as ours are.
What it replaces is removed before the clock starts, on either side: a file that is written over gets back the very
pages of the cache that it had, which no checkpoint does, as it stands beside the one before.  There are two of them:
through the page cache, which is how files are written plainly, and past it (O_DIRECT), as ours are written; the first
pays for fresh memory, which on a virtual machine can cost more than the disk, so both must be reached.
The restore's baseline reads that file in pieces of 16 MiB into one buffer, through the cache.  Before either side the
cache is told to forget all files.

A background save is made while training steps run.  Its pause is all that the steps stop for: `save` itself, and the
rows that they keep for the copy of the tables beside them; its baseline is the save above, which copies nothing.
What a step takes beside a save, and what marking the touched rows for deltas and counting their updates
(checkpoint.count_updates) add to it, stand beside a whole step.
The last row is the size of a delta after 1% of every table's rows were looked up and updated, beside the full one's.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.base import Row, Timed, rate_row, report, timed
from benchmarks.workload import Side, Workload, ours
from sharding.snapshot import Snapshot
from sharding.table_state import fused_kernels
from sharding.touched import Touched
from sharding.update_counts import UpdateCounts, counts_of
from trainer.checkpoint import state, storage
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.files import bytes_of, verify
from trainer.checkpoint.manifest import Manifest, Position
from trainer.checkpoint.place import Place
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.storage import Part
from trainer.checkpoint.stream import Stream
from trainer.config import Checkpoint
from trainer.data.batch import Batch
from trainer.runlog import RunLog
from trainer.world import World

TOUCHED = 0.01
PAIRS = 5
SAVES = 4  # in the background; the first one, which makes the buffers, is not counted
STEPS = 8  # undisturbed
PIECE = 16 << 20


def main(*, json: bool = False, folder: Path | None = None, gigabytes: float = 2.0) -> int:
    """Run everything, print it; the exit code.  folder: on the disk to measure; default the system's temporary one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="tablemesh-bench-", dir=folder) as work:
        rows = measure(Path(work), gigabytes)
    return report("ckpt", rows, json=json)


def measure(work: Path, gigabytes: float) -> list[Row]:
    workload = Workload()
    row_bytes = 4 * (workload.dim + 1)  # the weights and row-wise Adagrad's number
    workload = replace(workload, rows=max(workload.batch, int(gigabytes * 1e9 / workload.tables / row_bytes)))
    side = ours(workload)
    place = Place(work / "c")
    parts = state.parts_of(side.pipeline.dmp, side.pipeline.optimizer)
    found, free_save = save(parts, place, work)
    found.append(restore(parts, place, work))
    found += beside_steps(side, place, work, free_save)
    found += delta(side, workload, place)
    return found


def save(parts: Sequence[Part], place: Place, work: Path) -> tuple[list[Row], float]:
    """(rows, seconds of a save); leaves the checkpoint step_1 and the plain file."""
    size = sum(part.nbytes for part in parts)

    def plain(*, cached: bool) -> Callable[[], None]:
        def write() -> None:
            with open(work / "plain", "wb", buffering=0) as file:
                out = file if cached else Stream(file.fileno(), buffer_bytes=PIECE)
                for part in parts:
                    data = bytes_of(part.tensor)
                    for at in range(0, len(data), PIECE):
                        out.write(data[at : at + PIECE])
                if isinstance(out, Stream):
                    out.finish()
                os.fsync(file.fileno())

        return write

    def fresh(run: Callable[[], None]) -> Callable[[], Timed]:
        def after_removing() -> Timed:
            shutil.rmtree(work / "c", ignore_errors=True)
            (work / "plain").unlink(missing_ok=True)
            os.sync()
            return timed(run)

        return after_removing

    sides = [fresh(plain(cached=True)), fresh(plain(cached=False)), fresh(lambda: write(parts, place))]
    runs = [[side() for side in sides] for _ in range(PAIRS + 1)][1:]
    whole = not verify(place, "step_1", open_chain(place, "step_1").manifest)
    plain(cached=True)()
    rows = [
        rate_row("save", [(run[2], run[k]) for run in runs], count=size, baseline_name=name, correct=whole, unit="B/s")
        for k, name in enumerate(("plain write + fsync", "plain write past the cache + fsync"))
    ]
    return rows, statistics.median(run[2].seconds for run in runs)


def write(parts: Sequence[Part], place: Place) -> None:
    storage.write(parts, place, "step_1", about)


def about(files: dict, tensors: dict) -> Manifest:
    position = Position(step=1, epoch=0, samples=0, world_size=1, config_sha256="", data_fingerprint="")
    return Manifest(position=position, config="", values={}, files=files, tensors=tensors)


def restore(parts: Sequence[Part], place: Place, work: Path) -> Row:
    size = sum(part.nbytes for part in parts)
    read = [replace(part, tensor=torch.zeros_like(part.tensor)) for part in parts]
    buffer = bytearray(PIECE)

    def plain_read() -> None:
        with open(work / "plain", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def cold(run: Callable[[], None]) -> Timed:
        for path in (*(work / "c/step_1").iterdir(), work / "plain"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        return timed(run)

    def load() -> None:
        open_chain(place, "step_1").load(read)

    runs = [(cold(load), cold(plain_read)) for _ in range(PAIRS + 1)][1:]
    equal = all(torch.equal(a.tensor, b.tensor) for a, b in zip(parts, read, strict=True))
    (work / "plain").unlink()
    return rate_row("restore", runs, count=size, baseline_name="plain read", correct=equal, unit="B/s")


def beside_steps(side: Side, place: Place, work: Path, free_save: float) -> list[Row]:
    """Background saves while training steps run: what they wait for, and how long they take meanwhile."""
    pipeline = side.pipeline
    saver = Saver(place, Checkpoint(background=True), World.from_env(), RunLog(work, enabled=False))
    snapshot = Snapshot(fused_kernels(pipeline.dmp.module))
    side.run(STEPS)
    alone, _ = side.run(STEPS)
    pauses, steps, right = [], [], True
    for number in range(2, 2 + SAVES):
        parts = state.parts_of(pipeline.dmp, pipeline.optimizer)
        expected = {part.name: xxhash.xxh3_128_digest(bytes_of(part.tensor)) for part in parts}
        before = saver.totals.pause_seconds
        saver.save(lambda parts=parts: parts, about, step=number, snapshot=snapshot)
        seconds = []
        while saver.writing():
            seconds += side.run(1)[0]
        saver.wait()
        if number > 2:
            steps += seconds
            pauses.append(saver.totals.pause_seconds - before)
        chain = open_chain(place, f"step_{number}")
        right &= all(xxhash.xxh3_128_digest(bytes_of(chain.read(name))) == found for name, found in expected.items())
    pause, undisturbed, disturbed = statistics.median(pauses), statistics.median(alone), statistics.median(steps)
    return [
        Row(
            name="pause of a save beside steps",
            unit="ms",
            ours=1e3 * pause,
            baseline=1e3 * free_save,
            baseline_name="a save that copies nothing",
            ratio=free_save / pause,
            correct=right,
        ),
        Row(
            name="a step beside a save",
            unit="ms",
            ours=1e3 * disturbed,
            baseline=1e3 * undisturbed,
            baseline_name="a step alone",
            ratio=undisturbed / disturbed,
            correct=right,
        ),
    ]


def delta(side: Side, workload: Workload, place: Place) -> list[Row]:
    """A delta after 1% of every table's rows, read back together with what it is a delta to; and what marking costs."""
    pipeline, name = side.pipeline, f"step_{1 + SAVES}"
    place.remove(name)
    parts = state.parts_of(pipeline.dmp, pipeline.optimizer)
    storage.write(parts, place, name, about)
    kernels = list(fused_kernels(pipeline.dmp.module))
    touched = Touched(pipeline.dmp.module)
    inputs: dict[int, tuple] = {}
    noting = [k.register_forward_pre_hook(lambda k, given: inputs.update({id(k): given})) for k in kernels]
    batch = some_rows(workload, int(TOUCHED * workload.rows))
    with pipeline.paused():
        loss, _ = pipeline.dmp(batch)
        loss.backward()
    pipeline.optimizer.step()
    base = open_chain(place, name)
    marked = touched.take()

    def as_delta(files: dict, tensors: dict) -> Manifest:
        return replace(about(files, tensors), kind="delta", parent={"name": name, "id": base.manifest.id})

    changed = state.parts_of(pipeline.dmp, pipeline.optimizer, fused=False) + state.delta_parts(pipeline.dmp, marked)
    storage.write(changed, place, "step_9", as_delta)
    chain = open_chain(place, "step_9")
    now = state.parts_of(pipeline.dmp, pipeline.optimizer)
    right = all(torch.equal(chain.read(part.name), part.tensor) for part in now)
    full, taken = (sum(place.sizes(n).values()) for n in (name, "step_9"))

    seconds, _ = side.run(STEPS)
    marks = [timed(lambda: [touched.mark(k, *inputs[id(k)][:1]) for k in kernels]).seconds for _ in range(5 * STEPS)]
    counting = UpdateCounts(pipeline.dmp.module)
    counts = [timed(lambda: [counting.count(k, *inputs[id(k)][:1]) for k in kernels]).seconds for _ in range(5 * STEPS)]
    exact = all(
        int(counts_E.count_nonzero()) == len(inputs[id(k)][0][k.config.feature_names()[f]].values().unique())
        and int(counts_E.max()) == 5 * STEPS
        for k in kernels
        for f, counts_E in counts_of(k).items()
    )
    for hook in noting:
        hook.remove()
    step, mark, count = (statistics.median(times) for times in (seconds, marks, counts))
    return [
        Row(
            name="marking a step's rows for deltas",
            unit="ms",
            ours=1e3 * mark,
            baseline=1e3 * step,
            baseline_name="a step",
            ratio=step / mark,
            correct=right,
        ),
        Row(
            name="counting a step's updates of rows",
            unit="ms",
            ours=1e3 * count,
            baseline=1e3 * step,
            baseline_name="a step",
            ratio=step / count,
            correct=exact,
        ),
        Row(
            name=f"delta after touching {100 * TOUCHED:.0f}% of the rows",
            unit="MB",
            ours=taken / 1e6,
            baseline=full / 1e6,
            baseline_name="a full checkpoint",
            ratio=full / taken,
            correct=right,
        ),
    ]


def some_rows(workload: Workload, count: int) -> Batch:
    """A batch that looks up `count` different rows of every table, one a sample."""
    generator = torch.Generator().manual_seed(2)
    ids: list[Tensor] = [torch.randperm(workload.rows, generator=generator)[:count] for _ in workload.features]
    keys = workload.features
    return Batch(
        dense_BK=torch.rand(count, workload.dense, generator=generator),
        ids=KeyedJaggedTensor(
            keys=keys, values=torch.cat(ids), lengths=torch.ones(count * len(keys), dtype=torch.int64), stride=count
        ),
        labels_BT=torch.ones(count, 1),
        weight_B=torch.ones(count),
        row_B=torch.arange(count),
        rows_in_step=count,
    )
