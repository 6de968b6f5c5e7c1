"""What the planner counts for a run's readers."""

from pathlib import Path

import pytest

from sharding.cost import price
from sharding.topology import parse
from sharding.work import TableLoad, Work
from trainer.config import Config
from trainer.config import load as load_config
from trainer.data.dataset import Categorical, Dataset, Dense, File, Split, Stats, read, row_group_rows
from trainer.data.footprint import readers

ROOT = Path(__file__).parents[2]
CONFIG = {
    "name": "small",
    "data": {"path": "x", "streams": 4, "shuffle_window": 20_000, "prefetch": 3, "threads": 2},
    "tables": {"dim": 4},
    "model": {"kind": "dlrm", "bottom": [4], "top": [1]},
    "optim": {"sparse": {"kind": "sgd", "lr": 1.0}, "dense": {"kind": "sgd", "lr": 1.0}},
    "train": {"batch_size": 400},
    "eval": {"every": 10, "batch_size": 80},
}


def test_what_readers_hold_by_hand():
    """A row: a label, a number, 3 ids of 4 bytes and 1 of 8: decoded 8 + 12 + 8 = 28, in a batch 8 + 32 + 12 = 52."""
    stats = Stats(rows=10, ids=30, distinct=9)
    dataset = Dataset(
        name="x", source="made up", labels=("y",), dense=(Dense(name="d"),), fingerprint="0",
        categorical=(Categorical(name="a", cardinality=9, stats=stats), Categorical(name="b", cardinality=2**40)),
        splits={
            "train": Split(files=(File(path="1", row_groups=(300_000, 1_000_000)),)),
            "valid": Split(files=(File(path="2", row_groups=(4000,)),)),
        },
    )  # fmt: skip
    found = readers(Config.model_validate(CONFIG), dataset, {"a": 9, "b": 2**40})
    # A block is 40,000 rows; 4 of them of a stream's 325,000; its last row group is too large to be kept.
    training, validation = 160_000 * 52 + 5 * 100 * 52, 1000 * 52 + 5 * 20 * 52
    assert (found.streams, found.stream_bytes) == (4, training + validation)
    assert found.fixed_bytes == 2 * 40_000 * 28 + 2 * 1000 * 28
    # Streams that read the same row group at the same time have it once, so never more rows than there are.
    assert found.decoded_bytes == (1_000_000 + 2 * 4000) * 28
    assert found.most_decoded_bytes == 1_304_000 * 28
    work = Work(tables=(TableLoad(name="a", rows=9, dim=4),), batch_size=12, readers=found)
    counted = [price(work, parse(cluster)).fixed_bytes.get("readers") for cluster in ("cpu:1x1", "cpu:1x3", "l4:1x1")]
    alone = 4 * found.stream_bytes + found.most_decoded_bytes + found.fixed_bytes
    assert counted == [alone, 2 * found.stream_bytes + found.most_decoded_bytes + found.fixed_bytes, None]
    assert found.of_rank(4) == found.stream_bytes + found.decoded_bytes + found.fixed_bytes


@pytest.mark.parametrize("name", ["quickstart", "criteo_kaggle", "criteo_1tb_dlrm", "mlperf_dlrm_dcnv2"])
def test_figures_stand_for_what_prepare_would_write(name):
    config = load_config(ROOT / f"configs/{name}.toml")
    dataset = read(ROOT / f"configs/figures/{name}.json")
    whole = {name: split.rows for name, split in dataset.splits.items()}
    assert [f.row_groups for f in dataset.splits["train"].files] == [(whole["train"],)]
    splits = {}
    for split, rows in whole.items():
        group = row_group_rows(rows)
        groups = (*[group] * (rows // group), *([rows % group] if rows % group else []))
        splits[split] = Split(files=(File(path="1", row_groups=groups),))
    written = dataset.model_copy(update={"splits": splits, "fingerprint": "0"})
    rows = {c.name: c.cardinality for c in dataset.categorical}
    assert readers(config, dataset, rows) == readers(config, written, rows)
