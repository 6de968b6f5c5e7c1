"""Good rows -> the columns that are written, with what was fitted on the train split.

Letters in names: N rows of a block, L ids.
"""

import re
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kernels.errors import UserError
from trainer.prepare.blocks import Rows, set_aside
from trainer.prepare.ids import Vocabulary, hash_keys, keys_of
from trainer.prepare.parquet import is_text, whole_numbers
from trainer.prepare.spec import CategoricalColumns, DenseColumns, Label, Role, Roles
from trainer.prepare.write import id_type


@dataclass(frozen=True)
class Bags:
    """The ids of one feature in N rows before they are numbered.

    keys_L: uint64; one a row where offsets is None, else row i has keys_L[offsets[i] : offsets[i + 1]].
    present_N: False where the source has no value; None: everywhere one.
    """

    keys_L: np.ndarray
    present_N: np.ndarray | None
    offsets: np.ndarray | None  # int64, N + 1


@dataclass
class Fitted:
    """What the train split was asked for, by feature or column name."""

    vocabulary: dict[str, Vocabulary] = field(default_factory=dict)
    bounds: dict[str, np.ndarray] = field(default_factory=dict)  # of bucketised columns
    largest: dict[str, int] = field(default_factory=dict)  # largest as_is id, over all splits
    distinct: dict[str, int] = field(default_factory=dict)  # hash64 ids of the train split, counted as it is written
    mean: dict[str, float] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)


def is_bucketised(how: CategoricalColumns) -> bool:
    return how.buckets is not None or how.quantiles is not None


def is_multi_hot(role: Role, lists: set[str]) -> bool:
    return role.how.separator is not None or role.column in lists


def is_empty_when_missing(role: Role, lists: set[str]) -> bool:
    """Whether a missing value is an empty bag, not the reserved id."""
    if role.how.missing is not None:
        return role.how.missing == "empty"
    return (role.how.ids in ("as_is", "hash64") and not is_bucketised(role.how)) or is_multi_hot(role, lists)


def ids_below(role: Role, fitted: Fitted) -> int:
    """What the type of the written ids must hold."""
    return 2**63 if role.how.ids == "hash64" else cardinality(role, fitted)


def cardinality(role: Role, fitted: Fitted) -> int:
    how = role.how
    if how.ids == "hash64":
        return max(1, fitted.distinct[role.name])
    if is_bucketised(how):
        return len(fitted.bounds[role.name]) + 2
    if how.ids == "vocab":
        return fitted.vocabulary[role.name].cardinality
    return how.rows if how.rows is not None else fitted.largest[role.name] + 1


def to_bags(rows: Rows, roles: Roles, lists: set[str], keys: dict[str, str]) -> tuple[Rows, dict[str, Bags]]:
    """The keys of every feature that has ids; rows with malformed ones are set aside.

    keys: what the keys of a feature must be made from where its ids are known already, "integer", "text" or "hex".
    """
    bags: dict[str, Bags] = {}
    bad: dict[int, str] = {}
    for role in roles.categorical:
        if is_bucketised(role.how):
            continue
        wanted = "integer" if role.how.ids == "as_is" else keys.get(role.name)
        found, malformed_N = _bags(rows.columns[role.column, role.kind], role, lists, rows, wanted)
        bags[role.name] = found
        if malformed_N is not None:
            sort = "a hexadecimal number of at most 16 digits" if role.how.hex else "an integer"
            for i in np.flatnonzero(malformed_N):
                bad.setdefault(int(i), f"column {role.column!r} is not {sort}")
    return (rows, bags) if not bad else to_bags(set_aside(rows, bad), roles, lists, keys)


