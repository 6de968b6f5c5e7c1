"""Files, the blocks they are read in, and the good and malformed rows of a block."""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kernels.errors import UserError
from trainer.prepare.spec import Roles

TEXT = (".csv", ".tsv", ".txt", ".tab", ".dat")
PACKED = (".gz", ".bz2")
REJECTED = ".rejected.tsv"
FLOAT32_MAX = float(np.finfo(np.float32).max)


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
            inside = [p for p in inside if not p.name.endswith(REJECTED)]  # what an earlier run left beside its DEST
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


def check_names(names: list[str], file: File) -> None:
    """UserError where two columns have one name."""
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{file.path}: columns called {', '.join(map(repr, twice))} occur more than once; rename them")


class reading:
    """Turns what goes wrong while a file is read into a UserError that names it."""

    def __init__(self, file: File) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (PermissionError, FileNotFoundError)):
            raise UserError(f"{self.file.path}: {error.strerror}; give files that can be read") from error
        if isinstance(error, (OSError, EOFError, pa.ArrowInvalid)) and not isinstance(error, UserError):
            raise UserError(f"{self.file.path}: cannot be read to its end: {error}; is the file whole?") from error


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
                note(~fine, no_label(role.column))
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


def no_label(column: object) -> str:
    """The reason why a row whose label is another number is rejected."""
    return f"label {column!r} is neither 0 nor 1"


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
        Reject(rows.block.file.path, int(rows.row[i]), reason, shown(texts.get(i, b"")))
        for i, reason in sorted(bad.items())
    ]
    return rows.where(keep, rejects)


def shown(record: bytes) -> str:
    return record.decode("utf-8", "replace").rstrip("\r\n")[:1000].replace("\n", "\\n")
