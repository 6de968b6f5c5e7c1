"""The spec: which columns of a source are what, and the options of `prepare`.

`load_spec` reads the TOML (docs/data.md shows one); `Roles.resolve` matches it against the columns a source really has.
"""

import fnmatch
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kernels import registry
from kernels.errors import UserError
from trainer.config import validate
from trainer.data.dataset import SPLITS, Frozen

Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
# A share of the rows, or files; on a command line both are text.
Part = Annotated[float | tuple[str, ...] | None, BeforeValidator(lambda v: _part(v))]


class Source(Frozen):
    """How a text source is written; Parquet describes itself."""

    format: Literal["csv", "tsv", "parquet"] | None = None  # default: by the file's ending
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    quote: str = Field(default='"', max_length=1)  # "" where quotes are plain text
    columns: Names | None = None  # the names, where the file has no header line
    null_values: tuple[str, ...] = ("",)  # what stands for a missing value


class Label(Frozen):
    column: str
    name: str | None = None  # default: the column
    at_least: float | None = None  # 1 where value >= this
    above: float | None = None  # 1 where value > this
    number: bool = False  # any finite value, for a regression; otherwise the values must be 0 or 1

    @model_validator(mode="after")
    def _check(self) -> "Label":
        if sum((self.at_least is not None, self.above is not None, self.number)) > 1:
            raise ValueError("give one of at_least, above and number")
        return self


class DenseColumns(Frozen):
    columns: Names  # names or shell patterns
    log1p: bool = False  # log(1 + max(x, 0))
    standardise: bool = False  # then to mean 0, standard deviation 1 over the train split
    integer: bool = False  # a value that is no integer makes its line malformed


class CategoricalColumns(Frozen):
    columns: Names  # names or shell patterns
    name: str | None = None  # of the feature, where it is one column; default: the column
    ids: Literal["vocab", "hash", "hash64", "as_is"] = "vocab"
    min_count: int = Field(default=1, ge=1)  # vocab: rarer values fall to the reserved id 0
    rows: int | None = Field(
        default=None, ge=2
    )  # hash: ids 0..rows-1; vocab: at most this many; as_is: ids are below it
    seed: int = Field(default=0, ge=0, lt=2**63)  # hash
    hex: bool = False  # text of 1 to 16 hexadecimal digits
    separator: str | None = Field(default=None, min_length=1)  # text: several ids in one field
    buckets: tuple[float, ...] | None = None  # numbers -> 1 + how many of these bounds are <= x
    quantiles: int | None = Field(default=None, ge=2, le=65536)  # as buckets, bounds fitted on the train split
    missing: Literal["reserved", "empty"] | None = None  # default: reserved; empty for several ids a row, as_is, hash64

    @model_validator(mode="after")
    def _check(self) -> "CategoricalColumns":
        bucketised = self.buckets is not None or self.quantiles is not None
        if self.buckets is not None and self.quantiles is not None:
            raise ValueError("give buckets or quantiles, not both")
        if self.buckets is not None and (not self.buckets or list(self.buckets) != sorted(set(self.buckets))):
            raise ValueError(f"buckets = {list(self.buckets)} must be bounds in increasing order")
        if bucketised and (self.separator or self.hex or "ids" in self.model_fields_set):
            raise ValueError("buckets and quantiles make ids out of numbers: leave out ids, hex and separator")
        if self.ids == "hash" and self.rows is None:
            raise ValueError("ids = 'hash' needs rows, the number of ids to hash into")
        if self.ids == "hash64" and self.rows is not None:
            raise ValueError("ids = 'hash64' are of 64 bits, whatever the table's rows; leave out rows, or use 'hash'")
        if self.ids != "vocab" and self.min_count > 1:
            raise ValueError(f"min_count is for ids = 'vocab', not {self.ids!r}")
        if self.ids in ("as_is", "hash64") and self.missing == "reserved":
            raise ValueError(f"ids = {self.ids!r} has no reserved id; missing must be 'empty'")
        if self.name is not None and (len(self.columns) > 1 or _is_pattern(self.columns[0])):
            raise ValueError("name is for a single column")
        return self


