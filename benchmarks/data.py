"""`tablemesh bench data`: rows per second of prepare and of the loader, beside pyarrow on the same files.

The loader reads a made-up dataset of 13 dense and 26 single-hot columns, in files such as prepare writes, in batches of
8192 rows over 8 streams on one rank, shuffled in windows of 32768 rows.  Its baseline decodes the same columns of the
same row groups with `ParquetFile.read_row_group` on as many threads and throws them away: no shuffle, no check, no
batch.  Rates are of the clock, and of the CPU time of all threads, which other programs on the machine disturb less.
Prepare turns Criteo-like text into a dataset; its baseline, `pyarrow.csv.read_csv` on all cores too, parses the same
text and keeps the strings.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.base import Row, cores, paired, rate_row, report, usable_cores
from trainer.config import Features
from trainer.data.dataset import Dataset
from trainer.data.parquet import Reader, dataset_from_folder
from trainer.prepare import prepare
from trainer.prepare.write import SplitWriter, make_schema

ROWS = 4_000_000  # of the loader's data: 62 row groups, 7 of which lie in two streams
BAG_ROWS = 1_000_000  # of the dataset with multi-hot features
TEXT_ROWS = 100_000  # of prepare's
ROW_GROUP_ROWS = 65536
BATCH_SIZE, STREAMS, WINDOW = 8192, 8, 32768
PAIRS = 5
# Criteo Kaggle's cardinalities: 8 features with fewer than 256 ids, 6 with more than 100,000.
CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
FEATURES = Features(
    labels=("label",),
    dense=tuple(f"I{k + 1}" for k in range(13)),
    categorical={f"C{c + 1}": rows for c, rows in enumerate(CARDINALITIES)},
)
MULTI_HOT = 6  # columns that are lists of 0 to 6 ids in the second dataset, the next 6 have empty bags


def main(*, json: bool = False) -> int:
    """Run everything, print it; the exit code."""
    with tempfile.TemporaryDirectory(prefix="tablemesh-bench-") as folder:
        rows = [*loader(Path(folder) / "plain", multi_hot=False), *loader(Path(folder) / "bags", multi_hot=True)]
        rows.append(prepare_text(Path(folder)))
    return report("data", rows, json=json)


def loader(folder: Path, *, multi_hot: bool) -> list[Row]:
    write_dataset(folder, multi_hot=multi_hot, count=BAG_ROWS if multi_hot else ROWS)
    dataset = dataset_from_folder(folder, FEATURES)
    correct = equal_to_plain_read(folder, dataset)
    name = f"loader {26 - MULTI_HOT}+13 and {MULTI_HOT} multi-hot" if multi_hot else "loader 26+13"
    found = []
    for threads in (1,) if multi_hot or usable_cores() < 2 else (1, 2):
        with cores(threads):
            runs = paired(
                partial(read, reader(folder, dataset, threads), iter(range(1 << 30))),
                partial(decode, folder, dataset, threads),
                pairs=PAIRS,
            )
        shared = {"count": dataset.split("train").rows, "baseline_name": "pyarrow decode", "correct": correct}
        title = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
        found.append(rate_row(title, runs, unit="rows/s", **shared))
        found.append(rate_row(f"{title}, CPU time", runs, unit="rows/s", cpu=True, **shared))
    return found


def reader(folder: Path, dataset: Dataset, threads: int) -> Reader:
    return Reader(
        folder,
        dataset,
        "train",
        batch_size=BATCH_SIZE,
        streams=STREAMS,
        seed=1,
        shuffle_window=WINDOW,
        threads=threads,
        prefetch=4,
    )


def read(batches: Reader, epochs: Iterator[int]) -> None:
    for _ in batches.batches(next(epochs)):
        pass


def decode(folder: Path, dataset: Dataset, threads: int) -> None:
    columns = [*FEATURES.labels, *FEATURES.dense, *FEATURES.categorical]

    def one(place: tuple[str, int]) -> None:
        pq.ParquetFile(folder / place[0]).read_row_group(place[1], columns=columns, use_threads=False)

    places = [(file.path, g) for file in dataset.split("train").files for g in range(len(file.row_groups))]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, places):
            pass


def equal_to_plain_read(folder: Path, dataset: Dataset) -> bool:
    """Whether one shuffled epoch, put back in file order, is what pyarrow reads: every number, id and bag."""
    table = pa.concat_tables(pq.read_table(folder / file.path) for file in dataset.split("train").files)
    seen = np.zeros(len(table), bool)
    for batch in reader(folder, dataset, 2).batches(0):
        there = batch.row_B.numpy() >= 0
        rows = batch.row_B.numpy()[there]
        if seen[rows].any():
            return False
        seen[rows] = True
        expected = table.take(pa.array(rows))
        numbers = np.concatenate([batch.dense_BK.numpy(), batch.labels_BT.numpy()], axis=1)[there]
        for k, name in enumerate((*FEATURES.dense, *FEATURES.labels)):
            if not np.array_equal(numbers[:, k], expected[name].to_numpy()):
                return False
        for name in FEATURES.categorical:
            ids = expected[name].combine_chunks()
            many = pa.types.is_list(ids.type)
            lengths = ids.value_lengths().fill_null(0) if many else ids.is_valid()
            jagged = batch.ids[name]
            if not np.array_equal(jagged.lengths().numpy()[there], np.asarray(lengths).astype(np.int32)):
                return False
            if not np.array_equal(jagged.values().numpy(), np.asarray(ids.flatten() if many else ids.drop_null())):
                return False
    return bool(seen.all())


def write_dataset(folder: Path, *, multi_hot: bool, count: int = ROWS) -> None:
    rng = np.random.default_rng(1)
    kinds = {name: pa.int32() for name in FEATURES.categorical}
    nullable = set()
    if multi_hot:
        names = list(kinds)
        kinds |= {name: pa.list_(pa.field("item", pa.int32(), nullable=False)) for name in names[:MULTI_HOT]}
        nullable = set(names[MULTI_HOT : 2 * MULTI_HOT])
    schema = make_schema(labels=FEATURES.labels, dense=FEATURES.dense, categorical=kinds, nullable=nullable)
    writer = SplitWriter(folder, "train", schema, group_rows=ROW_GROUP_ROWS)
    folder.mkdir()
    for start in range(0, count, ROW_GROUP_ROWS):
        writer.add(made_up_rows(rng, min(ROW_GROUP_ROWS, count - start), schema))
    writer.finish()


def made_up_rows(rng: np.random.Generator, rows: int, schema: pa.Schema) -> pa.Table:
    columns = [pa.array((rng.random(rows) < 0.25).astype(np.float32))]
    columns += [pa.array(np.log1p(rng.zipf(1.5, rows).clip(0, 1e6)).astype(np.float32)) for _ in FEATURES.dense]
    for name, cardinality in FEATURES.categorical.items():
        field = schema.field(name)
        if pa.types.is_list(field.type):
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 7, rows))]).astype(np.int32)
            ids = (rng.zipf(1.2, offsets[-1]) % cardinality).astype(np.int32)
            columns.append(pa.ListArray.from_arrays(offsets, ids, type=field.type))
        else:
            missing = rng.random(rows) < 0.1 if field.nullable else None
            columns.append(pa.array((rng.zipf(1.2, rows) % cardinality).astype(np.int32), mask=missing))
    return pa.table(columns, schema=schema)


def prepare_text(folder: Path) -> Row:
    """Criteo's text with missing values -> a dataset, vocabularies and all, on all cores."""
    text = folder / "criteo.tsv"
    source = write_text(text)
    options = pa.csv.ReadOptions(autogenerate_column_names=True)
    convert = pa.csv.ConvertOptions(column_types={f"f{c}": pa.string() for c in range(14, 40)})
    parse = pa.csv.ParseOptions(delimiter="\t")
    made = []

    def ours() -> None:
        made.append(prepare(str(text), folder / "prepared", options={"existing": "replace", "seed": 1}))

    def baseline() -> None:
        pa.csv.read_csv(text, read_options=options, parse_options=parse, convert_options=convert)

    runs = paired(ours, baseline, pairs=3)
    return rate_row(
        f"prepare criteo tsv, {usable_cores()} threads",
        runs,
        count=TEXT_ROWS,
        unit="rows/s",
        baseline_name="pyarrow read_csv",
        correct=prepared_is(folder / "prepared", made[-1], source),
    )


