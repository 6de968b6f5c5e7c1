"""The reader against a slow one, on real files; every way in which files can be wrong."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kernels.errors import UserError
from tests.trainer.parquet_files import FEATURES, all_batches, as_slow, reader, slow_batch, table, write
from trainer.config import Features
from trainer.data.dataset import Dataset
from trainer.data.order import hash64
from trainer.data.parquet import dataset_from_folder, open_dataset


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Several files of different sizes, row groups that divide nothing, one file whose page ids are int64."""
    tables = [table(rows, seed) for seed, rows in enumerate((100, 1, 57, 43))]
    tables[2] = tables[2].set_column(5, "page", tables[2]["page"].cast(pa.int64()))
    folder = write(tmp_path_factory.mktemp("awkward"), tables)
    names = [*FEATURES.labels, *FEATURES.dense, *FEATURES.categorical, FEATURES.weight]
    rows = [row for one in tables for row in one.select(names).to_pylist()]
    return folder, dataset_from_folder(folder, FEATURES), rows


def test_a_folder_that_nobody_prepared(awkward):
    folder, dataset, rows = awkward
    assert isinstance(dataset, Dataset) and list(dataset.splits) == ["train"]
    assert dataset.split("train").rows == len(rows) == 201
    assert dataset.split("train").files[0].row_groups == (13,) * 7 + (9,)
    assert [(c.name, c.cardinality, c.multi_hot) for c in dataset.categorical] == [
        ("user", 50, False),
        ("word", 30, True),
        ("page", 7, False),
    ]
    assert dataset.fingerprint == dataset_from_folder(folder, FEATURES).fingerprint
    assert open_dataset(folder, FEATURES) == dataset


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": False},
        {"shuffle_window": 1},
        {"shuffle_window": 8},
        {"shuffle_window": 1000},
        {"batch_size": 8, "shuffle_window": 5},
        {"batch_size": 512},
        {"streams": 1, "batch_size": 7},
        {"threads": 1, "prefetch": 1},
        {"threads": 4, "prefetch": 9},
    ],
    ids=str,
)
def test_equals_a_slow_reader(awkward, options):
    folder, dataset, rows = awkward
    one = reader(folder, dataset, **options)
    for epoch in (0, 1):
        order = one.order.epoch(epoch)
        batches = all_batches(one, epoch)
        assert len(batches) == one.steps_per_epoch
        for step, batch in enumerate(batches):
            numbers = order.global_batch(step).tolist()
            assert batch.rows_in_step == sum(n >= 0 for n in numbers)
            assert as_slow(batch, FEATURES) == slow_batch(rows, numbers, FEATURES)


def test_blocks_smaller_than_a_stream(awkward, monkeypatch):
    """In small files a stream is one block; with less in each, a batch needs several, and a row group fills many."""
    monkeypatch.setattr("trainer.data.loader.BLOCK_ROWS", 3)
    folder, dataset, rows = awkward
    for window in (1, 2, 4, 7):
        one = reader(folder, dataset, streams=2, batch_size=10, shuffle_window=window)
        for start in (0, 3, one.steps_per_epoch - 1):
            for step, batch in enumerate(all_batches(one, 0, start), start):
                numbers = one.order.epoch(0).global_batch(step).tolist()
                assert as_slow(batch, FEATURES) == slow_batch(rows, numbers, FEATURES)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_same_global_batches_on_any_number_of_ranks(awkward, world_size, shuffle):
    folder, dataset, rows = awkward
    ranks = [
        all_batches(reader(folder, dataset, rank=r, world_size=world_size, shuffle=shuffle), 1)
        for r in range(world_size)
    ]
    order = reader(folder, dataset, shuffle=shuffle).order.epoch(1)
    assert {len(batches) for batches in ranks} == {order.order.steps_per_epoch}
    for step, parts in enumerate(zip(*ranks, strict=True)):
        expected = slow_batch(rows, order.global_batch(step).tolist(), FEATURES)
        found = [as_slow(part, FEATURES) for part in parts]
        assert [n for part in found for n in part["row"]] == expected["row"]
        assert [w for part in found for w in part["weight"]] == expected["weight"]
        for k in range(2):
            assert [x for part in found for x in part["dense"][k]] == expected["dense"][k]
            assert [x for part in found for x in part["labels"][k]] == expected["labels"][k]
        for name in FEATURES.categorical:
            assert [bag for part in found for bag in part["ids"][name]] == expected["ids"][name]
        assert {part.rows_in_step for part in parts} == {sum(n >= 0 for n in expected["row"])}


