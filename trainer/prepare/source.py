"""Reading a source: files -> blocks -> typed columns, with malformed lines set aside.

A text file is cut into blocks of about `block_bytes` at line ends, so that blocks are parsed by several threads while
every line keeps its number.  A block is parsed with the column types wanted; only where that fails it is parsed again
as text to find the lines at fault.  A Parquet file comes in batches of 65,536 rows.
"""

import bz2
import csv
import glob
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from kernels.errors import UserError
from trainer.prepare.spec import Role, Roles, Source, Spec

TEXT = (".csv", ".tsv", ".txt", ".tab", ".dat")
PACKED = (".gz", ".bz2")
LONGEST_RECORD = 64 << 20  # bytes; a quoted field that runs on for longer was never closed
FLOAT32_MAX = float(np.finfo(np.float32).max)
_READ_AS = {"number": pa.float64(), "integer": pa.int64(), "value": pa.binary()}


@dataclass(frozen=True)
class File:
    path: Path
    number: int  # its place among all files, which the random split hashes
    split: str | None  # the split it was given for; None: drawn for every row
    format: str  # "csv" | "parquet"

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Block:
    """A piece of a file as it was read: text from a line start to a line end, or a Parquet batch."""

    file: File
    first_row: int  # text: number of its first line, from 1; Parquet: of its first row, from 0
    text: bytes | None
    table: pa.Table | None
    done: int  # bytes of all files read so far, for progress

    def place(self, row: int) -> str:
        return f"{self.file.path}, {'line' if self.text is not None else 'row'} {row}"


@dataclass(frozen=True)
class Reject:
    file: Path
    row: int  # line number from 1; Parquet: row number from 0
    reason: str
    text: str


@dataclass(frozen=True)
class Rows:
    """The good rows of a block.

    columns: by (column, kind of `Role`); float64, int64 or what ids are made of, missing values null.
    row: int64, of each row: line number from 1 (text) or row number from 0 (Parquet).
    """

    block: Block
    columns: dict[tuple[str, str], pa.Array]
    row: np.ndarray
    rejects: list[Reject]

    def __len__(self) -> int:
        return len(self.row)

    def where(self, keep: np.ndarray, rejects: list[Reject]) -> "Rows":
        mask = pa.array(keep)
        columns = {k: v.filter(mask) for k, v in self.columns.items()}
        return Rows(self.block, columns, self.row[keep], self.rejects + rejects)


