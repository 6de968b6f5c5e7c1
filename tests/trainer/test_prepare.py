"""Files -> dataset folder: values against pandas, splits, transforms, ids, determinism."""

import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kernels.errors import UserError
from tests.trainer.criteo_text import criteo_lines
from trainer.data.dataset import load
from trainer.prepare import prepare, summary

SPEC = """
[[label]]
column = "y"
[[categorical]]
columns = ["a", "b"]
[[dense]]
columns = ["x"]
log1p = true
[split]
valid = 0.2
"""


def write_spec(tmp_path, text):
    path = tmp_path / "spec.toml"
    path.write_text(text)
    return path


def read(dest, split):
    files = sorted((dest / split).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files])


def read_all(dest):
    """All rows of all splits."""
    return pa.concat_tables([read(dest, name) for name in load(dest).splits])


def test_awkward_csv_against_pandas(tmp_path):
    """Quotes, quoted line ends, CRLF, blank lines, unicode, huge integers, NaN, empty strings."""
    values = [
        "plain",
        "",
        "with, comma",
        'with "quotes"',
        "two\r\nlines",
        "ünïcödé 漢字",
        "99999999999999999999999",
        " x",
        "x",
    ]
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "n": np.arange(400.0),
            "y": rng.integers(0, 2, 400),
            "a": rng.choice(values, 400),
            "b": rng.integers(-(2**62), 2**62, 400) // 2**60,
            "x": rng.choice([0.0, 1.5, 1e30, -3.0, np.nan], 400),
        }
    )
    text = frame.to_csv(index=False, lineterminator="\r\n", na_rep="NaN")
    lines = text.replace("NaN", "nan").replace("\r\n0.0,", "\r\n\r\n0.0,", 1)  # a blank line too
    (tmp_path / "d.csv").write_bytes(lines.encode())
    spec = write_spec(
        tmp_path, SPEC.replace('["x"]', '["x"]').replace("[split]", '[[dense]]\ncolumns = ["n"]\n[split]')
    )
    for block_bytes in (64, 1000, 1 << 20):
        dest = tmp_path / f"out{block_bytes}"
        dataset = prepare(str(tmp_path / "d.csv"), dest, spec=spec, options={"block_bytes": block_bytes})
        found = read_all(dest).to_pandas().sort_values("n").reset_index(drop=True)
        assert dataset.rejected == 0 and len(found) == len(frame)
        assert (found["y"] == frame["y"]).all()
        expected = np.log1p(np.maximum(frame["x"], 0)).fillna(0.0).astype(np.float32)
        np.testing.assert_allclose(found["x"], expected, rtol=1e-6)
        assert (found["a"][frame["a"] == ""] == 0).all()
        pairs = pd.DataFrame({"id": found["a"], "value": frame["a"]}).query("id > 0").drop_duplicates()
        assert pairs["id"].is_unique and pairs["value"].is_unique
        pairs = pd.DataFrame({"id": found["b"], "value": frame["b"]}).drop_duplicates()
        assert pairs["value"].is_unique and (pairs["id"] > 0).all()


def test_vocabulary_is_by_frequency_of_the_train_split_only(tmp_path):
    train = pd.DataFrame({"y": [0, 1] * 5, "a": [7] * 5 + [3] * 3 + [1, 2], "b": list("ppppqqrrrs"), "x": 1})
    valid = pd.DataFrame({"y": [1, 0], "a": [3, 99], "b": ["new", "r"], "x": 1})
    train.to_parquet(tmp_path / "t.parquet")
    valid.to_parquet(tmp_path / "v.parquet")
    spec = write_spec(tmp_path, SPEC.replace('columns = ["a", "b"]', 'columns = ["a", "b"]\nmin_count = 2'))
    options = {"valid": str(tmp_path / "v.parquet"), "test": None}
    dataset = prepare(str(tmp_path / "t.parquet"), tmp_path / "o", spec=spec, options=options)
    assert read(tmp_path / "o", "train")["a"].to_pylist() == [1] * 5 + [2] * 3 + [0, 0]
    assert read(tmp_path / "o", "train")["b"].to_pylist() == [1, 1, 1, 1, 3, 3, 2, 2, 2, 0]
    assert read(tmp_path / "o", "valid")["a"].to_pylist() == [2, 0]
    assert read(tmp_path / "o", "valid")["b"].to_pylist() == [0, 2]
    a, b = dataset.categorical
    assert (a.cardinality, b.cardinality) == (3, 4)
    assert a.stats.unseen == 2 and b.stats.unseen == 1 and a.stats.distinct == 3
    assert a.stats.top_share["1"] == 0.5 and a.stats.top_share["10"] == 1.0
    assert dataset.positive_rate == {"y": 0.5}


