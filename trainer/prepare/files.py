"""Preparing files: up to three passes over the source, then the dataset.

    times     where the split is by quantiles of the time
    counting  where something is fitted on the train split: vocabularies, means, quantiles, the largest id
    writing

Every pass reads and parses in `threads` threads and takes the blocks in order.  Memory: 2 * threads blocks (8 MiB of
text, or 65,536 rows of Parquet, each about five times that while it is worked on), one row group of each split, 40
bytes a distinct value of every vocabulary, 32 bytes a distinct id of every other feature but buckets, and 16 MiB for
each set of quantiles.  It does not grow with the number of rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from kernels.errors import UserError
from trainer.data.dataset import SPLITS, Categorical, Dataset, Dense, Split, Stats, row_group_rows
from trainer.prepare import encode, encoding
from trainer.prepare.blocks import REJECTED, File, Reject, Rows, check, find_files, no_label
from trainer.prepare.encode import Fitted
from trainer.prepare.encoding import Encoding
from trainer.prepare.ids import Counter, Sample, Vocabulary
from trainer.prepare.source import Reader, open_source
from trainer.prepare.spec import FileOptions, Role, Spec, choose_split
from trainer.prepare.split import TRAIN, Splitter, given_cut, quantile_cuts, row_keys
from trainer.prepare.stats import make_stats
from trainer.prepare.work import ordered_map
from trainer.prepare.write import Folder, SplitWriter, fingerprint, id_type, make_schema

Report = Callable[[int, int, str], None]
_EARLY_ROWS = 100_000  # from here on too large a share of malformed lines stops a pass before its end


def gather(source: str, spec: Spec, options: FileOptions) -> list[File]:
    """All files, those of the source first, then those given for valid and test."""
    split = choose_split(spec.split, options)
    whole = "test" if split.test == () else None  # the split that the source is, if it is one
    files = find_files(source, split=whole, format=spec.source.format)
    for name in SPLITS[1:]:
        given = getattr(split, name)
        if given and isinstance(given, tuple):
            found = find_files(",".join(given), split=name, first=len(files), format=spec.source.format)
            twice = {f.path.resolve() for f in found} & {f.path.resolve() for f in files}
            if twice:
                raise UserError(
                    f"{sorted(twice)[0]}: is given for {name} and elsewhere too; a row goes to one split only"
                )
            files += found
    return files


def prepare(
    source: str,
    dest: str | Path,
    spec: Spec,
    options: FileOptions,
    *,
    like: tuple[Encoding, Fitted] | None,
    inputs: str,
    report: Report,
) -> Dataset:
    """Prepare files into `dest`; arguments as validated by trainer.prepare.prepare, like: from `encoding.load`."""
    files = gather(source, spec, options)
    reader = open_source(files, spec, block_bytes=options.block_bytes, to_predict=like is not None)
    if like is not None:
        encoding.check_source(like[0], reader)
    with Folder(dest, replace=options.existing == "replace") as folder:
        work = _Work(reader, spec, options, folder.path, report, like)
        try:
            work.split_by_time()
            work.fit()
            splits, schema = work.write()
        except _TooManyRejected as stop:
            kept = Path(f"{Path(dest).absolute()}{REJECTED}")
            work.rejected.close()
            work.rejected.path.replace(kept)
            raise UserError(f"{stop}\nAll {work.rejected.lines} found so far are in {kept}") from None
        work.rejected.close()
        known = like[0] if like else encoding.store(folder.path, reader, spec, work.fitted)
        dataset = Dataset(
            name=options.name or spec.name or Path(dest).absolute().name,
            source=", ".join(f.path.name for f in reader.files[:3]) + (" ..." if len(reader.files) > 3 else ""),
            labels=tuple(label.name or label.column for label in spec.label),
            labelled=bool(reader.roles.labels),
            dense=work.dense(),
            categorical=work.categorical(),
            weight=reader.roles.weight.name if reader.roles.weight else None,
            timestamp=reader.roles.timestamp.name if reader.roles.timestamp else None,
            splits=splits,
            fingerprint=fingerprint(folder.path, splits, schema),
            positive_rate=work.positive_rate(),
            rejected=work.rejected.lines,
            encoding=known.fingerprint,
            like=str(options.like.absolute()) if options.like else None,
            inputs=inputs,
        )
        report(work.total_bytes, work.total_bytes, "done")
        folder.finish(dataset)
    return dataset


class _TooManyRejected(UserError):
    pass


class _Rejected:
    """rejected.tsv: file, line (or row of a Parquet file), reason, text.  Made when the first line is rejected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self.first: list[Reject] = []
        self._stream = None

    def add(self, rejects: list[Reject]) -> None:
        if not rejects:
            return
        if self._stream is None:
            self._stream = self.path.open("w", encoding="utf-8", newline="\n")
            self._stream.write("file\tline\treason\ttext\n")
        for reject in rejects:
            text = reject.text.replace("\t", "\\t")
            self._stream.write(f"{reject.file}\t{reject.row}\t{reject.reason}\t{text}\n")
        self.lines += len(rejects)
        self.first += rejects[: 3 - len(self.first)] if len(self.first) < 3 else []

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