@pytest.mark.parametrize("start_step", [0, 1, 5, 12, 13])
def test_a_seek_gives_what_running_there_would(awkward, start_step):
    folder, dataset, _ = awkward
    one = reader(folder, dataset, rank=1, world_size=2)
    assert one.steps_per_epoch == 13
    whole = [as_slow(batch, FEATURES) for batch in all_batches(one, 2)]
    assert [as_slow(batch, FEATURES) for batch in all_batches(one, 2, start_step)] == whole[start_step:]
    with pytest.raises(UserError, match=r"start_step 14: an epoch has the steps 0 \.\. 12"):
        one.batches(2, 14)


def test_types_of_a_batch(tmp_path):
    folder = write(tmp_path, [table(64, nulls=False)])
    features = Features(labels=("click",), categorical={"user": 50, "page": 7})
    (batch,) = all_batches(reader(folder, dataset_from_folder(folder, features), batch_size=64))
    assert batch.dense_BK.shape == (64, 0) and batch.dense_BK.dtype == torch.float32
    assert batch.labels_BT.shape == (64, 1) and batch.labels_BT.dtype == torch.float32
    assert batch.weight_B.tolist() == [1.0] * 64 and batch.weight_B.dtype == torch.float32
    assert batch.row_B.dtype == torch.int64 and sorted(batch.row_B.tolist()) == list(range(64))
    assert batch.ids.keys() == ["user", "page"] and batch.ids.stride() == 64
    assert batch.ids.values().dtype == torch.int64 and batch.ids.lengths().dtype == torch.int32
    assert batch.ids.length_per_key() == [64, 64]
    assert batch.ids["page"].values().tolist() == [
        table(64, nulls=False)["page"][n].as_py() for n in batch.row_B.tolist()
    ]
    assert all(t.is_contiguous() for t in (batch.dense_BK, batch.labels_BT, batch.ids.values()))