def test_multi_hot_by_separator_and_by_parquet_list(tmp_path):
    bags = [["p", "q"], ["p"], [], None, ["q", "", "p", "p"], ["r"]]
    text = "y\ttags\n" + "".join(f"{i % 2}\t{'|'.join(b or [])}\n" for i, b in enumerate(bags))
    (tmp_path / "d.tsv").write_text(text)
    lists = pa.table({"y": [0.0, 1.0] * 3, "tags": pa.array(bags, pa.list_(pa.string()))})
    pq.write_table(lists, tmp_path / "d.parquet")
    base = '[[label]]\ncolumn = "y"\n[[categorical]]\ncolumns = ["tags"]\n'
    more = '[split]\nvalid = ["{}"]\n'
    for file, extra in (("d.tsv", 'separator = "|"\n'), ("d.parquet", "")):
        other = tmp_path / f"copy.{file}"
        other.write_bytes((tmp_path / file).read_bytes())
        spec = write_spec(tmp_path, base + extra + more.format(other))
        dataset = prepare(str(tmp_path / file), tmp_path / f"o{file}", spec=spec)
        found = read(tmp_path / f"o{file}", "train")["tags"]
        assert found.to_pylist() == [[1, 2], [1], None, None, [2, 1, 1], [3]]
        assert found.type == pa.list_(pa.field("item", pa.int32(), nullable=False))
        stats = dataset.categorical[0].stats
        assert (stats.ids, stats.missing, stats.max_per_bag, stats.distinct) == (7, 2, 3, 3)
        spec = write_spec(tmp_path, base + extra + 'missing = "reserved"\n' + more.format(other))
        prepare(str(tmp_path / file), tmp_path / f"r{file}", spec=spec)
        assert read(tmp_path / f"r{file}", "train")["tags"].to_pylist() == [[1, 2], [1], [0], [0], [2, 1, 1], [3]]


def test_labels_weight_timestamp_and_buckets(tmp_path):
    frame = pd.DataFrame(
        {
            "rating": [1.0, 4, 5, 3.5],
            "age": [10.0, 18, np.nan, 70],
            "w": [0, 1, 2.5, 1],
            "t": pd.date_range("2024", periods=4),
        }
    )
    frame.to_csv(tmp_path / "d.csv", index=False)
    spec = write_spec(
        tmp_path,
        """
        weight = "w"
        timestamp = { column = "t", parse = "iso8601" }
        [[label]]
        column = "rating"
        name = "liked"
        at_least = 4
        [[label]]
        column = "rating"
        name = "high"
        above = 4
        [[label]]
        column = "rating"
        name = "stars"
        number = true
        [[categorical]]
        columns = ["age"]
        name = "age_group"
        buckets = [18, 65]
        [[dense]]
        columns = "age"
        standardise = true
        [split]
        by = "time"
        valid_from = "2024-01-04"
        """,
    )
    dataset = prepare(str(tmp_path / "d.csv"), tmp_path / "o", spec=spec)
    train, valid = read(tmp_path / "o", "train"), read(tmp_path / "o", "valid")
    assert train.column_names == ["liked", "high", "stars", "age", "age_group", "w", "t"]
    assert train["liked"].to_pylist() == [0, 1, 1] and train["high"].to_pylist() == [0, 0, 1]
    assert train["stars"].to_pylist() == [1, 4, 5] and train["w"].to_pylist() == [0, 1, 2.5]
    assert train["age_group"].to_pylist() == [1, 2, 0] and valid["age_group"].to_pylist() == [3]
    assert train["age"].to_pylist() == [-1, 1, 0]  # mean 14, deviation 4; missing is 0
    assert train["t"].to_pylist() == [1704067200 + 86400 * i for i in range(3)]
    assert dataset.categorical[0].cardinality == 4
    assert dataset.dense[0].transform == {"standardise": True, "mean": 14.0, "std": 4.0}
    assert dataset.dense[0].missing == 1


