"""Small Parquet datasets with everything awkward in them, and a slow reader whose every step is obvious."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import Features
from trainer.data.batch import Batch
from trainer.data.parquet import Reader

CARDINALITY = {"user": 50, "word": 30, "page": 7}
FEATURES = Features(labels=("click", "buy"), dense=("age", "price"), categorical=CARDINALITY, weight="weight")


def table(rows: int, seed: int = 0, *, nulls: bool = True) -> pa.Table:
    """A nullable feature, a multi-hot one with nulls and empty lists, a plain one, a column nobody asked for."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, 30, rng.integers(0, 5)).tolist() for _ in range(rows)]
    user = rng.integers(0, 50, rows).astype(np.int32)
    return pa.table(
        {
            "not asked for": pa.array(["x"] * rows),
            "click": rng.integers(0, 2, rows).astype(np.float32),
            "user": pa.array(user, mask=rng.random(rows) < 0.2 if nulls else None),
            "age": rng.standard_normal(rows).astype(np.float32),
            "word": pa.array([None if nulls and rng.random() < 0.1 else w for w in words], pa.list_(pa.int32())),
            "page": rng.integers(0, 7, rows).astype(np.int32),
            "price": rng.standard_normal(rows).astype(np.float32),
            "buy": rng.integers(0, 2, rows).astype(np.float32),
            "weight": rng.random(rows).astype(np.float32),
        }
    )


def write(folder: Path, tables: list[pa.Table], row_group_size: int = 13) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(tables):
        pq.write_table(one, folder / f"part-{number:03d}.parquet", row_group_size=row_group_size)
    return folder


def reader(folder: Path, dataset, split: str = "train", **changes) -> Reader:
    options = {"batch_size": 16, "streams": 8, "seed": 3, "shuffle_window": 8, "threads": 2, "prefetch": 2}
    return Reader(folder, dataset, split, **(options | changes))


def all_batches(one: Reader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    with one.batches(epoch, start_step) as batches:
        return list(batches)


def slow_batch(rows: list[dict], numbers: list[int], features: Features) -> dict:
    """One batch, row by row: what the reader should make of the rows with these numbers (-1: padding)."""
    picked = [rows[n] if n >= 0 else None for n in numbers]

    def column(name: str) -> list[float]:
        return [0.0 if row is None else float(row[name]) for row in picked]

    def bag(row: dict | None, name: str) -> list[int]:
        ids = None if row is None else row[name]
        return [i for i in ids if i is not None] if isinstance(ids, list) else [] if ids is None else [ids]

    return {
        "dense": [column(name) for name in features.dense],
        "labels": [column(name) for name in features.labels],
        "weight": column(features.weight) if features.weight else [float(row is not None) for row in picked],
        "row": list(numbers),
        "ids": {name: [bag(row, name) for row in picked] for name in features.categorical},
    }


def as_slow(batch: Batch, features: Features) -> dict:
    """A batch in the slow reader's form."""
    batch_size = len(batch.row_B)
    ids = {}
    for key in batch.ids.keys():  # noqa: SIM118 - a KeyedJaggedTensor is not a dict
        jagged = batch.ids[key]
        ids[key] = [bag.tolist() for bag in jagged.values().split(jagged.lengths().tolist())]
        assert len(ids[key]) == batch_size
    return {
        "dense": batch.dense_BK.T.tolist(),
        "labels": batch.labels_BT.T.tolist(),
        "weight": batch.weight_B.tolist(),
        "row": batch.row_B.tolist(),
        "ids": ids,
    }