def test_a_batch_keeps_its_values_while_the_reader_goes_on(awkward):
    """Memory is used again only when nothing looks at it: a view of a batch holds it as the batch would."""
    folder, dataset, rows = awkward
    one = reader(folder, dataset)
    views, rows_of = [], []
    for _ in range(3):
        for batch in all_batches(one):
            views.append(batch.dense_BK.T[0][1:])
            rows_of.append(batch.row_B.clone())
            del batch
    for view, numbers in zip(views, rows_of, strict=True):
        assert view.tolist() == [rows[n]["age"] if n >= 0 else 0.0 for n in numbers.tolist()][1:]


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_every_integer_type(tmp_path, kind):
    ids = pa.array([0, 3, None, 100, 99], pa.type_for_alias(kind))
    lists = pa.array([[1], None, [], [100, None, 2], [4]], pa.large_list(pa.type_for_alias(kind)))
    pq.write_table(pa.table({"y": [True, False, True, True, False], "a": ids, "b": lists}), tmp_path / "x.parquet")
    features = Features(labels=("y",), categorical={"a": 101, "b": 101})
    one = reader(tmp_path, dataset_from_folder(tmp_path, features), batch_size=5, streams=1, shuffle=False)
    (batch,) = all_batches(one)
    found = as_slow(batch, features)
    assert found["ids"] == {"a": [[0], [3], [], [100], [99]], "b": [[1], [], [], [100, 2], [4]]}
    assert found["labels"] == [[1.0, 0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("kind", ["int8", "int64", "uint16", "float16", "float32", "float64", "bool_"])
def test_numbers_of_every_type(tmp_path, kind):
    values = pa.array(np.array([0, 1, 1, 0]), pa.type_for_alias("int64")).cast(pa.type_for_alias(kind.rstrip("_")))
    pq.write_table(pa.table({"y": values, "x": values, "a": [1, 2, 3, 0]}), tmp_path / "x.parquet")
    features = Features(labels=("y",), dense=("x",), categorical={"a": 4})
    (batch,) = all_batches(
        reader(tmp_path, dataset_from_folder(tmp_path, features), batch_size=4, streams=1, shuffle=False)
    )
    assert batch.dense_BK[:, 0].tolist() == batch.labels_BT[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_tables_beyond_int32(tmp_path):
    ids = [0, 2**40, 2**31, 5]
    pq.write_table(
        pa.table({"y": [0, 1, 0, 1], "a": ids, "b": pa.array([1, 2, 3, 4], pa.int32())}), tmp_path / "x.parquet"
    )
    features = Features(labels=("y",), categorical={"a": 2**40 + 1, "b": 5})
    one = reader(tmp_path, dataset_from_folder(tmp_path, features), batch_size=4, streams=2, shuffle_window=4)
    (batch,) = all_batches(one)
    assert batch.ids["a"].values().tolist() == [ids[n] for n in batch.row_B.tolist()]
    assert batch.ids["b"].values().tolist() == [n + 1 for n in batch.row_B.tolist()]


def test_ids_of_any_64_bits_beside_rows_without_one(tmp_path):
    """Negative ids are ids, also in a feature with nulls and in the last, padded batch."""
    ids = [None, -1, -(2**63) + 1, 2**63 - 1, None, 0, -7]
    columns = {"y": [0.0] * 7, "a": pa.array(ids, pa.int64()), "b": pa.array([3, None, 1, 0, None, 2, 2], pa.int32())}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    dataset = dataset_from_folder(tmp_path, Features(labels=("y",), categorical={"a": 10, "b": 4}))
    options = {"batch_size": 5, "streams": 1, "shuffle": False, "rows_by_feature": {"a": 1 << 64}}
    batches = all_batches(reader(tmp_path, dataset, **options))
    found = [[bag.tolist() for bag in batch.ids[key].to_dense()] for key in "ab" for batch in batches]
    bags = [[[] if i is None else [i] for i in (*columns[key].to_pylist(), *[None] * 3)] for key in "ab"]
    assert found == [part for of_key in bags for part in (of_key[:5], of_key[5:])]
    columns["a"] = pa.array([-(2**63), *ids[1:]], pa.int64())
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"feature .a. has the id -9223372036854775808.*stands for none"):
        all_batches(
            reader(tmp_path, dataset_from_folder(tmp_path, Features(labels=("y",), categorical={"a": 10})), **options)
        )


def with_ids(tmp_path, ids: list, kind: pa.DataType, policy: str, rows: int = 10) -> list[list[int]]:
    pq.write_table(pa.table({"y": [0.0] * len(ids), "a": pa.array(ids, kind)}), tmp_path / "x.parquet")
    features = Features(labels=("y",), categorical={"a": 10})
    dataset = dataset_from_folder(tmp_path, features)
    options = {"batch_size": len(ids), "streams": 1, "shuffle": False, "rows_by_feature": {"a": rows}}
    (batch,) = all_batches(reader(tmp_path, dataset, id_policy={"a": policy}, **options))
    return as_slow(batch, features)["ids"]["a"]


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64()])
def test_ids_outside_are_clipped_or_hashed(tmp_path, kind):
    ids = [3, -1, 9, 10, None, -(2**31), 2**31 - 1]
    assert with_ids(tmp_path, ids, kind, "clip") == [[3], [0], [9], [9], [], [0], [9]]
    mixed = [int(hash64(np.array([i]).astype(np.uint64))[0] % np.uint64(10)) for i in (-1, 10, -(2**31), 2**31 - 1)]
    assert with_ids(tmp_path, ids, kind, "hash") == [[3], [mixed[0]], [9], [mixed[1]], [], [mixed[2]], [mixed[3]]]


