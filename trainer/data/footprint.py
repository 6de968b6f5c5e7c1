"""What the readers of a run take of a rank's memory, for the planner.

    readers(config, dataset, rows) -> Readers      bytes for each stream of a rank, and bytes whatever its streams

The terms are those that trainer/data/loader.py names, at most; pools and the allocator keep more.  A dataset.json of
figures alone stands for data that `prepare` will write, in row groups of its size.
"""

from collections.abc import Mapping

from sharding.work import Readers
from trainer.config import Config
from trainer.data.dataset import FIGURES_ONLY, Dataset, row_group_rows
from trainer.data.loader import BLOCK_ROWS, BLOCKS_AHEAD, KEPT_ROWS

WIDE = 2**31  # a table with more rows has ids of 8 bytes in its files


def readers(config: Config, dataset: Dataset, rows: Mapping[str, int]) -> Readers:
    """Of training and, where it evaluates on the way, of the validation split.  rows: of each feature's table."""
    numbers = 4 * (len(dataset.labels) + len(dataset.dense))
    ids = {c.name: 1.0 if c.stats is None else c.stats.ids_per_bag for c in dataset.categorical}
    decoded = numbers + sum(n * (8 if rows[name] > WIDE else 4) for name, n in ids.items())
    batched = numbers + 8 * sum(ids.values()) + 12
    data = config.data
    splits = {"train": (data.shuffle_window, config.train.batch_size)}
    if config.eval.every and "valid" in dataset.splits:
        splits["valid"] = (1, config.eval.batch_size or config.train.batch_size)
    stream = fixed = held = most_held = 0.0
    for name, (window, batch_size) in splits.items():
        if name not in dataset.splits:
            continue
        split = dataset.splits[name]
        block = -(-BLOCK_ROWS // window) * window
        of_stream = split.rows / data.streams
        if dataset.fingerprint == FIGURES_ONLY:
            group = min(row_group_rows(split.rows), split.rows)
        else:
            group = max((n for file in split.files for n in file.row_groups), default=0)
        stream += min((BLOCKS_AHEAD + 2) * block, of_stream) * batched
        held += (group + (group if group <= KEPT_ROWS else 0)) * decoded
        most_held += split.rows * decoded
        stream += (data.prefetch + data.threads) * batch_size / data.streams * batched
        fixed += data.threads * min(block, of_stream) * decoded
    return Readers(
        streams=data.streams,
        stream_bytes=stream,
        fixed_bytes=fixed,
        decoded_bytes=held,
        most_decoded_bytes=most_held,
    )