def write_text(path: Path) -> pa.Table:
    rng = np.random.default_rng(2)
    columns = {"label": pa.array(rng.integers(0, 2, TEXT_ROWS)), "I1": pa.array(np.arange(TEXT_ROWS))}  # I1: which row
    for k in range(1, 13):
        columns[f"I{k + 1}"] = pa.array(rng.zipf(1.5, TEXT_ROWS) % 100_000, mask=rng.random(TEXT_ROWS) < 0.2)
    for c, cardinality in enumerate(CARDINALITIES):
        names = np.array([f"{(7919 * i) % 2**32:08x}" for i in range(min(cardinality, TEXT_ROWS))])
        ids = rng.zipf(1.2, TEXT_ROWS) % len(names)
        columns[f"C{c + 1}"] = pa.array(names[ids], mask=rng.random(TEXT_ROWS) < 0.05)
    table = pa.table(columns)
    layout = pa.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    pa.csv.write_csv(table, path, layout)
    return table


def prepared_is(folder: Path, dataset: Dataset, source: pa.Table) -> bool:
    """Whether the splits together are the source's rows: the labels, and one id for each value of a column.

    Missing values, and those that the train split lacks, must have id 0 and nothing else may.
    """
    splits = {name: [pq.read_table(folder / f.path) for f in split.files] for name, split in dataset.splits.items()}
    table = pa.concat_tables(part for parts in splits.values() for part in parts)
    train = np.arange(len(table)) < sum(len(part) for part in splits["train"])
    if len(table) != len(source):
        return False
    order = np.argsort(table["I1"].to_numpy(), kind="stable")  # prepare keeps the order of numbers
    train = train[order]
    if not np.array_equal(table["label"].to_numpy()[order], source["label"].to_numpy().astype(np.float32)):
        return False
    for name in FEATURES.categorical:
        ids = table[name].to_numpy()[order]
        value = source[name].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
        known = (value >= 0) & np.isin(value, value[train])
        pairs = np.unique(np.stack([value[known], ids[known]]), axis=1)
        one_to_one = all(len(np.unique(side)) == len(side) for side in pairs)
        if not one_to_one or not np.array_equal(ids == 0, ~known):
            return False
    return True
