"""New rows with the ids and numbers of a dataset prepared earlier (`like`)."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels.errors import UserError
from tests.ranks import run_ranks
from tests.trainer.criteo_text import criteo_lines
from trainer import config as configs
from trainer.data.dataset import load
from trainer.prepare import prepare, summary
from trainer.prepare.ids import Vocabulary, mix64, unmix64
from trainer.trainer import evaluate_run, predict_run, train
from trainer.world import World

SPEC = """
weight = "w"
timestamp = "when"
[[label]]
column = "rating"
name = "liked"
at_least = 4
[[dense]]
columns = ["x"]
log1p = true
standardise = true
[[categorical]]
columns = ["user"]
min_count = 2
[[categorical]]
columns = ["item"]
ids = "hash"
rows = 50
seed = 3
[[categorical]]
columns = ["tags"]
separator = "|"
[[categorical]]
columns = ["place"]
ids = "as_is"
[[categorical]]
columns = ["age"]
name = "age_group"
quantiles = 4
"""


def frame(rows: int, *, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "rating": rng.integers(1, 6, rows),
            "user": [f"u{n}" for n in rng.zipf(1.5, rows) % 90],
            "item": rng.integers(0, 10**6, rows),
            "tags": ["|".join(rng.choice(list("abcdefg"), rng.integers(0, 3))) for _ in range(rows)],
            "place": rng.integers(0, 30, rows),
            "age": rng.normal(40, 15, rows).round(1),
            "x": rng.exponential(100, rows).round(2),
            "w": rng.choice([0.5, 1.0], rows),
            "when": rng.integers(0, 10**6, rows),
        }
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(folder, dataset A in it made from a.csv)."""
    folder = tmp_path_factory.mktemp("known")
    frame(3000, seed=1).to_csv(folder / "a.csv", index=False)
    (folder / "spec.toml").write_text(SPEC)
    prepare(str(folder / "a.csv"), folder / "A", spec=folder / "spec.toml")
    return folder


def rows_of(dest, split):
    return pa.concat_tables([pq.read_table(f) for f in sorted((dest / split).glob("*.parquet"))])


def test_the_same_file_gives_the_same_ids_and_numbers(known, tmp_path):
    dataset = prepare(str(known / "a.csv"), tmp_path / "B", options={"like": known / "A", "valid": 0.1, "test": 0.1})
    original = load(known / "A")
    assert dataset.fingerprint == original.fingerprint  # of the schema and the bytes of every file
    assert dataset.encoding == original.encoding and dataset.like == str(known / "A") and dataset.labelled
    assert [c.cardinality for c in dataset.categorical] == [c.cardinality for c in original.categorical]
    whole = prepare(str(known / "a.csv"), tmp_path / "C", options={"like": str(known / "A")})
    assert list(whole.splits) == ["test"] and whole.splits["test"].rows == 3000
    assert whole.categorical[0].stats.rows == 3000
    assert rows_of(tmp_path / "C", "test").schema == rows_of(known / "A", "train").schema


def test_what_is_new_falls_to_the_reserved_id_and_is_counted(known, tmp_path):
    new = frame(200, seed=2)
    new.loc[:9, "user"] = "nobody"
    new.loc[:4, "tags"] = "new|a|newer"
    new.loc[:2, "place"] = 10**9
    new.loc[5, "place"] = np.nan
    new["place"] = new["place"].astype("Int64")
    new[new.columns[::-1]].to_csv(tmp_path / "new.tsv", index=False, sep="\t")  # another order and another separator
    dataset = prepare(str(tmp_path / "new.tsv"), tmp_path / "B", options={"like": str(known / "A")})
    found = rows_of(tmp_path / "B", "test")
    feature = {c.name: c for c in dataset.categorical}
    assert found["user"].to_pylist()[:10] == [0] * 10
    assert feature["user"].stats.unseen == sum(i == 0 for i in found["user"].to_pylist()) >= 10
    bags = found["tags"].to_pylist()
    assert all(bag[0] == bag[2] == 0 < bag[1] for bag in bags[:5]) and feature["tags"].stats.unseen == 10
    assert found["place"].to_pylist()[:3] == [None] * 3 and found["place"][5].as_py() is None
    assert (feature["place"].stats.unseen, feature["place"].stats.missing) == (3, 1)
    assert feature["place"].cardinality == 30 and feature["item"].cardinality == 50
    mean = np.log1p(pd.read_csv(known / "a.csv")["x"]).mean()
    assert found["x"].to_numpy()[0] == pytest.approx((np.log1p(new["x"][0]) - mean) / 1.2, abs=0.3)
    assert summary(dataset).row_count == 6


