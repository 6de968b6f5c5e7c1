"""Text sources: a file is cut into blocks at line ends, which several threads parse while every line keeps its number.

A block is parsed with the column types wanted; only where that fails is it parsed again as text to find the lines at
fault.
"""

import bz2
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from kernels.errors import UserError
from trainer.prepare.blocks import PACKED, Block, File, Reject, Rows, check_names, reading, shown
from trainer.prepare.spec import Role, Roles, Source, Spec, without_labels

LONGEST_RECORD = 64 << 20  # bytes; a quoted field that runs on for longer was never closed
_READ_AS = {"number": pa.float64(), "integer": pa.int64(), "value": pa.binary()}


class TextReader:
    """Blocks and typed columns of the text files of one source."""

    def __init__(self, files: list[File], spec: Spec, *, block_bytes: int, to_predict: bool = False) -> None:
        self.files = files
        self.source = spec.source
        self._block_bytes = block_bytes
        self._delimiter = spec.source.delimiter or ("\t" if _is_tsv(files[0], spec.source) else ",")
        self._iso = spec.timestamp is not None and spec.timestamp.parse == "iso8601"
        self._zoned = False  # whether times were last seen with a zone: what the next block is tried with first
        self.columns = self._names(spec, to_predict)
        if to_predict:
            spec = without_labels(spec, self.columns)
        self.roles = Roles.resolve(spec, self.columns, where=str(files[0].path))
        self.lists: set[str] = set()  # Parquet alone has list columns
        self._check_headers()

    def _names(self, spec: Spec, to_predict: bool) -> list[str]:
        first = self._header(self.files[0])
        names = first if self.source.columns is None else list(self.source.columns)
        if to_predict and self.source.columns is not None:
            unlabelled = [n for n in names if n not in {label.column for label in spec.label}]
            names = unlabelled if len(first) == len(unlabelled) else names
        check_names(names, self.files[0])
        return names

    def _check_headers(self) -> None:
        for file in self.files[1:]:
            if self.source.columns is None and (here := self._header(file)) != self.columns:
                lacks, more = ([a for a in x if a not in y] for x, y in ((self.columns, here), (here, self.columns)))
                how = f"it lacks {lacks[0]!r}" if lacks else f"it has {more[0]!r} too" if more else "in another order"
                raise UserError(
                    f"{file.path}: its header differs from that of {self.files[0].path}: {how}; "
                    "files of one source have the same columns in the same order"
                )

    def _header(self, file: File) -> list[str]:
        with reading(file), file.path.open("rb") as raw, _unpack(raw, file.path) as stream:
            line = stream.readline()
        try:
            text = line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path}, line 1: the header is not UTF-8 text ({error})") from error
        quoting = {"quotechar": self.source.quote} if self.source.quote else {"quoting": csv.QUOTE_NONE}
        try:
            if "\r" in text:
                raise csv.Error("a carriage return in its middle")
            names = next(csv.reader([text], delimiter=self._delimiter, **quoting), [])
        except csv.Error as error:
            raise UserError(
                f"{file.path}, line 1: the header cannot be read ({error}); "
                "if the lines of the file end in carriage returns, convert them to line feeds"
            ) from error
        if not names:
            raise UserError(f"{file.path}, line 1: is blank, but the first line names the columns; remove blank lines")
        if len(names) == 1 and (other := next((c for c in ",;\t|" if c in names[0]), None)):
            raise UserError(
                f"{file.path}, line 1: no {self._delimiter!r} in the header, but {other!r}; "
                f"set delimiter = {json.dumps(other)} under [source] in the spec"
            )
        return names

    def blocks(self) -> Iterator[Block]:
        """All blocks of all files, in order."""
        before = 0
        for file in self.files:
            with reading(file):
                yield from self._blocks(file, before)
            before += file.bytes

    def _blocks(self, file: File, before: int) -> Iterator[Block]:
        with file.path.open("rb") as raw, _unpack(raw, file.path) as stream:
            line = 1
            rest = b""
            if self.source.columns is None:
                stream.readline()
                line = 2
            empty = True
            while True:
                piece = stream.read(self._block_bytes)
                text = rest + piece
                if not piece and not text:
                    break
                end = len(text) if not piece else self._last_line_end(text)
                if not end:
                    if len(text) > max(LONGEST_RECORD, 2 * self._block_bytes):
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
        if block.text.isspace():
            empty = {(r.column, r.kind): pa.array([], self._final(r)) for r in self.roles.all}
            return Rows(block, empty, np.zeros(0, np.int64), [])
        found = self._parse_fast(block)
        if found is None:
            return self._parse_slowly(block)
        count, columns = found
        lines = np.arange(count, dtype=np.int64)
        if block.text.count(b"\n") + (not block.text.endswith(b"\n")) != count:
            lines = self._records(block)[2]  # blank lines, or line ends in quotes
            if len(lines) != count:
                raise self._misread(block)
        return Rows(block, columns, block.first_row + lines, [])

    def _parse_fast(self, block: Block) -> tuple[int, dict[tuple[str, str], pa.Array]] | None:
        """(rows, their columns); None where a value is not what its column holds."""
        for zoned in (self._zoned, not self._zoned) if self._iso else (False,):
            try:
                table = self._read(block.text, self._types(zoned))
                columns = {
                    (role.column, role.kind): self._from_text(_one(table.column(role.column)), role)
                    for role in self.roles.all
                }
            except pa.ArrowInvalid:
                continue
            self._zoned = zoned
            return table.num_rows, columns
        return None

    def keys_of(self, role: Role) -> str:
        return "hex" if role.how.hex else "text"

    def _types(self, zoned: bool) -> dict[str, pa.DataType]:
        """What each column of a text file is parsed as: its roles' type, or text where they differ."""
        types: dict[str, pa.DataType] = {}
        for role in self.roles.all:
            kind = self._time_type(zoned) if role.kind == "time" else _READ_AS[role.kind]
            types[role.column] = kind if types.get(role.column, kind) == kind else pa.binary()
        return types

    def _time_type(self, zoned: bool) -> pa.DataType:
        return pa.timestamp("us", "UTC" if zoned else None) if self._iso else pa.int64()

    def _read(self, text: bytes, types: dict[str, pa.DataType], handler=None) -> pa.Table:
        return pa_csv.read_csv(
            pa.BufferReader(text),
            pa_csv.ReadOptions(column_names=self.columns, use_threads=False, block_size=len(text) + 1),
            pa_csv.ParseOptions(
                delimiter=self._delimiter,
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

    def _misread(self, block: Block) -> UserError:
        return UserError(
            f"{block.place(block.first_row)}: somewhere in the next {len(block.text)} bytes, quotes do not pair up or "
            "a line ends in a lone carriage return; where quotes are plain text, set quote = '' under [source]"
        )

    def _check_quotes(self, block: Block) -> None:
        """A stray quote would join all lines up to the next one into one field: its end tells it from a real one."""
        data, quote = _bytes_of(block.text), self.source.quote.encode()[0]
        at = np.flatnonzero(data == quote)
        closing = at[1::2][at[1::2] + 1 < len(data)]
        behind = data[closing + 1]
        stray = np.flatnonzero(~np.isin(behind, [quote, ord(self._delimiter), 10, 13]))
        if len(stray):
            line = block.first_row + block.text.count(b"\n", 0, int(at[2 * stray[0]]))
            raise UserError(
                f"{block.place(line)}: the quote that opens here would be closed by one with "
                f"{chr(behind[stray[0]])!r} behind it; write a quote inside a quoted field twice, "
                "or where quotes are plain text set quote = '' under [source] in the spec"
            )

    def _final(self, role: Role) -> pa.DataType:
        return pa.int64() if role.kind == "time" else _READ_AS[role.kind]

    def _from_text(self, array: pa.Array, role: Role) -> pa.Array:
        """A parsed column as its role wants it; ArrowInvalid where text is not what the role reads."""
        if role.kind == "time":
            if array.type == pa.binary():
                text = pc.utf8_trim_whitespace(array.cast(pa.string()))
                try:
                    array = text.cast(self._time_type(zoned=False))
                except pa.ArrowInvalid:
                    array = text.cast(self._time_type(zoned=True))
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
        ends = feeds
        if quote and quote in text:
            self._check_quotes(block)
            ends = _record_ends(text, quote)
        if not text.endswith(b"\n"):
            ends = np.append(ends, len(text))
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts
        blank = (lengths == 0) | ((lengths == 1) & (data[starts.clip(max=len(data) - 1)] == 13))
        starts, ends = starts[~blank], ends[~blank]
        return starts, ends, np.searchsorted(feeds, starts)

    def _parse_slowly(self, block: Block) -> Rows:
        """As `_parse_text` for a block in which something is malformed."""
        starts, ends, lines = self._records(block)
        wrong: dict[int, str] = {}

        def skip(row: pa_csv.InvalidRow) -> str:
            wrong[row.number - 1] = f"expected {row.expected_columns} fields, found {row.actual_columns}"
            return "skip"

        table = self._read(block.text, dict.fromkeys(self._types(False), pa.binary()), skip)
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
            Reject(block.file.path, block.first_row + int(lines[i]), wrong[i], shown(block.text[starts[i] : ends[i]]))
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
                whole = role.kind == "integer" and re.fullmatch(rb"\s*(-?\d{1,18})\.0*\s*", value.as_py())
                values.append(int(whole[1]) if whole else None)
                if not whole:
                    unreadable.add(i)
        codes = distinct.indices
        bad = np.flatnonzero(np.isin(np.asarray(codes.fill_null(-1)), list(unreadable))).tolist()
        return pa.array(values, self._final(role)).take(codes), bad


_WANTED = {
    "number": "a number",
    "integer": "an integer of 64 bits",
    "time": "a time (integer, or ISO 8601 if asked for)",
}


def _is_tsv(file: File, source: Source) -> bool:
    stem = file.path.name.removesuffix(file.path.suffix) if file.path.suffix in PACKED else file.path.name
    return source.format == "tsv" or (source.format is None and stem.endswith((".tsv", ".tab", ".txt")))


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