class TimeColumn(Frozen):
    column: str
    parse: Literal["integer", "iso8601"] = "integer"  # iso8601 becomes seconds since 1970


class SplitSpec(Frozen):
    by: Literal["random", "time"] = "random"
    valid: Part = None
    test: Part = None
    valid_from: int | str | None = None  # by = "time": rows from this time on; an integer or a date and time
    test_from: int | str | None = None


class Spec(Frozen):
    name: str | None = None
    source: Source = Source()
    label: tuple[Label, ...] = Field(min_length=1)
    dense: tuple[DenseColumns, ...] = ()
    categorical: tuple[CategoricalColumns, ...] = ()
    weight: str | None = None
    timestamp: Annotated[TimeColumn | None, BeforeValidator(lambda v: {"column": v} if isinstance(v, str) else v)] = (
        None
    )
    split: SplitSpec = SplitSpec()


class Options(Frozen):
    """What every kind of source takes."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=256)
    existing: Literal["error", "reuse", "replace"] = "error"
    name: str | None = None
    row_group_rows: int | None = Field(default=None, ge=1)  # default: 65536, fewer where a split has few rows


class FileOptions(Options):
    split: Literal["random", "time"] | None = None
    valid: Part = None
    test: Part = None
    valid_from: int | str | None = None
    test_from: int | str | None = None
    like: Path | None = None  # dataset folder whose encoding the rows get
    max_rejected: float = Field(default=0.001, ge=0.0, le=1.0)  # share of malformed lines above which to stop
    block_bytes: int = Field(default=8 << 20, ge=64)  # text read at a time


class CriteoOptions(FileOptions):
    ids: Literal["vocab", "hash"] = "vocab"
    min_count: int = Field(default=1, ge=1)
    rows: int | None = Field(default=None, ge=2)  # hash: of each table


@dataclass(frozen=True)
class Role:
    """One output column: where it comes from and how it is read.

    kind: "number" (float64), "integer" (int64), "time" (int64) or "value" (anything that ids are made of).
    """

    name: str
    column: str
    kind: str
    how: Any  # Label | DenseColumns | CategoricalColumns | TimeColumn | None


@dataclass(frozen=True)
class Roles:
    """A spec matched against the columns that are there."""

    labels: tuple[Role, ...]
    dense: tuple[Role, ...]
    categorical: tuple[Role, ...]
    weight: Role | None
    timestamp: Role | None

    @property
    def all(self) -> tuple[Role, ...]:
        return (
            *self.labels,
            *self.dense,
            *self.categorical,
            *((self.weight,) if self.weight else ()),
            *((self.timestamp,) if self.timestamp else ()),
        )

    @classmethod
    def resolve(cls, spec: Spec, columns: list[str], *, where: str) -> "Roles":
        """UserError for a column that `where` (the file with these columns) lacks and for two roles of one name."""

        def role(name: str | None, column: str, kind: str, how: Any, key: str) -> Role:
            if column not in columns:
                raise UserError(
                    f"{where}: no column {column!r}, which {key} asks for; {registry.nearest(column, columns)}"
                )
            return Role(name or column, column, kind, how)

        def expand(names: tuple[str, ...], key: str) -> list[str]:
            found: list[str] = []
            for name in names:
                matched = fnmatch.filter(columns, name) if _is_pattern(name) and name not in columns else [name]
                if not matched:
                    raise UserError(
                        f"{where}: no column matches {name!r}, which {key} asks for; it has {', '.join(columns)}"
                    )
                found += matched
            return found

        labels = tuple(
            role(label.name, label.column, "number", label, f"label.{i}") for i, label in enumerate(spec.label)
        )
        dense = tuple(
            role(None, column, "integer" if how.integer else "number", how, f"dense.{i}")
            for i, how in enumerate(spec.dense)
            for column in expand(how.columns, f"dense.{i}")
        )
        categorical = tuple(
            role(how.name, column, _kind(how), how, f"categorical.{i}")
            for i, how in enumerate(spec.categorical)
            for column in expand(how.columns, f"categorical.{i}")
        )
        weight = role(None, spec.weight, "number", None, "weight") if spec.weight else None
        time = spec.timestamp
        timestamp = role(None, time.column, "time", time, "timestamp") if time else None
        roles = cls(labels, dense, categorical, weight, timestamp)
        seen: set[str] = set()
        for each in roles.all:
            if each.name in seen:
                raise UserError(
                    f"two columns of the dataset would be called {each.name!r}; "
                    "give one of them another name in the spec"
                )
            seen.add(each.name)
        if not dense and not categorical:
            raise UserError(f"{where}: the spec names no dense and no categorical column; a model needs some input")
        return roles


def load_spec(path: str | Path) -> Spec:
    """Read a spec; UserError naming file, key and the nearest name."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --spec takes a TOML file, see docs/data.md") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    return validate(Spec, values, where=str(path))