def _bags(
    values: pa.Array, role: Role, lists: set[str], rows: Rows, wanted: str | None
) -> tuple[Bags, np.ndarray | None]:
    """(bags, rows that are malformed or None)."""
    how = role.how
    if not is_multi_hot(role, lists):
        values, no_integer_N = _as_wanted(values, wanted)
        keys_N, present_N, bad_N = keys_of(values, hex=how.hex)
        return Bags(keys_N, present_N, None), no_integer_N if bad_N is None else bad_N
    if how.separator is not None and role.column not in lists:
        values = pc.split_pattern(values, how.separator)
    if pa.types.is_fixed_size_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    lengths_N = np.asarray(pc.list_value_length(values).fill_null(0)).astype(np.int64)
    flat = values.flatten()  # leaves out what null lists cover
    if isinstance(flat.type, pa.DictionaryType):
        flat = flat.cast(flat.type.value_type)
    if pa.types.is_null(flat.type):
        flat = flat.cast(pa.int64())
    if pa.types.is_floating(flat.type):
        flat = whole_numbers(flat, role, rows.block)
    kept_L = np.asarray(pc.is_valid(flat))
    if is_text(flat.type):
        kept_L = kept_L & np.asarray(pc.greater(pc.binary_length(flat), 0).fill_null(False))
    row_L = np.repeat(np.arange(len(values)), lengths_N)
    if not kept_L.all():
        flat, row_L = flat.filter(pa.array(kept_L)), row_L[kept_L]
    bad_N = None
    flat, bad_L = _as_wanted(flat, wanted)
    keys_L, _, bad_hex_L = keys_of(flat, hex=how.hex)
    for bad in (bad_L, bad_hex_L):
        if bad is not None and bad.any():
            bad_N = np.zeros(len(values), bool)
            bad_N[row_L[bad]] = True
    lengths_N = np.bincount(row_L, minlength=len(values))
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    return Bags(keys_L, lengths_N > 0, offsets), bad_N


def _as_wanted(values: pa.Array, wanted: str | None) -> tuple[pa.Array, np.ndarray | None]:
    """Text as integers or integers as text where these are wanted, and where text is no integer (None: nowhere)."""
    if wanted == "integer" and is_text(values.type):
        return _integers(values)
    if wanted == "text" and not is_text(values.type):
        return values.cast(pa.string()), None
    return values, None


