import pytest

from kernels.errors import UserError
from trainer import config as configs
from trainer.data.dataset import Categorical, Dataset, File, Split
from trainer.tables import resolve

DATASET = Dataset(
    name="clicks",
    source="a test",
    labels=("y",),
    categorical=(
        Categorical(name="item", cardinality=1000),
        Categorical(name="item_last", cardinality=900, multi_hot=True),
        Categorical(name="shop", cardinality=50),
        Categorical(name="hour", cardinality=24),
    ),
    splits={"train": Split(files=(File(path="train/a.parquet", row_groups=(10,)),))},
    fingerprint="0",
)


def config(tables):
    return configs.validate(
        configs.Config,
        {
            "name": "t",
            "data": {"path": "data/x", "id_policy": "clip"},
            "model": {"kind": "dlrm", "bottom": [8, 4], "top": [8, 1]},
            "optim": {"sparse": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.1}},
            "train": {"batch_size": 8},
            "tables": tables,
        },
        where="test.toml",
    )


def test_one_table_per_feature_by_default():
    found = resolve(config({"dim": 8, "pooling": "mean"}), DATASET)
    assert [t.name for t in found.tables] == ["item", "item_last", "shop", "hour"]
    assert [t.rows for t in found.tables] == [1000, 900, 50, 24]
    assert {(t.dim, t.pooling, t.sharding, t.kind) for t in found.tables} == {(8, "mean", "auto", "standard")}
    assert found.features == ("item", "item_last", "shop", "hour")
    assert found.dims == (8, 8, 8, 8)
    assert set(found.policy.values()) == {"clip"}


def test_the_last_matching_override_wins_key_by_key():
    found = resolve(
        config(
            {
                "override": [
                    {"match": "*", "dim": 4, "sharding": "row_wise"},
                    {"match": ["hour", "sh*"], "sharding": "data_parallel", "id_policy": "error"},
                    {"match": "hour", "rows": 30},
                ]
            }
        ),
        DATASET,
    )
    by_name = {t.name: t for t in found.tables}
    assert by_name["hour"].rows == 30
    assert by_name["hour"].dim == 4
    assert by_name["hour"].sharding == by_name["shop"].sharding == "data_parallel"
    assert by_name["item"].sharding == "row_wise"
    assert found.policy == {"item": "clip", "item_last": "clip", "shop": "error", "hour": "error"}
    assert found.rows["hour"] == 30


def test_features_can_share_a_table():
    found = resolve(config({"override": [{"match": "item*", "table": "items"}]}), DATASET)
    assert [(t.name, t.rows, t.features) for t in found.tables] == [
        ("items", 1000, ("item", "item_last")),
        ("shop", 50, ("shop",)),
        ("hour", 24, ("hour",)),
    ]
    assert found.rows["item_last"] == 1000


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"override": [{"match": "shpo", "dim": 4}]}, ["tables.override[0].match", "'shpo'", "'shop'"]),
        (
            {"override": [{"match": "item*", "table": "items"}, {"match": "item", "dim": 4}]},
            ["table 'items'", "item_last", "dim = 16", "'item' for 4"],
        ),
        (
            {
                "override": [
                    {"match": "item*", "table": "items"},
                    {"match": "item", "rows": 4},
                    {"match": "item_last", "rows": 5},
                ]
            },
            ["table 'items'", "[4, 5]"],
        ),
    ],
)
def test_complaints(tables, words):
    with pytest.raises(UserError) as caught:
        resolve(config(tables), DATASET)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_data_without_features():
    with pytest.raises(UserError, match="no categorical features"):
        resolve(config({}), DATASET.model_copy(update={"categorical": ()}))
