"""Parquet: opening a dataset, and reading a split of it in its arithmetic order.

open_dataset(path, features)   the Dataset of a prepared folder, or of one that nobody prepared
Reader(folder, dataset, split, ...).batches(epoch, start_step)
"""

import os
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kernels.errors import UserError
from kernels.registry import nearest
from trainer.config import Features
from trainer.data import compiled
from trainer.data import dataset as dataset_json
from trainer.data.base import Columns, Shape
from trainer.data.dataset import SPLITS, Categorical, Dataset, Dense, File, Split
from trainer.data.decode import ID_POLICIES, Feature, IdPolicy, Spec, check_schema, decode, is_list
from trainer.data.loader import Assembler, Batches
from trainer.data.memory import Pool
from trainer.data.order import Order

SUFFIXES = (".parquet", ".pq", ".parq")


def open_dataset(path: str | Path, features: Features | None = None) -> Dataset:
    """The dataset in a folder: by `features` where they are given, else by the dataset.json that prepare wrote."""
    path = Path(path)
    if features is not None:
        return dataset_from_folder(path, features)
    if path.is_dir() and not (path / "dataset.json").exists() and _parquet_files(path):
        raise UserError(
            f"{path}: Parquet files without a dataset.json; name their columns in the config's [data.features] "
            f"(labels, dense, categorical), or run `tablemesh prepare {path} DEST`"
        )
    return dataset_json.load(path)