def _integers(text: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    try:
        return pc.utf8_trim_whitespace(text.cast(pa.string())).cast(pa.int64()), None
    except pa.ArrowInvalid:
        distinct = text.cast(pa.binary()).dictionary_encode()
        numbers = [_integer(value) for value in distinct.dictionary.to_pylist()]
        wrong = pa.array([number is None for number in numbers])
        bad_N = np.asarray(wrong.take(distinct.indices).fill_null(False))
        return pa.array(numbers, pa.int64()).take(distinct.indices), bad_N


def _integer(text: bytes) -> int | None:
    if not re.fullmatch(rb"-?\d{1,19}", text.strip()):
        return None
    number = int(text)
    return number if -(2**63) <= number < 2**63 else None


def encode_label(values: pa.Array, how: Label) -> np.ndarray:
    x_N = np.asarray(values)
    if how.at_least is not None:
        x_N = x_N >= how.at_least
    elif how.above is not None:
        x_N = x_N > how.above
    return x_N.astype(np.float32)


def transform_dense(values: pa.Array, how: DenseColumns) -> tuple[np.ndarray, np.ndarray]:
    """(float64 N before standardising with NaN where missing, missing bool N)."""
    x_N = np.asarray(values.cast(pa.float64(), safe=False).fill_null(float("nan")))
    missing_N = np.isnan(x_N)
    if how.log1p:
        x_N = np.log1p(np.maximum(x_N, 0.0))  # np.maximum keeps NaN
    return x_N, missing_N


def encode_dense(values: pa.Array, role: Role, fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """(float32 N, missing bool N).  A missing value is 0 after the transforms."""
    x_N, missing_N = transform_dense(values, role.how)
    if role.how.standardise:
        x_N = (x_N - fitted.mean[role.name]) / (fitted.std[role.name] or 1.0)
    return np.where(missing_N, 0.0, x_N).astype(np.float32), missing_N


def bucketise(values: pa.Array, role: Role, fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 N: 0 for missing, else 1 + how many bounds are <= x; present bool N)."""
    x_N = np.asarray(values.fill_null(float("nan")))
    missing_N = np.isnan(x_N)
    ids_N = 1 + np.searchsorted(fitted.bounds[role.name], x_N, side="right")
    return np.where(missing_N, 0, ids_N), ~missing_N


def encode_ids(bags: Bags, role: Role, fitted: Fitted, rows: Rows, *, empty: bool) -> "Ids":
    """Numbers the keys of a feature; UserError for an as_is id outside its table."""
    how = role.how
    if how.ids == "vocab":
        ids_L = fitted.vocabulary[role.name].look_up(bags.keys_L)
    elif how.ids == "hash":
        ids_L = hash_keys(bags.keys_L, rows=how.rows, seed=how.seed)
    else:
        ids_L = bags.keys_L.view(np.int64)
        if how.ids == "as_is":
            check_range(bags, role, rows)
    if bags.offsets is None:
        if bags.present_N is not None:
            ids_L = np.where(bags.present_N, ids_L, 0)
        return Ids(ids_L, bags.present_N, None)
    if empty or bags.present_N.all():
        return Ids(ids_L, bags.present_N, bags.offsets)
    # Every bag without a value gets one reserved id.
    lengths_N = np.where(bags.present_N, np.diff(bags.offsets), 1)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    with_reserved_L = np.zeros(offsets[-1], np.int64)
    with_reserved_L[np.repeat(bags.present_N, lengths_N)] = ids_L
    return Ids(with_reserved_L, bags.present_N, offsets)


def check_range(bags: Bags, role: Role, rows: Rows) -> None:
    """UserError naming file, column and row where an as_is id is negative or not below the rows that the spec gives."""
    ids_L = bags.keys_L.view(np.int64)
    wrong = ids_L < 0
    if role.how.rows is not None:
        wrong |= ids_L >= role.how.rows
    if bags.offsets is None and bags.present_N is not None:
        wrong &= bags.present_N
    if not wrong.any():
        return
    at = int(np.flatnonzero(wrong)[0])
    row = at if bags.offsets is None else int(np.searchsorted(bags.offsets, at, side="right")) - 1
    rule, out = "must not be negative", ""
    if role.how.rows is not None:
        rule, out = f"lie in 0..{role.how.rows - 1}", "raise rows in the spec, or "
    raise UserError(
        f"{rows.block.place(int(rows.row[row]))}: column {role.column!r}: id {int(ids_L[at])}: ids taken as they are "
        f"{rule}; {out}use ids = 'vocab', 'hash' or 'hash64'"
    )


def leave_out_beyond(bags: Bags, largest: int) -> tuple[Bags, np.ndarray]:
    """The bags without keys above `largest`, and whether a key (bool L) was one: a model has no row for such an id."""
    beyond_L = bags.keys_L.view(np.int64) > largest
    if bags.offsets is None:
        if bags.present_N is not None:
            beyond_L &= bags.present_N
        present_N = ~beyond_L if bags.present_N is None else bags.present_N & ~beyond_L
        return replace(bags, present_N=present_N), beyond_L
    kept = np.concatenate([[0], np.cumsum(~beyond_L)])
    return replace(bags, keys_L=bags.keys_L[~beyond_L], offsets=kept[bags.offsets]), beyond_L


@dataclass(frozen=True)
class Ids:
    """Numbered ids of one feature in N rows; as `Bags`, with ids where keys were."""

    ids_L: np.ndarray  # int64
    present_N: np.ndarray | None
    offsets: np.ndarray | None

    def column(self, size: int, *, empty: bool) -> pa.Array:
        """The column as it is written; size is the cardinality, empty: missing bags are null."""
        kind = id_type(size, multi_hot=self.offsets is not None)
        if self.offsets is None:
            width = np.int64 if kind == pa.int64() else np.int32
            mask = ~self.present_N if empty and self.present_N is not None else None
            return pa.array(self.ids_L.astype(width), mask=mask)
        width = np.int64 if kind.value_type == pa.int64() else np.int32
        mask = pa.array(~self.present_N) if empty and not self.present_N.all() else None
        offsets = pa.array(self.offsets.astype(np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(self.ids_L.astype(width)), type=kind, mask=mask)

    def of_rows(self, keep_N: np.ndarray, *, empty: bool) -> tuple[np.ndarray, int, int]:
        """(ids of these rows, how many bags have no value, ids of the longest bag)."""
        missing = 0 if self.present_N is None else int((~self.present_N & keep_N).sum())
        if self.offsets is None:
            kept_N = keep_N if not empty or self.present_N is None else keep_N & self.present_N
            ids_L = self.ids_L[kept_N]
            return ids_L, missing, int(len(ids_L) > 0)
        lengths_N = np.diff(self.offsets)
        longest = int(lengths_N[keep_N].max(initial=0))
        return self.ids_L[np.repeat(keep_N, lengths_N)], missing, longest
