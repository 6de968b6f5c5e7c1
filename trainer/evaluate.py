"""Evaluation and prediction: every row of a split exactly once, on all ranks."""

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.errors import UserError
from trainer import pulse
from trainer.data.parquet import Reader
from trainer.metrics import Metrics
from trainer.world import World


class Stopping(Exception):
    """The ranks have agreed to stop in the middle of an evaluation."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: Reader,
    metrics: Metrics,
    *,
    world: World,
    max_rows: int | None = None,
    stopping: Callable[[], bool] | None = None,
    step: int = 0,
) -> dict:
    """Metrics over all rows of the reader's split, or, rounded up to a batch, over `max_rows` of them: the first of
    every stream.

    Every rank reads the same number of batches, the last ones padded with weight-0 rows, so no rank waits for one
    that has ended. Returns the dict of `Metrics.compute` with `seconds`, the same on all ranks.
    stopping: asked on every rank after each batch; raises Stopping when it says so.
    step: how far training is, for the board of trainer/pulse.py.
    """
    started = time.perf_counter()
    steps = reader.steps_per_epoch
    if max_rows is not None:
        steps = min(steps, -(-max_rows // reader.order.batch_size))
    was_training = model.training
    model.eval()
    metrics.reset()
    batches = reader.batches(epoch=0)
    try:
        for _ in range(steps):
            pulse.mark("eval", step)
            batch = next(batches).to(world.device, non_blocking=True)
            _, logits_BT = model(batch)
            metrics.update(logits_BT, batch.labels_BT, batch.weight_B)
            if stopping is not None and stopping():
                raise Stopping
    finally:
        batches.close()
        model.train(was_training)
    return metrics.all_reduce().compute() | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def predict(
    model: nn.Module, reader: Reader, out: Path, *, tasks: tuple[str, ...], streams: int, labelled: bool, world: World
) -> dict:
    """Write one row per row of the split, in the split's file order, to the Parquet file `out`.

    Columns: row (int64), then for each task its label (float32; not where the data has none) and prediction_<label>
    (float32, a probability).
    In evaluation order a stream is a contiguous range of rows, so each stream goes to a file of its own and rank 0
    joins them in order: memory stays that of a batch. `out` appears only when it is whole.
    """
    schema = pa.schema(
        [("row", pa.int64())]
        + [(name, pa.float32()) for task in tasks for name in ([task] if labelled else []) + [f"prediction_{task}"]]
    )
    with _parts(out, world) as parts:
        _write_parts(model, reader, parts, schema, streams=streams, labelled=labelled, world=world)
        dist.barrier()
        rows = _join(parts, out, schema) if world.is_first else 0
        dist.barrier()
    return {"out": str(out), "rows": rows}


@contextlib.contextmanager
def _parts(out: Path, world: World) -> Iterator[Path]:
    """A folder beside `out` for all ranks, which is gone when any of them fails."""
    parts = out.with_name(out.name + ".partial")
    if world.is_first:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    dist.barrier()
    try:
        yield parts
    except BaseException as error:
        shutil.rmtree(parts, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: the disk is full; make room, or write to another one") from error
        raise


def _write_parts(
    model: nn.Module, reader: Reader, parts: Path, schema: pa.Schema, *, streams: int, labelled: bool, world: World
) -> None:
    """This rank's streams, each to PARTS/stream_S.parquet."""
    model.eval()
    mine = streams // world.size
    writers = [
        pq.ParquetWriter(parts / f"stream_{world.rank * mine + i:05d}.parquet", schema, compression="zstd")
        for i in range(mine)
    ]
    batches = reader.batches(epoch=0)
    try:
        for batch in batches:
            pulse.mark("eval", 0)
            _, logits_BT = model(batch.to(world.device, non_blocking=True))
            labels_BT = batch.labels_BT if labelled else None
            columns = _columns(batch.row_B, labels_BT, torch.sigmoid(logits_BT.float()).cpu())
            per_stream = len(batch.row_B) // mine
            for i, writer in enumerate(writers):
                rows = slice(i * per_stream, (i + 1) * per_stream)
                keep = columns[0][rows] >= 0
                if keep.any():
                    writer.write_table(pa.Table.from_arrays([pa.array(c[rows][keep]) for c in columns], schema=schema))
    finally:
        batches.close()
        for writer in writers:
            writer.close()


def _columns(row_B: Tensor, labels_BT: Tensor | None, predictions_BT: Tensor) -> list[Any]:
    columns = [row_B.cpu().numpy()]
    for t in range(predictions_BT.shape[1]):
        if labels_BT is not None:
            columns.append(labels_BT[:, t].cpu().numpy())
        columns.append(predictions_BT[:, t].numpy())
    return columns


def _join(parts: Path, out: Path, schema: pa.Schema) -> int:
    """Concatenate the parts in name order into `out`, in row groups of a useful size; returns the rows written."""
    whole = parts / "whole"
    rows = 0
    with pq.ParquetWriter(whole, schema, compression="zstd") as writer:
        waiting: list[pa.RecordBatch] = []
        waiting_rows = 0
        for part in sorted(parts.glob("stream_*.parquet")):
            for piece in pq.ParquetFile(part).iter_batches(batch_size=65536):
                waiting.append(piece)
                waiting_rows += piece.num_rows
                if waiting_rows >= 65536:
                    writer.write_table(pa.Table.from_batches(waiting, schema))
                    rows, waiting, waiting_rows = rows + waiting_rows, [], 0
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))
            rows += waiting_rows
    whole.rename(out)
    shutil.rmtree(parts)
    return rows