def test_ids_as_they_are_and_hashed(tmp_path):
    frame = pd.DataFrame({"y": [0, 1, 0, 1], "u": [5, 0, 3_000_000_000, 1], "h": ["a", "b", "a", None]})
    frame.to_parquet(tmp_path / "d.parquet")
    text = """
    [[label]]
    column = "y"
    [[categorical]]
    columns = "u"
    ids = "as_is"
    ROWS
    [[categorical]]
    columns = "h"
    ids = "hash"
    rows = 1000
    seed = 3
    missing = "empty"
    """
    frame.to_parquet(tmp_path / "v.parquet")
    options = {"valid": [str(tmp_path / "v.parquet")]}
    source = str(tmp_path / "d.parquet")
    dataset = prepare(source, tmp_path / "o", spec=write_spec(tmp_path, text.replace("ROWS", "")), options=options)
    train = read(tmp_path / "o", "train")
    assert dataset.categorical[0].cardinality == 3_000_000_001 and train["u"].type == pa.int64()
    assert train["u"].to_pylist() == frame["u"].tolist()
    h = train["h"].to_pylist()
    assert h[0] == h[2] != h[1] and h[3] is None and all(0 < i < 1000 for i in h[:3]) and train["h"].type == pa.int32()
    with pytest.raises(UserError, match=r"d.parquet, row 2: column 'u': id 3000000000: .*0..5"):
        prepare(source, tmp_path / "p", spec=write_spec(tmp_path, text.replace("ROWS", "rows = 6")), options=options)
    assert not (tmp_path / "p").exists() and not (tmp_path / ".p.partial").exists()


def test_criteo_gz_several_files_and_hex_of_any_length(tmp_path):
    lines = criteo_lines(300)
    (tmp_path / "day_0.txt").write_text("".join(lines[:100]))
    with gzip.open(tmp_path / "day_1.txt.gz", "wt") as stream:
        stream.write("".join(lines[100:]).rstrip("\n"))  # no line end at the very end
    (tmp_path / "one.txt").write_text("".join(lines))
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "day_0.txt").rename(folder / "day_0.txt")
    (tmp_path / "day_1.txt.gz").rename(folder / "day_1.txt.gz")
    dataset = prepare(f"criteo:{folder}", tmp_path / "o", options={"block_bytes": 3000})
    assert sum(s.rows for s in dataset.splits.values()) == 300 and set(dataset.splits) == {"train", "valid", "test"}
    found = read_all(tmp_path / "o").to_pandas()
    frame = pd.read_csv(tmp_path / "one.txt", sep="\t", header=None)
    wanted = np.log1p(frame[1].clip(lower=0)).fillna(0)
    np.testing.assert_allclose(np.sort(found["I1"]), np.sort(wanted), rtol=1e-6)
    assert found["label"].sum() == frame[0].sum()
    # auto-detected, and text that parses as a number is accepted as one
    other = prepare(str(tmp_path / "one.txt"), tmp_path / "p", options={"valid": "0.2", "min_count": "2"})
    assert set(other.splits) == {"train", "valid"}


def test_one_row_and_no_row_group_is_too_small(tmp_path):
    pd.DataFrame({"y": [1], "a": ["v"], "b": [2], "x": [0.0]}).to_csv(tmp_path / "d.csv", index=False)
    (tmp_path / "e.csv").write_text((tmp_path / "d.csv").read_text())
    spec = write_spec(tmp_path, SPEC)
    options = {"valid": str(tmp_path / "e.csv")}
    dataset = prepare(str(tmp_path / "d.csv"), tmp_path / "o", spec=spec, options=options)
    assert dataset.splits["train"].files[0].row_groups == (1,)
    assert read(tmp_path / "o", "valid").to_pylist() == [{"y": 1.0, "x": 0.0, "a": 1, "b": 1}]