def dataset_from_folder(path: str | Path, features: Features, splits: tuple[str, ...] | None = None) -> Dataset:
    """The dataset of Parquet files that nobody prepared, made from their footers alone.

    path: with subfolders train, valid or test, each is that split; otherwise all files are the train split.  Files are
        taken in the order of their paths, nested ones too; names beginning with "." or "_" are left out.
    features: which columns are what, and the cardinalities; a list column is multi-hot.
    splits: the ones to look for; default all three.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; data.path is a folder of Parquet files")
    folders = {name: path / name for name in splits or SPLITS if (path / name).is_dir()}
    files = {name: _parquet_files(folder) for name, folder in (folders or {"train": path}).items()}
    files = {name: found for name, found in files.items() if found}
    if not files:
        looked = ", ".join(f"{name}/" for name in folders) or "it"
        raise UserError(f"{path}: no Parquet files in {looked} ({', '.join(SUFFIXES)})")
    digest = blake2b(digest_size=16)
    found_splits = {}
    first: Footer | None = None
    for name, paths in files.items():
        listed = []
        for file in paths:
            footer = Footer.read(file)
            first = first or footer
            relative = file.relative_to(path).as_posix()
            digest.update(f"{relative}\0{footer.size}\0".encode() + footer.raw)
            listed.append(File(path=relative, row_groups=footer.row_groups))
        found_splits[name] = Split(files=tuple(listed))
    kinds = {field.name: field.type for field in first.schema}
    spec = Spec(
        labels=features.labels,
        dense=features.dense,
        features=tuple(Feature(name=name, rows=rows, table=name) for name, rows in features.categorical.items()),
        weight=features.weight,
    )
    check_schema(first.schema, spec, str(first.path))
    return Dataset(
        name=path.resolve().name,
        source=f"Parquet files in {path}, read as they are",
        labels=features.labels,
        dense=tuple(Dense(name=name) for name in features.dense),
        categorical=tuple(
            Categorical(name=name, cardinality=rows, multi_hot=is_list(kinds[name]))
            for name, rows in features.categorical.items()
        ),
        weight=features.weight,
        splits=found_splits,
        fingerprint=digest.hexdigest(),
    )


def _parquet_files(folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        if path.suffix in SUFFIXES and not hidden and path.is_file():
            found.append(path)
    return sorted(found)


class Footer:
    """What the end of a Parquet file says, and what the file was like when it was read."""

    def __init__(self, path: Path, metadata: pq.FileMetaData, stat: os.stat_result):
        self.path = path
        self.metadata = metadata
        self.schema: pa.Schema = metadata.schema.to_arrow_schema()
        self.row_groups = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        self.size = stat.st_size
        self._changed_ns = stat.st_mtime_ns

    @staticmethod
    def read(path: Path) -> "Footer":
        """UserError naming the file when it is missing, cut short or not Parquet."""
        try:
            stat = path.stat()
            return Footer(path, pq.read_metadata(path), stat)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; put it back, or prepare the data again") from error
        except pa.ArrowException as error:
            raise UserError(
                f"{path}: not a whole Parquet file ({error}); it was cut short or damaged: write it again"
            ) from error

    @property
    def raw(self) -> bytes:
        """The bytes of the footer, which hold the schema, the places of all column chunks and their statistics."""
        with open(self.path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            return file.read(length)

    def decode(self, row_group: int, columns: list[str]) -> pa.Table:
        """UserError naming the file when it is no longer the one whose footer this is."""
        where = f"{self.path}, row group {row_group}"
        try:
            stat = self.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self._changed_ns):
                raise UserError(
                    f"{where}: the file changed after the run began ({self.size} bytes then, {stat.st_size} now); "
                    "leave the data alone while a run reads it"
                )
            # No memory map: a file cut short under one kills the process instead of raising.
            with pq.ParquetFile(self.path, metadata=self.metadata) as file:
                return file.read_row_group(row_group, columns=columns, use_threads=False)
        except OSError as error:
            # pyarrow reports damage inside a file as OSError too.
            raise UserError(
                f"{where}: cannot be read: {error.strerror or error}; was it deleted or damaged?"
            ) from error
        except pa.ArrowException as error:
            raise UserError(f"{where}: cannot be decoded: {error}; the file is damaged: write it again") from error


class ParquetSource:
    """One split of a dataset of Parquet files; implements `trainer.data.base.Source`."""

    def __init__(self, folder: Path, dataset: Dataset, split: str, spec: Spec):
        self._spec = spec
        self._name = f"{dataset.name!r}, split {split!r}"
        self._folder = folder
        self._files = dataset.split(split).files
        self._footers: list[Footer] | None = None
        self._shape = Shape(
            features=tuple(f.name for f in spec.features),
            multi_hot=tuple(bool(f.multi_hot) for f in spec.features),
            dense=len(spec.dense),
            labels=len(spec.labels),
            weighted=spec.weight is not None,
            wide=spec.wide,
            small=tuple(f.rows <= 1 << 15 for f in spec.features),
            any_id=tuple(f.any_id for f in spec.features),
        )
        # (file, row group in it) of every row group of the split
        self._places = [(f, g) for f, file in enumerate(self._files) for g in range(len(file.row_groups))]

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def row_groups(self) -> tuple[int, ...]:
        return tuple(rows for file in self._files for rows in file.row_groups)

    def check(self) -> None:
        footers = []
        for file in self._files:
            footer = Footer.read(self._folder / file.path)
            if footer.row_groups != file.row_groups:
                raise UserError(
                    f"{footer.path}: {sum(footer.row_groups)} rows in {len(footer.row_groups)} row groups, but the "
                    f"dataset {self._name} lists {file.rows} in {len(file.row_groups)}; it was written again since: "
                    "run `tablemesh prepare` again"
                )
            check_schema(footer.schema, self._spec, str(footer.path))
            footers.append(footer)
        self._footers = footers

    def read(self, row_group: int) -> Columns:
        if self._footers is None:
            self.check()
        f, g = self._places[row_group]
        footer = self._footers[f]
        table = footer.decode(g, self._spec.columns)
        return decode(table, self._spec, f"{footer.path}, row group {g}")


class Reader:
    """The batches of one rank over one split, in the order that `trainer.data.order` defines.

    dataset_folder: what the paths in `dataset` are relative to.
    batch_size: B of the global batch; this rank's batches have B / world_size rows.
    streams: S; world_size and B must fit it as `Order` says.
    seed, shuffle_window, shuffle: as in `Order`; shuffle = False for evaluation.
    rows_by_feature: rows of the table each feature looks up in; default its cardinality.
    id_policy: by feature, "error" (default), "clip" or "hash": what becomes of ids outside the table.
    any_label: let labels outside [0, 1] through, which neither the loss nor the metrics can use; for predictions.
    table_by_feature: the tables' names, for errors; default the feature's.
    threads, prefetch: decoding threads and batches made ahead.
    pin_memory: batches in page-locked memory, for copies to a GPU that overlap.

    Raises UserError on wrong arguments, an empty split, and whatever `check` finds.
    """

    def __init__(
        self,
        dataset_folder: str | Path,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        streams: int,
        seed: int = 0,
        shuffle_window: int = 32768,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        rows_by_feature: dict[str, int] | None = None,
        id_policy: dict[str, IdPolicy] | None = None,
        table_by_feature: dict[str, str] | None = None,
        any_label: bool = False,
        threads: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ):
        names = dataset.feature_names
        for given in (rows_by_feature or {}, id_policy or {}, table_by_feature or {}):
            for name in given:
                if name not in names:
                    raise UserError(
                        f"feature {name!r} is not in the dataset {dataset.name!r}; {nearest(name, list(names))}"
                    )
        for name, policy in (id_policy or {}).items():
            if policy not in ID_POLICIES:
                raise UserError(f"id_policy of feature {name!r} is {policy!r}; it can be {', '.join(ID_POLICIES)}")
        spec = Spec(
            labels=dataset.labels,
            dense=tuple(d.name for d in dataset.dense),
            features=tuple(
                Feature(
                    name=c.name,
                    rows=(rows_by_feature or {}).get(c.name, c.cardinality),
                    table=(table_by_feature or {}).get(c.name, c.name),
                    policy=(id_policy or {}).get(c.name, "error"),
                    multi_hot=c.multi_hot,
                )
                for c in dataset.categorical
            ),
            weight=dataset.weight,
            labelled=dataset.labelled,
            any_label=any_label,
        )
        self._source = ParquetSource(Path(dataset_folder), dataset, split, spec)
        self.order = Order(
            row_groups=self._source.row_groups,
            streams=streams,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            window=shuffle_window,
        )
        self._streams = self.order.streams_of(rank, world_size)
        self._pool = Pool()
        self._threads, self._prefetch, self._pin_memory = max(1, threads), max(1, prefetch), pin_memory
        if self.order.rows == 0:
            raise UserError(
                f"split {split!r} of the dataset {dataset.name!r} in {dataset_folder} is empty; "
                "prepare it with a larger share of the rows, or choose another split"
            )
        self.check()
        compiled.ready()

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def rows(self) -> int:
        """Rows of the split, on all ranks."""
        return self.order.rows

    def check(self) -> None:
        """Look at the footer of every file: all there, whole, every column with a usable type; else UserError."""
        self._source.check()

    def batches(self, epoch: int, start_step: int = 0) -> Batches:
        """The batches start_step .. steps_per_epoch-1 of this rank: an iterator to be closed (or used as `with`).

        Starting at a step costs the decoding of the blocks it lies in, however far into the epoch it is.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step {start_step}: an epoch has the steps 0 .. {self.steps_per_epoch - 1}")
        assembler = Assembler(self._source, self.order.epoch(epoch), self._streams, start_step, self._pool)
        return Batches(
            assembler,
            range(start_step, self.steps_per_epoch),
            threads=self._threads,
            prefetch=self._prefetch,
            pin_memory=self._pin_memory,
        )