@dataclass
class _Encoded:
    """A block ready to be written."""

    rows: Rows
    tables: dict[str, pa.Table]
    counted: int  # rows that the figures are about: of the train split, or all where the encoding was known before
    missing: dict[str, int]  # of these rows, by column
    beyond: dict[str, int]  # as_is ids that the known encoding has no room for
    longest: dict[str, int]
    dense_sums: dict[str, tuple[float, float]]
    label_sums: np.ndarray


@dataclass
class _Moments:
    """Mean and squared deviations of a column, merged block by block (Chan et al.), in order, so always alike."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, x_N: np.ndarray) -> None:
        if not len(x_N):
            return
        count, mean = len(x_N), float(x_N.mean())
        squares = float(((x_N - mean) ** 2).sum())
        total, delta = self.count + count, mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


@dataclass
class _Seen:
    """Sums over the rows that figures are about, while they are written."""

    missing: dict[str, int] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)
    dense: dict[str, list[float]] = field(default_factory=dict)
    labels: np.ndarray | None = None
    rows: int = 0


class _Work:
    def __init__(
        self,
        reader: Reader,
        spec: Spec,
        options: FileOptions,
        folder: Path,
        report: Report,
        like: tuple[Encoding, Fitted] | None,
    ) -> None:
        self.reader, self.roles, self.lists = reader, reader.roles, reader.lists
        self.options, self.folder, self._report = options, folder, report
        self.rejected = _Rejected(folder / "rejected.tsv")
        self._first_pass = True
        self.total_bytes = sum(f.bytes for f in reader.files)
        self._known = like[0] if like else None
        self.fitted = like[1] if like else Fitted()
        self._keys = {f.name: f.keys for f in self._known.features if f.keys} if self._known else {}
        self.split = choose_split(spec.split, options)
        self._splitter = Splitter(self.split, options.seed)
        self._split_rows: dict[str, int] | None = None
        self._ids = {r.name: Counter() for r in self.roles.categorical if not self._counted_before(r)}
        self._seen = _Seen()
        self._iso = spec.timestamp is not None and spec.timestamp.parse == "iso8601"

    def _counted_before(self, role: Role) -> bool:
        """Whether how often its ids occur is known when writing begins."""
        return role.how.ids == "vocab" and not encode.is_bucketised(role.how) and self._known is None

    def _pass(self, work: Callable[[Rows], object], text: str) -> Iterator[tuple[Rows, object]]:
        """(good rows, work(good rows)) of every block; rejects are kept in the first pass and checked in each."""

        def one(block):
            rows, bags = encode.to_bags(check(self.reader.parse(block), self.roles), self.roles, self.lists, self._keys)
            return rows, work(rows, bags)

        rows_seen = rejected = 0
        total = self.total_bytes
        for rows, result in ordered_map(one, self.reader.blocks(), threads=self.options.threads):
            if self._first_pass:
                self.rejected.add(rows.rejects)
            rejected += len(rows.rejects)
            rows_seen += len(rows) + len(rows.rejects)
            if rows_seen >= _EARLY_ROWS:
                self._check_rejected(rejected, rows_seen)
            yield rows, result
            self._report(min(rows.block.done, total), total, text)
        self._check_rejected(rejected, rows_seen)
        self._first_pass = False

    def _check_rejected(self, rejected: int, rows: int) -> None:
        if rejected <= self.options.max_rejected * rows:
            return
        word = "line" if self.reader.files[0].format == "csv" else "row"
        shown = "".join(
            f"\n  {r.file}, {word} {r.row}: {r.reason}" + (f": {r.text[:60]!r}" if r.text else "")
            for r in self.rejected.first
        )
        raise _TooManyRejected(
            f"{rejected} of {rows} {word}s are malformed, {rejected / rows:.2%}, and max_rejected allows "
            f"{self.options.max_rejected:.2%}; mend the source, or raise max_rejected (--bad-rows) to leave them out. "
            f"The first:{shown}{self._label_ways()}"
        )

    def _label_ways(self) -> str:
        """How the spec makes 0 and 1 of a label that is something else, where that is what is wrong."""
        for role in self.roles.labels:
            if any(reject.reason == no_label(role.column) for reject in self.rejected.first):
                return (
                    f"\nlabel {role.column!r} has to hold 0 and 1; of other numbers at_least = N or above = N in the "
                    "spec's [[label]] makes them, number = true takes them as they are; text has to be made numbers"
                )
        return ""

    def _times(self, rows: Rows) -> np.ndarray | None:
        role = self.roles.timestamp
        return None if role is None else np.asarray(rows.columns[role.column, role.kind])

    def split_by_time(self) -> None:
        if self.split.by != "time":
            return
        if self.roles.timestamp is None:
            raise UserError("split = 'time' needs a timestamp column; name it in the spec: timestamp = \"column\"")
        cuts = [given_cut(getattr(self.split, f"{p}_from"), iso=self._iso, key=f"{p}_from") for p in SPLITS[1:]]
        if isinstance(self.split.valid, float) or isinstance(self.split.test, float):
            sample = Sample()
            for rows, _ in self._pass(lambda rows, bags: None, "reading times"):
                if rows.block.file.split is None:
                    sample.add(row_keys(rows, self.options.seed), self._times(rows))
            if not sample.size:
                raise UserError(f"{self.reader.files[0].path}: no good row to take times from")
            cuts = [q if c is None else c for c, q in zip(cuts, quantile_cuts(self.split, sample), strict=True)]
        if cuts[0] is not None and cuts[1] is not None and cuts[0] > cuts[1]:
            raise UserError(
                f"split: valid begins at {cuts[0]}, after test at {cuts[1]}; valid lies between train and test"
            )
        self._splitter = Splitter(self.split, self.options.seed, (cuts[0], cuts[1]))

    def fit(self) -> None:
        """The counting pass, where anything asks for one and the encoding is not known."""
        if self._known:
            return
        vocabularies = [r for r in self.roles.categorical if self._counted_before(r)]
        bucketised = [r for r in self.roles.categorical if encode.is_bucketised(r.how)]
        as_is = [r for r in self.roles.categorical if r.how.ids == "as_is" and r not in bucketised]
        open_ended = [r for r in as_is if r.how.rows is None]
        standardised = [r for r in self.roles.dense if r.how.standardise]
        quantiles = [r for r in bucketised if r.how.quantiles is not None]
        for role in bucketised:
            self.fitted.bounds[role.name] = np.asarray(role.how.buckets or (), np.float64)
        if not (vocabularies or open_ended or standardised or quantiles):
            return
        counters = {r.name: Counter() for r in vocabularies}
        samples = {r.name: Sample() for r in quantiles}
        moments = {r.name: _Moments() for r in standardised}
        largest = {r.name: -1 for r in open_ended}
        split_rows = np.zeros(3, np.int64)

        def work(rows: Rows, bags: dict[str, encode.Bags]):
            to_N = self._splitter.assign(rows, self._times(rows))
            train_N = to_N == TRAIN
            for role in vocabularies:
                counters[role.name].add(_present_keys(bags[role.name], train_N))
            top = {}
            for role in open_ended:
                encode.check_range(bags[role.name], role, rows)
                keys_L = _present_keys(bags[role.name], np.ones(len(rows), bool))
                top[role.name] = int(keys_L.view(np.int64).max(initial=-1))
            numbers = {}
            for role in standardised:
                x_N, missing_N = encode.transform_dense(rows.columns[role.column, role.kind], role.how)
                numbers[role.name] = x_N[train_N & ~missing_N]
            for role in quantiles:
                x_N = np.asarray(rows.columns[role.column, role.kind].fill_null(float("nan")))
                here_N = train_N & ~np.isnan(x_N)
                numbers[role.name] = (row_keys(rows, self.options.seed)[here_N], x_N[here_N])
            return np.bincount(to_N, minlength=3), top, numbers

        for _, (rows_here, top, numbers) in self._pass(work, "counting"):
            split_rows += rows_here
            for name, value in top.items():
                largest[name] = max(largest[name], value)
            for role in standardised:
                moments[role.name].add(numbers[role.name])
            for role in quantiles:
                samples[role.name].add(*numbers[role.name])
        self._split_rows = dict(zip(SPLITS, split_rows.tolist(), strict=True))
        self._check_splits(self._split_rows)
        for role in vocabularies:
            keys, counts = counters.pop(role.name).result()
            how = role.how
            self.fitted.vocabulary[role.name] = Vocabulary(keys, counts, min_count=how.min_count, limit=how.rows)
        for role in quantiles:
            shares = [k / role.how.quantiles for k in range(1, role.how.quantiles)]
            self.fitted.bounds[role.name] = np.unique(samples[role.name].quantiles(shares))
        for role in standardised:
            self.fitted.mean[role.name] = moments[role.name].mean
            self.fitted.std[role.name] = moments[role.name].std
        self.fitted.largest = {name: max(value, 0) for name, value in largest.items()}

    def _check_splits(self, rows: dict[str, int]) -> None:
        for name in self._expected():
            if not rows.get(name):
                raise UserError(
                    f"the split {name!r} got no row out of {sum(rows.values())} good ones; "
                    "give it a larger share, another cut or other files"
                )

    def _expected(self) -> list[str]:
        """The splits that there will be: those that rows are drawn for, and those that files are given for."""
        found = {f.split for f in self.reader.files}
        drawn = self._splitter.expected() if None in found else []
        return [name for name in SPLITS if name in found or name in drawn]

    def write(self) -> tuple[dict[str, Split], pa.Schema]:
        empty = {r.name: encode.is_empty_when_missing(r, self.lists) for r in self.roles.categorical}
        sizes = {r.name: encode.ids_below(r, self.fitted) for r in self.roles.categorical}
        weight, timestamp = self.roles.weight, self.roles.timestamp
        schema = make_schema(
            labels=tuple(r.name for r in self.roles.labels),
            dense=tuple(r.name for r in self.roles.dense),
            categorical={
                r.name: id_type(sizes[r.name], multi_hot=encode.is_multi_hot(r, self.lists))
                for r in self.roles.categorical
            },
            nullable={name for name, is_empty in empty.items() if is_empty},
            weight=weight.name if weight else None,
            timestamp=timestamp.name if timestamp else None,
        )

        def work(rows: Rows, bags: dict[str, encode.Bags]) -> _Encoded:
            return self._encode(rows, bags, schema, sizes, empty)

        writers: dict[str, SplitWriter] = {}
        try:
            for rows, block in self._pass(work, "writing"):
                if not writers:
                    for name in self._expected():
                        writers[name] = SplitWriter(self.folder, name, schema, group_rows=self._group_rows(name, rows))
                for name, table in block.tables.items():
                    writers[name].add(table)
                self._see(block)
            self._check_splits({name: writer.rows for name, writer in writers.items()})
            for role in self.roles.categorical:
                if role.how.ids == "hash64" and self._known is None:
                    self.fitted.distinct[role.name] = len(self._ids[role.name].result()[0])
            return {name: writer.finish() for name, writer in writers.items()}, schema
        finally:
            for writer in writers.values():
                writer.close()

    def _group_rows(self, name: str, first: Rows) -> int:
        """Rows per row group: from the counted rows, or from an estimate by the first block's bytes."""
        if self.options.row_group_rows:
            return self.options.row_group_rows
        if self._split_rows is not None:
            return row_group_rows(self._split_rows[name])
        rows_per_byte = max(len(first), 1) / max(first.block.done, 1)
        drawn = sum(f.bytes for f in self.reader.files if f.split is None) * rows_per_byte
        given = sum(f.bytes for f in self.reader.files if f.split == name) * rows_per_byte
        share = getattr(self.split, name, None)
        if name == "train":
            others = (getattr(self.split, other) for other in SPLITS[1:])
            share = 1.0 - sum(s for s in others if isinstance(s, float))
        return row_group_rows(int(given + drawn * (share if isinstance(share, float) else 0.1 if not given else 0.0)))

    def _encode(self, rows, bags, schema: pa.Schema, sizes: dict[str, int], empty: dict[str, bool]) -> _Encoded:
        to_N = self._splitter.assign(rows, self._times(rows))
        counted_N = to_N == TRAIN if self._known is None else np.ones(len(rows), bool)
        columns: list[pa.Array] = []
        missing: dict[str, int] = {}
        longest: dict[str, int] = {}
        beyond: dict[str, int] = {}
        dense_sums: dict[str, tuple[float, float]] = {}
        labels = [encode.encode_label(rows.columns[r.column, r.kind], r.how) for r in self.roles.labels]
        columns += [pa.array(y_N) for y_N in labels]
        for role in self.roles.dense:
            x_N, missing_N = encode.encode_dense(rows.columns[role.column, role.kind], role, self.fitted)
            columns.append(pa.array(x_N))
            counted = x_N[counted_N].astype(np.float64)
            dense_sums[role.name] = (float(counted.sum()), float((counted**2).sum()))
            missing[role.name] = int(np.count_nonzero(missing_N & counted_N))
        for role in self.roles.categorical:
            if encode.is_bucketised(role.how):
                ids_N, present_N = encode.bucketise(rows.columns[role.column, role.kind], role, self.fitted)
                ids = encode.Ids(ids_N, present_N, None)
            else:
                found = bags[role.name]
                if self._known and role.name in self.fitted.largest and role.how.rows is None:
                    found, beyond_L = encode.leave_out_beyond(found, self.fitted.largest[role.name])
                    beyond[role.name] = int(beyond_L.sum())
                ids = encode.encode_ids(found, role, self.fitted, rows, empty=empty[role.name])
            ids_L, missing[role.name], longest[role.name] = ids.of_rows(counted_N, empty=empty[role.name])
            if role.name in self._ids:
                self._ids[role.name].add(ids_L.view(np.uint64))
            columns.append(ids.column(sizes[role.name], empty=empty[role.name]))
        if self.roles.weight:
            role = self.roles.weight
            columns.append(pa.array(np.asarray(rows.columns[role.column, role.kind]).astype(np.float32)))
        if self.roles.timestamp:
            columns.append(pa.array(self._times(rows)))
        table = pa.Table.from_arrays(columns, schema=schema)
        tables = {}
        for number, name in enumerate(SPLITS):
            here_N = to_N == number
            if here_N.all():
                tables[name] = table
            elif here_N.any():
                tables[name] = table.filter(pa.array(here_N))
        label_sums = np.asarray([y_N[counted_N].sum(dtype=np.float64) for y_N in labels])
        tables = {name: table for name, table in tables.items() if len(table)}
        return _Encoded(rows, tables, int(counted_N.sum()), missing, beyond, longest, dense_sums, label_sums)

    def _see(self, block: _Encoded) -> None:
        seen = self._seen
        seen.rows += block.counted
        seen.labels = block.label_sums if seen.labels is None else seen.labels + block.label_sums
        for name, count in block.missing.items():
            seen.missing[name] = seen.missing.get(name, 0) + count
        for name, count in block.beyond.items():
            seen.beyond[name] = seen.beyond.get(name, 0) + count
        for name, ids in block.longest.items():
            seen.longest[name] = max(seen.longest.get(name, 0), ids)
        for name, sums in block.dense_sums.items():
            before = seen.dense.setdefault(name, [0.0, 0.0])
            before[0] += sums[0]
            before[1] += sums[1]

    def positive_rate(self) -> dict[str, float]:
        rates = self._seen.labels / max(self._seen.rows, 1)
        return {role.name: float(rate) for role, rate in zip(self.roles.labels, rates, strict=True)}

    def dense(self) -> tuple[Dense, ...]:
        found = []
        for role in self.roles.dense:
            transform: dict[str, object] = {"log1p": True} if role.how.log1p else {}
            if role.how.standardise:
                transform |= {
                    "standardise": True,
                    "mean": self.fitted.mean[role.name],
                    "std": self.fitted.std[role.name],
                }
            total, squares = self._seen.dense[role.name]
            mean = total / max(self._seen.rows, 1)
            std = max(0.0, squares / max(self._seen.rows, 1) - mean**2) ** 0.5
            found.append(
                Dense(name=role.name, transform=transform, missing=self._seen.missing[role.name], mean=mean, std=std)
            )
        return tuple(found)

    def categorical(self) -> tuple[Categorical, ...]:
        return tuple(
            Categorical(
                name=role.name,
                cardinality=encode.cardinality(role, self.fitted),
                multi_hot=encode.is_multi_hot(role, self.lists),
                ids="as_is" if encode.is_bucketised(role.how) else role.how.ids,
                stats=self._stats(role),
            )
            for role in self.roles.categorical
        )

    def _stats(self, role: Role) -> Stats:
        missing = self._seen.missing[role.name]
        unseen = 0
        if self._counted_before(role):
            vocabulary = self.fitted.vocabulary[role.name]
            unseen = vocabulary.unseen
            reserved = unseen + (0 if encode.is_empty_when_missing(role, self.lists) else missing)
            counts = np.append(vocabulary.counts, reserved)
        else:
            ids, counts = self._ids[role.name].result()
            if role.how.ids == "vocab" and not encode.is_bucketised(role.how):
                reserved = int(counts[ids == 0].sum())
                unseen = reserved - (0 if encode.is_empty_when_missing(role, self.lists) else missing)
            elif role.name in self._seen.beyond:
                unseen = self._seen.beyond[role.name]
                missing -= 0 if encode.is_multi_hot(role, self.lists) else unseen
        return make_stats(
            counts, rows=self._seen.rows, missing=missing, max_per_bag=self._seen.longest[role.name], unseen=unseen
        )


def _present_keys(bags: encode.Bags, keep_N: np.ndarray) -> np.ndarray:
    """The keys of these rows, without those of missing values."""
    if bags.offsets is None:
        return bags.keys_L[keep_N if bags.present_N is None else keep_N & bags.present_N]
    return bags.keys_L[np.repeat(keep_N, np.diff(bags.offsets))]
