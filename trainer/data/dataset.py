"""`dataset.json`: what a dataset folder holds.  Written by prepare, read by everything else.

Layout of a folder:  DEST/dataset.json, DEST/<split>/part-00000.parquet, ..., DEST/encoding/ (prepare/encoding.py)
Column types in the Parquet files of a prepared dataset:
    label    float32, no nulls; not there where the dataset has none (labelled = false)
    dense    float32, no nulls, finite (missing values were filled)
    feature  int32, or int64 where the cardinality is above 2**31 - 1; a null is an empty bag;
             multi-hot: list<int32|int64>; a null or empty list is an empty bag
    weight   float32, no nulls, >= 0
    timestamp int64
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.errors import UserError

FORMAT = "tablemesh-dataset"
VERSION = 1
SPLITS = ("train", "valid", "test")
FIGURES_ONLY = "figures only"  # the fingerprint where the files are not there and their row groups stand for all rows

ROW_GROUP_ROWS = 65536
ROW_GROUPS = 32  # a split has at least this many where its rows allow groups of SMALLEST_ROW_GROUP
SMALLEST_ROW_GROUP = 1024


class Frozen(BaseModel):
    """Immutable, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Dense(Frozen):
    name: str
    transform: dict[str, Any] = {}  # what prepare did, with the fitted numbers: {"log1p": true, "mean": .., "std": ..}
    missing: int | None = None  # rows that had no value in the source; None: not counted
    mean: float | None = None
    std: float | None = None


class Stats(Frozen):
    """Per-feature figures over the train split, or over all rows of a dataset that was prepared like another."""

    rows: int  # bags looked at
    ids: int  # ids in them
    distinct: int  # different ids seen (for a hash: after hashing)
    distinct_is_estimate: bool = False
    top_share: dict[str, float] = {}  # {"1": share of all ids taken by the most frequent id, "10":, "100":, "1000":}
    missing: int = 0  # bags with no value in the source
    max_per_bag: int = 1
    unseen: int = 0  # ids that fell to the reserved id (below the minimum count, or not in the train split)

    @property
    def ids_per_bag(self) -> float:
        return self.ids / self.rows if self.rows else 0.0


class Categorical(Frozen):
    name: str
    cardinality: int  # ids are 0 .. cardinality-1; of hash64 any 64 bits, and this is how many there are
    multi_hot: bool = False
    ids: Literal["vocab", "hash", "hash64", "as_is"] = "as_is"
    stats: Stats | None = None


class File(Frozen):
    path: str  # relative to the dataset folder
    row_groups: tuple[int, ...]  # rows of each row group, in file order

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


class Split(Frozen):
    files: tuple[File, ...]

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files)


class Bayes(Frozen):
    """What the best possible model reaches on one split of a planted data set.

    auc, logloss: expectations over the labels given each row's true probability, exact.
    sample_auc, sample_logloss: of the true probabilities against the labels that were drawn.
    """

    auc: float
    logloss: float
    sample_auc: float
    sample_logloss: float


class Dataset(Frozen):
    format: Literal["tablemesh-dataset"] = FORMAT
    version: int = VERSION
    name: str
    source: str  # what was prepared, in words
    labels: tuple[str, ...]
    labelled: bool = True  # false: rows to predict for; the files have no label columns
    dense: tuple[Dense, ...] = ()
    categorical: tuple[Categorical, ...] = ()
    weight: str | None = None
    timestamp: str | None = None
    splits: dict[str, Split]
    fingerprint: str  # hash over the contents of every file and the schema, or FIGURES_ONLY
    bayes: dict[str, Bayes] = {}  # by split
    positive_rate: dict[str, float] = {}  # mean of each label on the train split
    rejected: int = 0  # malformed lines of the source, listed in DEST/rejected.tsv
    encoding: str | None = None  # hash of how values become ids and numbers; None: not known
    like: str | None = None  # the dataset whose encoding this one was given
    inputs: str = ""  # hash of the source, the spec and the options: equal inputs make an equal dataset

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.categorical)

    def split(self, name: str) -> Split:
        """The split of this name, or UserError naming those there are."""
        if name not in self.splits:
            raise UserError(f"split {name!r}: the dataset {self.name!r} has {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]


def load(folder: str | Path) -> Dataset:
    """Read DEST/dataset.json.  UserError when it is missing, broken or of a newer version."""
    return read(Path(folder) / "dataset.json")


def read(path: Path) -> Dataset:
    """The same of a file anywhere."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `tablemesh prepare SOURCE {path.parent}` writes it") from error
    except ValueError as error:
        raise UserError(f"{path}: not a tablemesh dataset: {error}; run `tablemesh prepare` again") from error
    try:
        found = Dataset.model_validate_json(text)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}"
            for e in error.errors(include_url=False, include_input=False)
        ]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path}: not a tablemesh dataset: {'; '.join(wrong[:3])}{more}; run `tablemesh prepare` again"
        ) from None
    if found.version > VERSION:
        raise UserError(f"{path}: version {found.version}, this tablemesh reads up to {VERSION}; upgrade tablemesh")
    return found


def row_group_rows(rows: int) -> int:
    """Rows per row group of a split of about `rows` rows: a power of two.  600_000 -> 16384."""
    wanted = max(SMALLEST_ROW_GROUP, min(ROW_GROUP_ROWS, rows // ROW_GROUPS))
    return 1 << (wanted.bit_length() - 1)