def test_the_policy_reaches_into_lists_and_beyond_int64(tmp_path):
    assert with_ids(tmp_path, [[1, 12], None, [-4, 2]], pa.list_(pa.int64()), "clip") == [[1, 9], [], [0, 2]]
    assert with_ids(tmp_path, [2**64 - 1, 4], pa.uint64(), "clip") == [[9], [4]]
    with pytest.raises(UserError, match=f"has id {2**64 - 1}, but"):
        with_ids(tmp_path, [4, 2**64 - 1], pa.uint64(), "error")


@pytest.mark.parametrize(
    ("ids", "kind", "bad"),
    [
        ([1, 2, 3, None, 10, 11], pa.int32(), "has id 10"),
        ([1, 2, 3, 4, -1, 5], pa.int64(), "has id -1"),
        ([[1], [2, 3], [], None, [4, 12], [3]], pa.list_(pa.int32()), "has id 12"),
    ],
)
def test_an_id_outside_is_named_with_its_place_and_the_ways_out(tmp_path, ids, kind, bad):
    with pytest.raises(UserError) as found:
        with_ids(tmp_path, ids, kind, "error")
    text = str(found.value)
    assert f"{tmp_path / 'x.parquet'}, row group 0, row 4: feature 'a' {bad}, but its table 'a' has 10 rows" in text
    assert 'id_policy = "clip" or "hash"' in text
    assert ("set rows = " in text) == ("-1" not in bad)  # more rows do not help with a negative id