def test_columns_without_header_patterns_and_delimiter(tmp_path):
    (tmp_path / "d.dat").write_text("".join(f"{i % 2};{i % 3};{i % 5};{i}\n" for i in range(50)))
    spec = write_spec(
        tmp_path,
        """
        [source]
        delimiter = ";"
        columns = ["y", "c1", "c2", "d"]
        [[label]]
        column = "y"
        [[categorical]]
        columns = ["c*"]
        [[categorical]]
        columns = ["d"]
        quantiles = 5
        """,
    )
    dataset = prepare(str(tmp_path / "d.dat"), tmp_path / "o", spec=spec)
    assert dataset.feature_names == ("c1", "c2", "d")
    assert [c.cardinality for c in dataset.categorical] == [4, 6, 6]


def test_row_groups_and_metadata_agree_with_the_files(tmp_path):
    frame = pd.DataFrame({"y": [0, 1] * 20000, "a": range(40000), "b": 1, "x": 2.0})
    frame.to_parquet(tmp_path / "d.parquet", row_group_size=7001)
    dataset = prepare(str(tmp_path / "d.parquet"), tmp_path / "o", spec=write_spec(tmp_path, SPEC))
    for split in dataset.splits.values():
        for file in split.files:
            metadata = pq.ParquetFile(tmp_path / "o" / file.path).metadata
            assert file.row_groups == tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    assert len(dataset.splits["train"].files[0].row_groups) >= 30
    share = dataset.splits["valid"].rows / 40000
    assert abs(share - 0.2) < 0.01
    ids = read_all(tmp_path / "o").to_pandas()["a"]
    seen = ids[ids > 0]
    assert seen.is_unique  # each row once: distinct source values keep distinct ids


def test_time_split_by_quantiles_has_train_before_valid_before_test(tmp_path):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"y": 0, "a": 1, "b": 1, "x": 1.0, "t": rng.integers(0, 500, 5000)})
    frame.to_csv(tmp_path / "d.csv", index=False)
    spec = write_spec(tmp_path, 'timestamp = "t"\n' + SPEC.replace("[split]", '[split]\nby = "time"\ntest = 0.1'))
    dataset = prepare(str(tmp_path / "d.csv"), tmp_path / "o", spec=spec, options={"block_bytes": 4000})
    times = {name: read(tmp_path / "o", name)["t"].to_numpy() for name in ("train", "valid", "test")}
    assert times["train"].max() < times["valid"].min() and times["valid"].max() < times["test"].min()
    assert sum(len(t) for t in times.values()) == 5000
    assert (
        abs(dataset.splits["valid"].rows / 5000 - 0.2) < 0.01 and abs(dataset.splits["test"].rows / 5000 - 0.1) < 0.01
    )


def test_threads_and_block_size_do_not_change_the_dataset(tmp_path):
    (tmp_path / "train.txt").write_text("".join(criteo_lines(2000)))
    source = f"criteo:{tmp_path / 'train.txt'}"
    made = [
        prepare(source, tmp_path / f"o{threads}", options={"threads": threads, "block_bytes": 20_000})
        for threads in (1, 2, 5)
    ]
    assert len({d.fingerprint for d in made}) == 1
    assert len({d.model_copy(update={"name": ""}).model_dump_json() for d in made}) == 1
    larger = prepare(source, tmp_path / "larger", options={"block_bytes": 90_000})
    assert larger.fingerprint == made[0].fingerprint


def test_summary_shows_every_feature(tmp_path):
    (tmp_path / "train.txt").write_text("".join(criteo_lines(200)))
    seen = []
    dataset = prepare(
        f"criteo:{tmp_path / 'train.txt'}",
        tmp_path / "o",
        progress=lambda done, total, text: seen.append((done, total, text)),
    )
    console = Console(width=160)
    with console.capture() as capture:
        console.print(summary(dataset))
    for name in ("I1", "I13", "C1", "C26"):
        assert name in capture.get()
    assert {text for _, _, text in seen} == {"counting", "writing", "done"}
    assert all(0 < done <= total for done, total, _ in seen)
    assert json.loads((tmp_path / "o" / "dataset.json").read_text())["format"] == "tablemesh-dataset"