def test_text_and_integers_of_another_format_meet(known, tmp_path):
    """A dataset from CSV takes Parquet's integers as the text they write, and the other way round."""
    table = pd.read_csv(known / "a.csv")
    table["tags"] = [t.split("|") if isinstance(t, str) else [] for t in table["tags"]]
    table.drop(columns="tags").assign(tags=pd.read_csv(known / "a.csv")["tags"].fillna("")).to_parquet(
        tmp_path / "a.parquet"
    )
    prepare(str(known / "a.csv"), tmp_path / "text", options={"like": str(known / "A")})
    prepare(str(tmp_path / "a.parquet"), tmp_path / "same", options={"like": str(known / "A")})
    assert rows_of(tmp_path / "text", "test").equals(rows_of(tmp_path / "same", "test"))

    numbers = pd.DataFrame({"y": [0, 1] * 4, "k": [5, 2**62, -3, 5, 5, -3, 7, 7]})
    numbers.to_parquet(tmp_path / "n.parquet")
    (tmp_path / "n.toml").write_text('[[label]]\ncolumn = "y"\n[[categorical]]\ncolumns = ["k"]\n[split]\n'
                                     f'valid = ["{tmp_path}/n2.parquet"]\n')  # fmt: skip
    numbers.to_parquet(tmp_path / "n2.parquet")
    prepare(str(tmp_path / "n.parquet"), tmp_path / "N", spec=tmp_path / "n.toml")
    numbers.astype({"k": str}).replace({"k": {"7": "seven"}}).to_csv(tmp_path / "n.csv", index=False)
    dataset = prepare(
        str(tmp_path / "n.csv"), tmp_path / "M", options={"like": str(tmp_path / "N"), "max_rejected": 0.5}
    )
    assert dataset.rejected == 2 and "'k' is not an integer" in (tmp_path / "M" / "rejected.tsv").read_text()
    assert rows_of(tmp_path / "M", "test")["k"].to_pylist() == rows_of(tmp_path / "N", "train")["k"].to_pylist()[:6]
    numbers.assign(k=[[1]] * 8).to_parquet(tmp_path / "lists.parquet")
    with pytest.raises(UserError, match=r"lists.parquet: column 'k' holds lists, and held one value a row"):
        prepare(str(tmp_path / "lists.parquet"), tmp_path / "L", options={"like": str(tmp_path / "N")})


def test_criteo_and_its_test_file_without_labels(tmp_path):
    lines = criteo_lines(900)
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "test.txt").write_text("".join(line.split("\t", 1)[1] for line in lines))
    prepare(f"criteo:{tmp_path}/train.txt", tmp_path / "A", options={"min_count": 2})
    labelled = prepare(f"criteo:{tmp_path}/train.txt", tmp_path / "B", options={"like": str(tmp_path / "A")})
    bare = prepare(f"criteo:{tmp_path}/test.txt", tmp_path / "C", options={"like": str(tmp_path / "A")})
    assert labelled.labelled and not bare.labelled and bare.labels == ("label",) and bare.positive_rate == {}
    expected = rows_of(tmp_path / "B", "test").drop_columns("label")
    assert rows_of(tmp_path / "C", "test").equals(expected)
    assert labelled.categorical == bare.categorical
    with pytest.raises(UserError, match="give that one"):
        prepare(f"criteo:{tmp_path}/test.txt", tmp_path / "D", options={"like": str(tmp_path / "B")})


def test_the_fingerprint_is_of_the_ids_not_of_the_rows(known, tmp_path):
    again = pd.read_csv(known / "a.csv")
    again.to_csv(tmp_path / "copy.csv", index=False, sep=";")
    (tmp_path / "s.toml").write_text(SPEC + '[source]\ndelimiter = ";"\n')
    same = prepare(str(tmp_path / "copy.csv"), tmp_path / "same", spec=tmp_path / "s.toml")
    assert same.encoding == load(known / "A").encoding
    for change in (("min_count = 2", "min_count = 3"), ("seed = 3", "seed = 4"), ("log1p = true\n", "")):
        (tmp_path / "s.toml").write_text(SPEC.replace(*change))
        dest = tmp_path / change[0][:4]
        other = prepare(str(known / "a.csv"), dest, spec=tmp_path / "s.toml")
        assert other.encoding != same.encoding