def test_row_groups_are_counted_in_their_file_and_tables_named(tmp_path):
    tables = [table(40, 1), table(40, 2)]
    tables[1] = tables[1].set_column(5, "page", pa.array([1] * 31 + [7] + [1] * 8, pa.int32()))
    folder = write(tmp_path, tables)
    one = reader(folder, dataset_from_folder(folder, FEATURES), table_by_feature={"page": "pages"})
    with pytest.raises(UserError) as found:
        all_batches(one)
    assert "part-001.parquet, row group 2, row 5: feature 'page' has id 7, but its table 'pages' has 7" in str(
        found.value
    )


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("age", [1.0, float("nan"), 2.0], "row 1: column 'age' is nan"),
        ("age", [1.0, 2.0, float("-inf")], "row 2: column 'age' is -inf"),
        ("age", [1e300, 2.0, 3.0], "row 0: column 'age' is 1e+300"),
        ("age", [1.0, None, None], r"row 1: column 'age' has no value here (2 such rows"),
        ("click", [0.0, 1.0, float("nan")], "row 2: column 'click' is nan"),
        ("click", [None, 1, 0], "row 0: column 'click' has no value"),
        ("click", [0.0, 1.5, 2.0], "row 1: label 'click' is 1.5 (2 such rows here); loss and metrics need"),
        ("buy", [-0.0, 1.0, -1.0], "row 2: label 'buy' is -1 (1 such"),
        ("buy", [0, 1, 2], "row 2: label 'buy' is 2 (1 such"),
        ("weight", [1.0, float("inf"), 1.0], "row 1: column 'weight' is inf"),
        ("weight", [1.0, 1.0, -0.5], "row 2: weight 'weight' is -0.5; weights must be at least 0"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(tmp_path, column, values, message):
    one = table(3)
    one = one.set_column(one.column_names.index(column), column, pa.array(values))
    folder = write(tmp_path, [one])
    with pytest.raises(UserError) as found:
        all_batches(reader(folder, dataset_from_folder(folder, FEATURES), shuffle=False))
    assert f"part-000.parquet, row group 0, {message}" in str(found.value)


def test_labels_from_0_to_1_and_any_where_nothing_is_learned_from_them(tmp_path):
    labels = [-0.0, 0.25, 1.0]
    one = table(3).set_column(1, "click", pa.array(labels))
    dataset = dataset_from_folder(write(tmp_path, [one]), FEATURES)
    options = {"shuffle": False, "streams": 1, "batch_size": 3}
    assert all_batches(reader(tmp_path, dataset, **options))[0].labels_BT[:, 0].tolist() == labels
    one = one.set_column(1, "click", pa.array([5.0, -3.0, 0.0]))
    dataset = dataset_from_folder(write(tmp_path, [one]), FEATURES)
    batches = all_batches(reader(tmp_path, dataset, any_label=True, **options))
    assert batches[0].labels_BT[:, 0].tolist() == [5.0, -3.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["price"]), "column 'price' is not there; did you mean 'prices'"),
        (lambda t: t.set_column(3, "age", pa.array(["1"] * len(t))), "column 'age' has type string, expected numbers"),
        (
            lambda t: t.set_column(5, "page", t["word"]),
            "column 'page' has type list<element: int32>, expected integers",
        ),
        (lambda t: t.set_column(4, "word", t["page"]), "column 'word' has type int32, expected a list of integers"),
        (lambda t: t.set_column(5, "page", t["age"]), "column 'page' has type float, expected integers"),
        (lambda t: t.append_column("age", t["age"]), "column 'age' is there 2 times"),
    ],
)
def test_every_file_is_checked_before_training_starts(tmp_path, change, message):
    good = table(20).append_column("prices", pa.array([1.0] * 20))
    folder = write(tmp_path, [good, good, good])
    dataset = dataset_from_folder(folder, FEATURES)
    pq.write_table(change(good), folder / "part-002.parquet", row_group_size=13)
    with pytest.raises(UserError) as found:
        reader(folder, dataset)
    assert f"{folder / 'part-002.parquet'}: {message}" in str(found.value)


def test_columns_of_the_first_file_that_cannot_be_used(tmp_path):
    folder = write(tmp_path, [table(5)])
    with pytest.raises(UserError, match=r"column 'pages' is not there; did you mean 'page'"):
        dataset_from_folder(folder, FEATURES.model_copy(update={"categorical": {"pages": 3}}))
    with pytest.raises(UserError, match=r"'not asked for' has type string, expected integers or a list of them"):
        dataset_from_folder(folder, FEATURES.model_copy(update={"categorical": {"not asked for": 3}}))


def test_files_that_vanish_or_change(tmp_path):
    folder = write(tmp_path, [table(300)])
    file = folder / "part-000.parquet"
    dataset = dataset_from_folder(folder, FEATURES)
    whole = file.read_bytes()
    one = reader(folder, dataset)
    file.unlink()
    with pytest.raises(UserError, match=r"part-000.parquet: No such file"):
        reader(folder, dataset)
    with pytest.raises(UserError, match=r"part-000.parquet, row group \d+: cannot be read: No such file"):
        all_batches(one)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"part-000.parquet: not a whole Parquet file"):
        reader(folder, dataset)
    with pytest.raises(UserError, match=r"the file changed after the run began"):
        all_batches(one)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"not a whole Parquet file"):
        reader(folder, dataset)
    pq.write_table(table(299), file)
    with pytest.raises(UserError, match=r"299 rows in 1 row groups, but the dataset .* lists 300 in 24"):
        reader(folder, dataset)


def test_damage_inside_a_file(tmp_path):
    folder = write(tmp_path, [table(300)])
    file = folder / "part-000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[4 : len(damaged) // 2] = bytes(len(damaged) // 2 - 4)
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"part-000.parquet, row group \d+: cannot be "):
        all_batches(reader(folder, dataset_from_folder(folder, FEATURES)))