def without_labels(spec: Spec, columns: list[str]) -> Spec:
    """The spec for rows that a model is to predict for: the labels left out if `columns` has none of them.

    The weight and the time, which no prediction needs, are left out with them where they are not there either.
    """
    if any(label.column in columns for label in spec.label):
        return spec
    changes: dict[str, Any] = {"label": ()}
    if spec.weight not in columns:
        changes["weight"] = None
    if spec.timestamp is not None and spec.timestamp.column not in columns:
        changes["timestamp"] = None
    return spec.model_copy(update=changes)


def choose_split(spec: SplitSpec, options: FileOptions) -> SplitSpec:
    """The spec's split with the options laid over it; a tenth each for valid and test where nothing was said.

    Of a dataset like another one, all rows are the test split then, which `test = ()` says.
    """
    given = {k: getattr(options, k) for k in ("valid", "test", "valid_from", "test_from")}
    merged = spec.model_dump() | {k: v for k, v in given.items() if v is not None}
    if options.split is not None:
        merged["by"] = options.split
    if all(merged[k] is None for k in ("valid", "test", "valid_from", "test_from")):
        if options.like is not None:
            return SplitSpec(test=())  # the source is the test split
        merged |= {"valid": 0.1, "test": 0.1}
    found = SplitSpec(**{k: None if v == 0.0 and k in SPLITS else v for k, v in merged.items()})
    shares = [s for s in (found.valid, found.test) if isinstance(s, float)]
    if any(not 0 < s < 1 for s in shares) or sum(shares) >= 1:
        raise UserError(
            f"split: valid = {found.valid}, test = {found.test}: "
            "shares lie between 0 and 1 and leave some rows to train"
        )
    if found.by == "random" and (found.valid_from is not None or found.test_from is not None):
        raise UserError("split: valid_from and test_from are for split = 'time'")
    for part in SPLITS[1:]:
        if getattr(found, f"{part}_from", None) is not None and getattr(found, part) is not None:
            raise UserError(f"split: give {part} or {part}_from, not both")
    return found


def _kind(how: CategoricalColumns) -> str:
    if how.buckets is not None or how.quantiles is not None:
        return "number"
    return "integer" if how.ids == "as_is" and how.separator is None else "value"


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[")


def _part(value: Any) -> Any:
    """0.1, "0.1", "a.csv", ["a.csv", "b.csv"] -> a share or a tuple of files."""
    if value is None or isinstance(value, (int, float)):
        return None if value is None else float(value)
    values = [value] if isinstance(value, str) else list(value)
    if len(values) == 1:
        try:
            return float(values[0])
        except ValueError:
            pass
    return tuple(str(v) for v in values)