def find_files(source: str, *, split: str | None = None, first: int = 0, format: str | None = None) -> list[File]:
    """The files that a path, glob, folder, or several of these separated by commas, name; each in sorted order."""
    found: list[Path] = []
    for part in filter(None, (p.strip() for p in source.split(","))):
        path = Path(part)
        if path.is_dir():
            wanted = (".parquet", *TEXT, *(t + p for t in TEXT for p in PACKED))
            inside = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(wanted))
            if not inside:
                raise UserError(
                    f"{path}: no file in this folder ends in {', '.join(('.parquet', *TEXT))} (or these with .gz)"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        elif any(c in part for c in "*?["):
            matched = sorted(p for p in map(Path, glob.glob(part)) if p.is_file())
            if not matched:
                raise UserError(f"{part}: no file matches this pattern")
            found += matched
        else:
            raise UserError(f"{part}: no such file or folder")
    if not found:
        raise UserError(f"{source!r}: names no file; give a path, a folder or a glob")
    for path in found:
        if not path.stat().st_size:
            raise UserError(f"{path}: the file is empty; remove it from the source")
    parquet = {"parquet": True, "csv": False, "tsv": False}.get(format or "")
    kinds = ["parquet" if (p.suffix == ".parquet" if parquet is None else parquet) else "csv" for p in found]
    return [File(p, first + i, split, k) for i, (p, k) in enumerate(zip(found, kinds, strict=True))]


class Reader:
    """Blocks of the files of one source, and their typed columns.  Made once; every pass iterates anew."""

    def __init__(self, files: list[File], spec: Spec, *, block_bytes: int) -> None:
        self.files = files
        self.block_bytes = block_bytes
        self.source = spec.source
        self.delimiter = spec.source.delimiter or ("\t" if _is_tsv(files[0], spec.source) else ",")
        self.columns = self._columns(files[0])
        self.roles = Roles.resolve(spec, self.columns, where=str(files[0].path))
        self.total_bytes = sum(f.bytes for f in files)
        self._iso = spec.timestamp is not None and spec.timestamp.parse == "iso8601"
        self.lists = self._check_files()

    def _columns(self, file: File) -> list[str]:
        if file.format == "parquet":
            return _open_parquet(file).schema_arrow.names
        names = self._header(file) if self.source.columns is None else list(self.source.columns)
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UserError(
                f"{file.path}: columns called {', '.join(map(repr, twice))} occur more than once; rename them"
            )
        return names

    def _header(self, file: File) -> list[str]:
        with _reading(file), file.path.open("rb") as raw, _unpack(raw, file.path) as stream:
            line = stream.readline()
        try:
            text = line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path}, line 1: the header is not UTF-8 text ({error})") from error
        quoting = {"quotechar": self.source.quote} if self.source.quote else {"quoting": csv.QUOTE_NONE}
        return next(csv.reader([text], delimiter=self.delimiter, **quoting), [])

    def _check_files(self) -> set[str]:
        """Every file has the columns with types that fit; returns the Parquet columns that are lists."""
        lists: set[str] = set()
        for i, file in enumerate(self.files):
            if file.format != self.files[0].format:
                raise UserError(f"{file.path}: text and Parquet files ({self.files[0].path}) do not mix in one source")
            if file.format == "csv":
                if i and self.source.columns is None and (here := self._header(file)) != self.columns:
                    other = next((a for a in here if a not in self.columns), here[:1])
                    raise UserError(
                        f"{file.path}: its header differs from that of {self.files[0].path} (at {other!r}); "
                        "files of one source have the same columns in the same order"
                    )
                continue
            schema = _open_parquet(file).schema_arrow
            for role in self.roles.all:
                if role.column not in schema.names:
                    raise UserError(f"{file.path}: no column {role.column!r}, which {self.files[0].path} has")
                kind = schema.field(role.column).type
                listed = _is_list(kind)
                if listed and (role not in self.roles.categorical or role.kind == "number"):
                    raise UserError(
                        f"{file.path}: column {role.column!r} is {kind}, but {role.name!r} needs one value a row"
                    )
                if i and listed != (role.column in lists):
                    raise UserError(
                        f"{file.path}: column {role.column!r} is {kind}; a list in one file must be one in all"
                    )
                if listed:
                    lists.add(role.column)
                _check_type(file, role, kind.value_type if listed else kind)
        return lists

    def blocks(self) -> Iterator[Block]:
        """All blocks of all files, in order."""
        before = 0
        for file in self.files:
            with _reading(file):
                yield from (
                    self._parquet_blocks(file, before) if file.format == "parquet" else self._text_blocks(file, before)
                )
            before += file.bytes

    def _parquet_blocks(self, file: File, before: int) -> Iterator[Block]:
        parquet = _open_parquet(file)
        row, rows = 0, parquet.metadata.num_rows
        if not rows:
            raise UserError(f"{file.path}: the file has no rows; remove it from the source")
        columns = list(dict.fromkeys(role.column for role in self.roles.all))
        for batch in parquet.iter_batches(65536, columns=columns):
            done = before + int(file.bytes * (row + len(batch)) / rows)
            yield Block(file, row, None, pa.Table.from_batches([batch]), done)
            row += len(batch)

    def _text_blocks(self, file: File, before: int) -> Iterator[Block]:
        with file.path.open("rb") as raw, _unpack(raw, file.path) as stream:
            line = 1
            rest = b""
            if self.source.columns is None:
                stream.readline()
                line = 2
            empty = True
            while True:
                piece = stream.read(self.block_bytes)
                text = rest + piece
                if not piece and not text:
                    break
                end = len(text) if not piece else self._last_line_end(text)
                if not end:
                    if len(text) > max(LONGEST_RECORD, 2 * self.block_bytes):
                        raise UserError(
                            f"{file.path}, line {line}: no line end outside quotes in the next {len(text)} bytes; "
                            'where quotes are plain text, set quote = "" under [source] in the spec'
                        )
                    rest = text
                    continue
                block, rest = text[:end], text[end:]
                # Position in the packed file: what progress can be measured by.
                yield Block(file, line, block, None, before + raw.tell())
                empty = empty and block.isspace()
                line += block.count(b"\n")
                if not piece:
                    break
        if empty:
            raise UserError(f"{file.path}: the file has no rows; remove it from the source")

    def _last_line_end(self, text: bytes) -> int:
        """Where the last whole line of a text ends: behind a line feed that an even number of quotes precedes."""
        quote = self.source.quote.encode()
        last = text.rfind(b"\n") + 1
        if not quote or not last or text.count(quote, 0, last) % 2 == 0:
            return last
        ends = _record_ends(text, quote)
        return int(ends[-1]) + 1 if len(ends) else 0

    def parse(self, block: Block) -> Rows:
        """Typed columns of a block; its malformed lines among the rejects.  Called by several threads."""
        return check(self._parse_table(block) if block.table is not None else self._parse_text(block), self.roles)

    def _parse_table(self, block: Block) -> Rows:
        columns = {}
        for role in self.roles.all:
            if (role.column, role.kind) in columns:
                continue
            array = block.table.column(role.column).combine_chunks()
            if isinstance(array, pa.ChunkedArray):
                array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
            columns[role.column, role.kind] = _cast(array, role, block)
        row = block.first_row + np.arange(block.table.num_rows, dtype=np.int64)
        return Rows(block, columns, row, [])

    def _types(self) -> dict[str, pa.DataType]:
        """What each column of a text file is parsed as: its roles' type, or text where they differ."""
        types: dict[str, pa.DataType] = {}
        for role in self.roles.all:
            kind = self._time_type() if role.kind == "time" else _READ_AS[role.kind]
            types[role.column] = kind if types.get(role.column, kind) == kind else pa.binary()
        return types

    def _time_type(self) -> pa.DataType:
        return pa.timestamp("us") if self._iso else pa.int64()

    def _read(self, text: bytes, types: dict[str, pa.DataType], handler=None) -> pa.Table:
        return pa_csv.read_csv(
            pa.BufferReader(text),
            pa_csv.ReadOptions(column_names=self.columns, use_threads=False, block_size=len(text) + 1),
            pa_csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char=self.source.quote or False,
                newlines_in_values=bool(self.source.quote) and self.source.quote.encode() in text,
                invalid_row_handler=handler,
            ),
            pa_csv.ConvertOptions(
                include_columns=list(types),
                column_types=types,
                null_values=list(self.source.null_values),
                strings_can_be_null=True,
            ),
        )

    def _parse_text(self, block: Block) -> Rows:
        types = self._types()
        if block.text.isspace():
            empty = {(r.column, r.kind): pa.array([], self._final(r)) for r in self.roles.all}
            return Rows(block, empty, np.zeros(0, np.int64), [])
        try:
            table = self._read(block.text, types)
            columns = {}
            for role in self.roles.all:
                columns[role.column, role.kind] = self._from_text(_one(table.column(role.column)), role)
        except pa.ArrowInvalid:
            return self._parse_slowly(block, types)
        lines = np.arange(table.num_rows, dtype=np.int64)
        if block.text.count(b"\n") + (not block.text.endswith(b"\n")) != table.num_rows:
            lines = self._records(block)[2]  # blank lines, or line ends in quotes
            if len(lines) != table.num_rows:
                raise self._misread(block)
        return Rows(block, columns, block.first_row + lines, [])

    def _misread(self, block: Block) -> UserError:
        return UserError(
            f"{block.place(block.first_row)}: somewhere in the next {len(block.text)} bytes, quotes do not pair up or a "
            'line ends in a lone carriage return; where quotes are plain text, set quote = "" under [source] in the spec'
        )

    def _final(self, role: Role) -> pa.DataType:
        return pa.int64() if role.kind == "time" else _READ_AS[role.kind]

    def _from_text(self, array: pa.Array, role: Role) -> pa.Array:
        """A parsed column as its role wants it; ArrowInvalid where text is not what the role reads."""
        if role.kind == "time":
            if array.type == pa.binary():
                array = pc.utf8_trim_whitespace(array.cast(pa.string())).cast(self._time_type())
            return pc.divide(array.cast(pa.int64()), 1_000_000) if self._iso else array
        wanted = _READ_AS[role.kind]
        if array.type == wanted:
            return array
        return pc.utf8_trim_whitespace(array.cast(pa.string())).cast(wanted)

    def _records(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start, end, line offset) of every record of a text block that is not blank, int64.

        b'a\\n\\nb\\n' -> starts [0, 3], ends [1, 4], lines [0, 2].
        """
        text, quote = block.text, self.source.quote.encode()
        data = _bytes_of(text)
        feeds = np.flatnonzero(data == 10)
        ends = _record_ends(text, quote) if quote and quote in text else feeds
        if not text.endswith(b"\n"):
            ends = np.append(ends, len(text))
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts
        blank = (lengths == 0) | ((lengths == 1) & (data[starts.clip(max=len(data) - 1)] == 13))
        starts, ends = starts[~blank], ends[~blank]
        return starts, ends, np.searchsorted(feeds, starts)

    def _parse_slowly(self, block: Block, types: dict[str, pa.DataType]) -> Rows:
        """As `_parse_text` for a block in which something is malformed."""
        starts, ends, lines = self._records(block)
        wrong: dict[int, str] = {}

        def skip(row: pa_csv.InvalidRow) -> str:
            wrong[row.number - 1] = f"expected {row.expected_columns} fields, found {row.actual_columns}"
            return "skip"

        table = self._read(block.text, dict.fromkeys(types, pa.binary()), skip)
        good = np.setdiff1d(np.arange(len(lines)), np.fromiter(wrong, np.int64, len(wrong)))
        if table.num_rows != len(good):
            raise self._misread(block)
        columns: dict[tuple[str, str], pa.Array] = {}
        for role in self.roles.all:
            array = _one(table.column(role.column))
            if role.kind == "value":
                columns[role.column, role.kind] = array
                continue
            array, bad = self._convert(array, role)
            columns[role.column, role.kind] = array
            for i in bad:
                wrong.setdefault(int(good[i]), f"column {role.column!r} is not {_WANTED[role.kind]}")
        rejects = [
            Reject(block.file.path, block.first_row + int(lines[i]), wrong[i], _shown(block.text[starts[i] : ends[i]]))
            for i in sorted(wrong)
        ]
        keep = np.asarray([int(i) not in wrong for i in good], bool)
        rows = Rows(block, columns, block.first_row + lines[good], [])
        return rows.where(keep, rejects)

    def _convert(self, array: pa.Array, role: Role) -> tuple[pa.Array, list[int]]:
        """(column with null where the text cannot be read, positions of these)."""
        distinct = array.dictionary_encode()
        values: list[object] = []
        unreadable: set[int] = set()
        for i, value in enumerate(distinct.dictionary):
            try:
                values.append(self._from_text(pa.array([value.as_py()], pa.binary()), role)[0].as_py())
            except pa.ArrowInvalid:
                values.append(None)
                unreadable.add(i)
        codes = distinct.indices
        bad = np.flatnonzero(np.isin(np.asarray(codes.fill_null(-1)), list(unreadable))).tolist()
        return pa.array(values, self._final(role)).take(codes), bad


_WANTED = {
    "number": "a number",
    "integer": "an integer of 64 bits",
    "time": "a time (integer, or ISO 8601 if asked for)",
}


def check(rows: Rows, roles: Roles) -> Rows:
    """Sets rows aside whose values cannot be used: labels, weights, times, numbers that are not finite."""
    bad: dict[int, str] = {}

    def note(mask: np.ndarray | pa.Array, reason: str) -> None:
        for i in np.flatnonzero(np.asarray(mask)):
            bad.setdefault(int(i), reason)

    for role in roles.all:
        array = rows.columns[role.column, role.kind]
        if role in roles.labels or role in (roles.weight, roles.timestamp):
            if array.null_count:
                note(pc.is_null(array), f"column {role.column!r} is missing")
            if role is roles.timestamp:
                continue
        if role.kind != "number":
            continue
        x = np.asarray(array.fill_null(0.0))
        if role in roles.labels and not (
            role.how.number or role.how.at_least is not None or role.how.above is not None
        ):
            fine = (x == 0) | (x == 1)
            if not fine.all():
                note(~fine, f"label {role.column!r} is neither 0 nor 1")
        elif role in roles.labels or role is roles.weight:
            fine = np.abs(x) <= FLOAT32_MAX  # false for NaN
            if role is roles.weight:
                fine &= x >= 0
            if not fine.all():
                note(
                    ~fine, f"column {role.column!r} is not a finite number" + (" >= 0" if role is roles.weight else "")
                )
        else:
            endless = np.abs(x) > FLOAT32_MAX  # NaN counts as missing
            if endless.any():
                note(endless, f"column {role.column!r} is infinite or beyond float32")
    return set_aside(rows, bad)


def set_aside(rows: Rows, bad: dict[int, str]) -> Rows:
    """The rows without those at these positions, which become rejects."""
    if not bad:
        return rows
    keep = np.ones(len(rows), bool)
    keep[list(bad)] = False
    texts: dict[int, bytes] = {}
    if rows.block.text is not None:
        physical = rows.block.text.split(b"\n")
        texts = {i: physical[int(rows.row[i]) - rows.block.first_row] for i in bad}
    rejects = [
        Reject(rows.block.file.path, int(rows.row[i]), reason, _shown(texts.get(i, b"")))
        for i, reason in sorted(bad.items())
    ]
    return rows.where(keep, rejects)


def _is_tsv(file: File, source: Source) -> bool:
    stem = file.path.name.removesuffix(file.path.suffix) if file.path.suffix in PACKED else file.path.name
    return source.format == "tsv" or (source.format is None and stem.endswith((".tsv", ".tab", ".txt")))


def _open_parquet(file: File) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file.path}: not a readable Parquet file: {error}") from error


class _reading:
    """Turns what goes wrong while a file is read into a UserError that names it."""

    def __init__(self, file: File) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (OSError, EOFError, pa.ArrowInvalid)) and not isinstance(error, UserError):
            raise UserError(f"{self.file.path}: cannot be read to its end: {error}; is the file whole?") from error


def _unpack(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    """The file's bytes, unpacked by its ending; raw.tell() stays the position in the packed file."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return bz2.BZ2File(raw) if path.suffix == ".bz2" else raw