def test_an_empty_split(tmp_path):
    folder = write(tmp_path, [table(0)])
    with pytest.raises(UserError, match=r"split 'train' of the dataset .* is empty"):
        reader(folder, dataset_from_folder(folder, FEATURES))


def test_more_streams_than_rows(tmp_path):
    folder = write(tmp_path, [table(3)])
    dataset = dataset_from_folder(folder, FEATURES)
    for rank in range(8):
        (batch,) = all_batches(reader(folder, dataset, rank=rank, world_size=8, shuffle=False))
        assert batch.rows_in_step == 3 and len(batch.row_B) == 2
        assert batch.row_B.tolist() == {2: [0, -1], 5: [1, -1], 7: [2, -1]}.get(rank, [-1, -1])
        assert batch.dense_BK.shape == (2, 2) and batch.ids.stride() == 2


def test_splits_hidden_files_and_nesting(tmp_path):
    write(tmp_path / "train" / "day=2", [table(4)])
    write(tmp_path / "train" / "day=1", [table(5)])
    write(tmp_path / "test", [table(6)])
    write(tmp_path / "train" / "_temporary", [table(7)])
    write(tmp_path / "elsewhere", [table(8)])
    (tmp_path / "train" / "_SUCCESS").write_text("")
    dataset = dataset_from_folder(tmp_path, FEATURES)
    assert {name: split.rows for name, split in dataset.splits.items()} == {"train": 9, "test": 6}
    assert [f.path for f in dataset.split("train").files] == [
        "train/day=1/part-000.parquet",
        "train/day=2/part-000.parquet",
    ]
    assert list(dataset_from_folder(tmp_path, FEATURES, splits=("test",)).splits) == ["test"]
    before = dataset.fingerprint
    write(tmp_path / "test", [table(6, seed=9)])
    assert dataset_from_folder(tmp_path, FEATURES).fingerprint != before


def test_folders_without_a_dataset(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        dataset_from_folder(tmp_path / "missing", FEATURES)
    with pytest.raises(UserError, match="no Parquet files in it"):
        dataset_from_folder(tmp_path, FEATURES)
    with pytest.raises(UserError, match=r"dataset\.json: No such file"):
        open_dataset(tmp_path)
    write(tmp_path, [table(5)])
    with pytest.raises(
        UserError, match=r"without a dataset.json; name their columns in the config's \[data.features\]"
    ):
        open_dataset(tmp_path)
    dataset = dataset_from_folder(tmp_path, FEATURES)
    (tmp_path / "dataset.json").write_text(dataset.model_dump_json())
    assert open_dataset(tmp_path) == dataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "3 ranks do not divide streams = 8"),
        ({"batch_size": 12}, "batch_size = 12 does not divide over streams = 8; use 8 or 16"),
        ({"id_policy": {"page": "ignore"}}, "id_policy of feature 'page' is 'ignore'; it can be error, clip, hash"),
        ({"rows_by_feature": {"pages": 3}}, "feature 'pages' is not in the dataset .*; did you mean 'page'"),
        ({"split": "valid"}, "split 'valid': the dataset .* has train"),
    ],
)
def test_wrong_arguments(awkward, options, message):
    folder, dataset, _ = awkward
    with pytest.raises(UserError, match=message):
        reader(folder, dataset, **options)


def test_only_the_columns_asked_for_are_decoded(tmp_path):
    """A column that cannot even be decoded does no harm when nobody asks for it."""
    folder = write(tmp_path, [table(300)])
    file = folder / "part-000.parquet"
    chunk = pq.read_metadata(file).row_group(0).column(0)
    with file.open("r+b") as out:
        out.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        out.write(os.urandom(16))
    assert len(all_batches(reader(folder, dataset_from_folder(folder, FEATURES)))) == 19
