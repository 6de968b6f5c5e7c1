"""Text ids of 64 bits from prepare to training in a table that gives them rows, prediction and export."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernels.errors import UserError
from tests.ranks import run_ranks
from trainer import config as configs
from trainer.checkpoint import tools
from trainer.prepare import prepare
from trainer.prepare.ids import keys_of
from trainer.tables import resolve
from trainer.trainer import predict_run, train
from trainer.world import World

SPEC = """
[[label]]
column = "y"
[[dense]]
columns = ["x"]
[[categorical]]
columns = ["user"]
ids = "hash64"
[[categorical]]
columns = ["tags"]
ids = "hash64"
separator = "|"
"""
VALUES = {
    "name": "t",
    "data": {"streams": 2},
    "tables": {"dim": 4, "kind": "collisionless", "override": [{"match": "*", "options": {"rows": 600}}]},
    "model": {"kind": "dlrm", "bottom": [4], "top": [4, 1]},
    "optim": {"sparse": {"kind": "sgd", "lr": 0.5}, "dense": {"kind": "sgd", "lr": 0.1}},
    "train": {"batch_size": 32, "epochs": 1},
}


def frame(rows: int, *, user: str) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "y": rng.integers(0, 2, rows),
            "x": 0.5,
            "user": [f"{user}{n}" if n else "" for n in rng.integers(0, 60, rows)],
            "tags": ["|".join(rng.choice(list("abcdefg"), rng.integers(0, 3))) for _ in range(rows)],
        }
    )


def keys(texts) -> set[int]:
    return set(keys_of(pa.array(sorted(set(texts) - {""}), pa.binary()))[0].view(np.int64).tolist())


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(folder, dataset) of the dataset "known" and, like it, "new", whose users are all strangers."""
    folder = tmp_path_factory.mktemp("hash64")
    (folder / "spec.toml").write_text(SPEC)
    frame(400, user="u").to_csv(folder / "known.csv", index=False)
    frame(50, user="stranger").assign(tags="a").to_csv(folder / "new.csv", index=False)
    dataset = prepare(str(folder / "known.csv"), folder / "known", spec=folder / "spec.toml", options={"test": 0.2})
    prepare(str(folder / "new.csv"), folder / "new", options={"like": str(folder / "known")})
    return folder, dataset


def config(folder, **tables):
    values = VALUES | {"data": VALUES["data"] | {"path": str(folder / "known")}}
    return configs.validate(configs.Config, values | {"tables": VALUES["tables"] | tables}, where="test")


def test_ids_are_the_64_bit_keys_and_missing_ones_are_empty(known):
    folder, dataset = known
    train_rows = pq.read_table(folder / "known" / "train")
    users, tags = (train_rows[name].to_pylist() for name in ("user", "tags"))
    assert train_rows["user"].type == pa.int64() and None in users
    found = [len(set(users) - {None}), len({tag for bag in tags if bag for tag in bag})]
    assert [c.cardinality for c in dataset.categorical] == found
    assert set(users) - {None} <= keys(f"u{n}" for n in range(1, 60))
    assert {tag for bag in tags if bag for tag in bag} == keys("abcdefg")
    assert pq.read_table(folder / "new" / "test")["user"].type == pa.int64()


def test_a_table_without_rows_for_any_id_says_what_to_do(known):
    folder, dataset = known
    plain = {"kind": "standard", "override": []}
    with pytest.raises(UserError, match=r"(?s)'user': its ids have 64 bits.*collisionless.*id_policy"):
        resolve(config(folder, **plain), dataset)
    folded = config(folder, **plain)
    folded = folded.model_copy(update={"data": folded.data.model_copy(update={"id_policy": "hash"})})
    assert [t.rows for t in resolve(folded, dataset).tables] == [c.cardinality for c in dataset.categorical]


def _story(run_dir, folder):
    config, world = configs.load(run_dir / "config.toml"), World.from_env()
    train(config, run_dir, world)
    predict_run(config, run_dir, world, dataset=str(folder / "new"), split=None, out=folder / "new.parquet")


def test_trained_on_two_ranks_it_predicts_for_strangers_and_is_exported(known, tmp_path):
    folder, _ = known
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(config(folder).to_toml())
    run_ranks(_story, 2, run_dir, folder)
    predictions = pq.read_table(folder / "new.parquet")["prediction_y"].to_numpy()
    missing = pq.read_table(folder / "new" / "test", columns=["user"])["user"].to_pandas().isna().to_numpy()
    assert np.ptp(predictions[~missing]) == 0 and len(predictions) == 50  # all read the default row

    tools.export(str(run_dir), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("user.ids_*.parquet"))
    exported = [r for file in files for r in pq.read_table(file).to_pylist() if r["id"] is not None]
    users = set(pq.read_table(folder / "known" / "train")["user"].to_pylist()) - {None}
    assert sorted(r["id"] for r in exported) == sorted(users)
    (row,) = tools.inspect(str(run_dir), table="user", rows=(exported[0]["id"],))["rows"]
    assert row["weight"] == [exported[0][f"v{c}"] for c in range(4)]