def _bytes_of(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def _record_ends(text: bytes, quote: bytes) -> np.ndarray:
    """Positions of the line feeds outside quotes.  b'a,"x\\ny"\\nb\\n' -> [7, 9]."""
    data = _bytes_of(text)
    feeds = np.flatnonzero(data == 10)
    quotes = np.flatnonzero(data == quote[0])
    return feeds[np.searchsorted(quotes, feeds) % 2 == 0]


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _shown(record: bytes) -> str:
    return record.decode("utf-8", "replace").rstrip("\r\n")[:1000].replace("\n", "\\n")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _check_type(file: File, role: Role, kind: pa.DataType) -> None:
    types = pa.types
    number = types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if types.is_null(kind):
        return
    if role.kind == "number":
        fits, wanted = number, "numbers"
    elif role.kind == "integer":
        fits, wanted = number and not types.is_decimal(kind), "integers"
    elif role.kind == "time":
        fits, wanted = (
            types.is_integer(kind) or types.is_timestamp(kind) or types.is_date(kind),
            "integers or timestamps",
        )
    else:
        inner = kind.value_type if types.is_dictionary(kind) else kind
        text = (
            types.is_string(inner)
            or types.is_binary(inner)
            or types.is_large_string(inner)
            or types.is_large_binary(inner)
        )
        whole = types.is_integer(inner) or types.is_boolean(inner) or types.is_floating(inner)
        fits, wanted = (
            (text or whole) and not (role.how.hex and not text),
            "text" if role.how.hex else "integers or text",
        )
    if not fits:
        raise UserError(f"{file.path}: column {role.column!r} is {kind}, but {role.name!r} is made of {wanted}")


def _cast(array: pa.Array, role: Role, block: Block) -> pa.Array:
    """A Parquet column (or its list of values) as its role wants it."""
    kind = array.type
    if _is_list(kind):
        return array
    if pa.types.is_dictionary(kind):
        array = array.cast(kind.value_type)
        kind = array.type
    if pa.types.is_null(kind):
        return array.cast(pa.int64() if role.kind in ("time", "value") else _READ_AS[role.kind])
    if role.kind == "number":
        return array.cast(pa.float64(), safe=False)
    if role.kind == "time":
        if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
            return array.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        return array.cast(pa.int64())
    return whole_numbers(array, role, block) if pa.types.is_floating(kind) or role.kind == "integer" else array


def whole_numbers(array: pa.Array, role: Role, block: Block) -> pa.Array:
    """Integers of a column; of floats (as pandas writes integers with missing values) if all are whole, NaN missing."""
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), None, array)
        whole = pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**53)).fill_null(True)
        if not pc.all(whole).as_py() and len(array):
            row = int(np.flatnonzero(~np.asarray(whole))[0])
            raise UserError(
                f"{block.place(block.first_row + row)}: column {role.column!r} holds {array[row].as_py()!r}; "
                "ids are made of integers or text (bucketise numbers with buckets or quantiles)"
            )
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(f"{block.file.path}: column {role.column!r}: {error}") from error