def test_what_cannot_be_like(known, tmp_path):
    source, spec = str(known / "a.csv"), known / "spec.toml"
    like = {"like": str(known / "A")}
    prepare("synthetic:zipf4", tmp_path / "Z", options={"rows": 100})
    shutil.copytree(known / "A", tmp_path / "damaged")
    pq.write_table(
        pa.table({"key": pa.array([1], pa.uint64())}), tmp_path / "damaged/encoding/vocabulary_00000.parquet"
    )
    for options, more, message in (
        ({"like": str(tmp_path / "none")}, {}, "none/dataset.json: No such file"),
        ({"like": str(tmp_path / "Z")}, {}, "keeps no encoding"),
        ({"like": str(tmp_path / "damaged")}, {}, "vocabulary_00000.parquet: cannot be used"),
        (like, {"spec": spec}, "leave --spec out"),
        (like | {"min_count": 2}, {}, "min_count"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "B", options=options, **more)
    with pytest.raises(UserError, match="choose another DEST"):
        prepare(source, known / "A", options=like | {"existing": "replace"})
    pd.read_csv(source).drop(columns="user").to_csv(tmp_path / "fewer.csv", index=False)
    with pytest.raises(UserError, match=r"fewer.csv: no column 'user'"):
        prepare(str(tmp_path / "fewer.csv"), tmp_path / "B", options=like)
    assert not (tmp_path / "B").exists()


def test_a_rerun_with_like_is_reused(known, tmp_path):
    options = {"like": str(known / "A"), "existing": "reuse"}
    first = prepare(str(known / "a.csv"), tmp_path / "B", options=options)
    assert prepare(str(known / "a.csv"), tmp_path / "B", options=options) == first


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint64, st.integers(0, 200), unique=True))
def test_a_vocabulary_goes_through_its_keys(keys):
    assert np.array_equal(unmix64(mix64(keys)), keys)
    counted = Vocabulary(keys, np.ones(len(keys), np.int64))
    kept = Vocabulary.in_order(counted.keys)
    assert np.array_equal(kept.keys, np.sort(keys))
    assert np.array_equal(kept.look_up(keys), counted.look_up(keys))
    assert np.array_equal(kept.look_up(keys + np.uint64(1)), counted.look_up(keys + np.uint64(1)))


def _story(run_dir, folder):
    """Train, predict for the datasets `new` and `bare` in the folder, evaluate on `new`, `bare` and `own`."""
    config, world = configs.load(run_dir / "config.toml"), World.from_env()
    train(config, run_dir, world)
    for name in ("new", "bare"):
        out = folder / f"{name}.parquet"
        assert predict_run(config, run_dir, world, dataset=str(folder / name), split=None, out=out)["split"] == "test"
    found = []
    for name in ("new", "bare", "own"):
        try:
            found.append(evaluate_run(config, run_dir, world, dataset=str(folder / name), split=None))
        except UserError as error:
            found.append(str(error))
    return found


def test_a_model_predicts_for_rows_that_have_no_label(known, tmp_path):
    new = frame(130, seed=9)
    new.to_csv(tmp_path / "new.csv", index=False)
    new.drop(columns=["rating", "w", "when"]).to_csv(tmp_path / "bare.csv", index=False)
    like = {"like": str(known / "A")}
    prepare(str(tmp_path / "new.csv"), tmp_path / "new", options=like)
    bare = prepare(str(tmp_path / "bare.csv"), tmp_path / "bare", options=like)
    assert not bare.labelled and bare.weight is None and bare.timestamp is None
    prepare(str(tmp_path / "new.csv"), tmp_path / "own", spec=known / "spec.toml")

    values = {
        "name": "t",
        "data": {"path": str(known / "A"), "streams": 2},
        "tables": {"dim": 4},
        "model": {"kind": "dlrm", "bottom": [8, 4], "top": [8, 1]},
        "optim": {"sparse": {"kind": "rowwise_adagrad", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.1}},
        "train": {"batch_size": 200},
        "eval": {"final_split": "valid"},
    }
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(configs.validate(configs.Config, values, where="test").to_toml())
    new_figures, no_labels, other_ids = run_ranks(_story, 2, run_dir, tmp_path)[0]
    assert (new_figures["split"], new_figures["rows"]) == ("test", 130)
    assert "'bare' has no labels, which evaluating needs" in no_labels
    assert "numbers its ids in another way" in other_ids and f"--like {known / 'A'}" in other_ids

    labelled, unlabelled = pq.read_table(tmp_path / "new.parquet"), pq.read_table(tmp_path / "bare.parquet")
    assert labelled.column_names == ["row", "liked", "prediction_liked"]
    assert labelled["liked"].to_pylist() == (new["rating"] >= 4).astype(float).tolist()
    assert unlabelled.column_names == ["row", "prediction_liked"]
    assert unlabelled["prediction_liked"].equals(labelled["prediction_liked"])


def test_the_encoding_is_readable(known):
    said = json.loads((known / "A" / "encoding" / "encoding.json").read_text())
    assert [f["name"] for f in said["features"]] == ["user", "item", "tags", "place", "age_group"]
    assert pq.read_table(known / "A/encoding/vocabulary_00000.parquet").num_rows == load(
        known / "A"
    ).categorical[0].cardinality - 1  # fmt: skip
