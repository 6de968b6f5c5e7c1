"""Criteo's display-advertising data: a label, 13 integers, 26 hexadecimal categories, tab-separated, no header."""

import bz2
import gzip
from pathlib import Path

from kernels.errors import UserError
from trainer.prepare.blocks import File
from trainer.prepare.spec import CategoricalColumns, CriteoOptions, DenseColumns, Label, Source, Spec

DENSE = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))


def spec(options: CriteoOptions) -> Spec:
    """Counts as log(1 + max(x, 0)); a negative one (Criteo has a few -1, -2) becomes 0, as a missing one does."""
    if options.ids == "hash" and options.rows is None:
        raise UserError("ids = 'hash' needs rows, the size of each table, such as rows = 1_000_000")
    ids = {"min_count": options.min_count} if options.ids == "vocab" else {}
    return Spec(
        name="criteo",
        source=Source(format="tsv", quote="", columns=("label", *DENSE, *CATEGORICAL)),
        label=(Label(column="label"),),
        dense=(DenseColumns(columns=DENSE, log1p=True, integer=True),),
        categorical=(CategoricalColumns(columns=CATEGORICAL, hex=True, ids=options.ids, rows=options.rows, **ids),),
    )


def looks_like(file: File) -> bool:
    """Whether the first line has the 40 columns of a training file, a label of 0 or 1 first."""
    fields = _first_line(file.path).rstrip(b"\r\n").split(b"\t")
    return file.format == "csv" and len(fields) == 40 and fields[0] in (b"0", b"1")


def check(file: File) -> None:
    """UserError where a file given as Criteo's has other columns."""
    fields = len(_first_line(file.path).rstrip(b"\r\n").split(b"\t"))
    if fields == 39:
        raise UserError(f"{file.path}: has 39 columns, so it is Criteo's test file without labels; give train.txt")
    if fields != 40:
        raise UserError(
            f"{file.path}: line 1 has {fields} tab-separated fields; Criteo's files have 40: "
            "label, 13 integers, 26 categories"
        )


def _first_line(path: Path) -> bytes:
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            return stream.readline(1 << 16)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}; is the file whole?") from error
