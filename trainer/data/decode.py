"""One Parquet row group -> checked columns: types, missing values, ids out of range, numbers that are not finite.

Everything works on whole columns; a single row is looked at only to name it in an error.

Ids outside a table (negative, or >= its rows) go by the feature's policy:
    error   UserError that names the id and where it is
    clip    below 0 becomes 0, above becomes rows-1
    hash    the id, widened to 64 bits, goes through `order.hash64` and is taken modulo rows; ids inside stay as they
            are, so a file with int32 and one with int64 ids give the same

Letters in shapes: n rows, K dense inputs, T labels, N ids.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from kernels.errors import UserError
from kernels.registry import nearest
from trainer.data import compiled
from trainer.data.base import ANY_NONE, Bags, Columns
from trainer.data.compiled import u64
from trainer.data.order import MASK64, hash64

IdPolicy = Literal["error", "clip", "hash"]
ID_POLICIES = ("error", "clip", "hash")
INFINITY = 0x7F800000  # the bits of float32's infinity; what is above them is a NaN
ONE = 0x3F800000  # the bits of 1; those of what is in [0, 1] are no higher, but for -0


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What reading needs to know of a categorical column.

    rows: of the table it looks up in; ids are 0 .. rows-1.
    table: its table's name, for errors.
    multi_hot: True: a list column; False: one id or a null; None: either, for `check_schema` only.
    """

    name: str
    rows: int
    table: str
    policy: IdPolicy = "error"
    multi_hot: bool | None = None

    @property
    def any_id(self) -> bool:
        """Whether its ids are any 64 bits but `ANY_NONE`."""
        return self.rows > 1 << 63


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The columns that are read, in the batch's order.

    labelled: whether the files have labels; what stands for missing ones is 0.
    any_label: let labels outside [0, 1] through.
    """

    labels: tuple[str, ...]
    dense: tuple[str, ...]
    features: tuple[Feature, ...]
    weight: str | None = None
    labelled: bool = True
    any_label: bool = False

    @property
    def wide(self) -> bool:
        """Whether an id may exceed int32."""
        return any(f.rows > 1 << 31 for f in self.features)

    @property
    def columns(self) -> list[str]:
        weight = [self.weight] if self.weight else []
        labels = self.labels if self.labelled else ()
        return [*labels, *self.dense, *(f.name for f in self.features), *weight]


def is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind)


def check_schema(schema: pa.Schema, spec: Spec, where: str) -> None:
    """UserError naming `where` (a file), column, found and expected type unless every column can be used."""
    multi_hot = {f.name: f.multi_hot for f in spec.features}
    for name in spec.columns:
        at = schema.get_all_field_indices(name)
        if len(at) != 1:
            others = [n for n in schema.names if n != name]
            found = "is not there" if not at else f"is there {len(at)} times"
            raise UserError(f"{where}: column {name!r} {found}; {nearest(name, others)}")
        kind = schema.field(at[0]).type
        if name in multi_hot:
            single, many = pt.is_integer(kind), is_list(kind) and pt.is_integer(kind.value_type)
            fits, expected = {
                True: (many, "a list of integers"),
                False: (single, "integers"),
                None: (single or many, "integers or a list of them"),
            }[multi_hot[name]]
        else:
            fits = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind)
            expected = "numbers"
        if not fits:
            raise UserError(
                f"{where}: column {name!r} has type {kind}, expected {expected}; "
                "convert the column, or let `tablemesh prepare` make a dataset of the files"
            )


def decode(table: pa.Table, spec: Spec, where: str) -> Columns:
    """Check the columns of one row group: views of the table's memory where types allow it.

    where: file and row group, for errors.
    """
    labels = spec.labels if spec.labelled else ()
    names = (*spec.dense, *labels, *((spec.weight,) if spec.weight is not None else ()))
    column_of = dict(zip(table.column_names, _arrays(table), strict=True))
    arrays = [column_of[feature.name] for feature in spec.features]
    dtype = np.dtype(np.int64 if spec.wide else np.int32)
    kind = pa.from_numpy_dtype(dtype)
    plain = [array.type == kind and not array.null_count for array in arrays]
    columns = Columns(  # as they are, to look at all of them at once
        numbers=_numbers([column_of[name] for name in names]),
        ids=[np.asarray(array) if good else _NOT_YET for array, good in zip(arrays, plain, strict=True)],
        holes=[array.null_count > 0 and not f.multi_hot for array, f in zip(arrays, spec.features, strict=True)],
    )
    _check_numbers(columns, [column_of[name] for name in names], names, where)
    if not spec.any_label:
        _check_labels(columns, labels, len(spec.dense), where)
    if spec.weight is not None and columns.numbers[-1].min(initial=0) < 0:
        row = int(np.argmax(columns.numbers[-1] < 0))
        raise UserError(
            f"{where}, row {row}: weight {spec.weight!r} is {columns.numbers[-1][row]:g}; weights must be at least 0"
        )
    good = np.flatnonzero(plain)
    highest = _highest(
        columns.addresses[1][good], len(table), np.uint64(MASK64) if spec.wide else np.uint32(0xFFFFFFFF)
    )
    inside = {
        f
        for f, most in zip(good.tolist(), highest.tolist(), strict=True)
        if most < spec.features[f].rows and not spec.features[f].any_id
    }
    if len(inside) == len(arrays) and spec.labelled:
        return columns
    numbers = columns.numbers
    if not spec.labelled:
        numbers[len(spec.dense) : len(spec.dense)] = [np.zeros(len(table), np.float32)] * len(spec.labels)
    ids = [
        column if f in inside else _ids(array, feature, where, dtype)
        for f, (column, array, feature) in enumerate(zip(columns.ids, arrays, spec.features, strict=True))
    ]
    return Columns(numbers=numbers, ids=ids, holes=columns.holes)


_NOT_YET = Bags(np.empty(0, np.int32), np.zeros(1, np.int64))  # for ids that need more than a look


def _arrays(table: pa.Table) -> list[pa.Array]:
    """Its columns, each in one piece."""
    batches = table.to_batches()  # as many as there are pieces: one in a row group of Parquet, but for very long texts
    if len(batches) == 1:
        return batches[0].columns
    return [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns]


def _numbers(arrays: list[pa.Array]) -> list[np.ndarray]:
    """(n,) float32 each; what is missing is NaN."""
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, which is not let through
        return [np.asarray(array).astype(np.float32, copy=False) for array in arrays]


def _check_numbers(columns: Columns, arrays: list[pa.Array], names: tuple[str, ...], where: str) -> None:
    """UserError unless all are finite."""
    # A null becomes a NaN in what pyarrow gives to numpy, so nothing else need be looked at.
    rows = len(columns.numbers[0]) if columns.numbers else 0
    finite = _highest(columns.addresses[0], rows, np.uint32(0x7FFFFFFF)) < INFINITY
    if not finite.all():
        column = int(np.argmin(finite))
        raise _unusable(arrays[column], columns.numbers[column], names[column], where)


def _check_labels(columns: Columns, labels: tuple[str, ...], first: int, where: str) -> None:
    """UserError unless all are in [0, 1].  first: place of the first label's column among the numbers."""
    rows = len(columns.numbers[first]) if labels else 0
    highest = _highest(columns.addresses[0][first : first + len(labels)], rows, np.uint32(0xFFFFFFFF))
    for t in np.flatnonzero(highest > ONE).tolist():
        values = columns.numbers[first + t]
        outside = (values < 0) | (values > 1)
        if outside.any():  # else it is a -0
            row = int(np.argmax(outside))
            raise UserError(
                f"{where}, row {row}: label {labels[t]!r} is {values[row]:g} ({int(outside.sum())} such rows here); "
                "loss and metrics need labels from 0 for no to 1 for yes: let `tablemesh prepare` make a dataset with "
                "a threshold on the column (a label's `at_least` or `above` in its spec), or scale it"
            )


def _unusable(array: pa.Array, values: np.ndarray, name: str, where: str) -> UserError:
    if array.null_count:
        row = int(np.argmax(np.asarray(array.is_null())))
        return UserError(
            f"{where}, row {row}: column {name!r} has no value here ({array.null_count} such rows here); "
            "fill missing values, or let `tablemesh prepare` do it"
        )
    bad = ~np.isfinite(values)
    row = int(np.argmax(bad))
    return UserError(
        f"{where}, row {row}: column {name!r} is {array[row].as_py()} ({int(bad.sum())} such rows here); "
        "every value must be a finite float32: fill or drop such rows, or let `tablemesh prepare` do it"
    )


def _highest(address_C: np.ndarray, rows: int, mask: np.uint32 | np.uint64) -> np.ndarray:
    out = np.empty(len(address_C), mask.dtype)
    compiled.highest(address_C, u64(rows), mask, out)
    return out


def _ids(array: pa.Array, feature: Feature, where: str, dtype: np.dtype) -> np.ndarray | Bags:
    if not feature.multi_hot:
        if not array.null_count:
            return _in_range(np.asarray(array), None, feature, where).astype(dtype, copy=False)
        missing = np.asarray(array.is_null())
        ids = _in_range(np.asarray(array.fill_null(0)), None, feature, where)
        return np.where(missing, dtype.type(ANY_NONE if feature.any_id else -1), ids.astype(dtype, copy=False))
    # A null list takes no room in what Parquet's reader returns, so a null is an empty bag without further ado.
    offsets, ids = np.asarray(array.offsets), array.values
    if ids.null_count:  # a missing id inside a bag is dropped
        offsets = _running_count(np.asarray(ids.is_valid()))[offsets]
        ids = ids.drop_null()
    return Bags(
        _in_range(np.asarray(ids), offsets, feature, where).astype(dtype, copy=False),
        offsets.astype(np.int64, copy=False),
    )


def _running_count(flags: np.ndarray) -> np.ndarray:
    """How many of `flags` are set before each place, and in all: [1, 0, 1] -> [0, 1, 1, 2]."""
    out = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=out[1:])
    return out


def _in_range(values: np.ndarray, offsets: np.ndarray | None, feature: Feature, where: str) -> np.ndarray:
    """The ids as int32 or int64, the policy applied to those outside the table."""
    given = values
    if values.dtype == np.uint64:
        values = values.view(np.int64)  # those from 2**63 up turn negative, so they are still out of range
    elif values.dtype not in (np.int32, np.int64):
        values = values.astype(np.int64 if values.dtype == np.uint32 else np.int32)
    if feature.any_id:
        if len(values) and int(values.min()) == ANY_NONE:
            raise UserError(
                f"{where}: feature {feature.name!r} has the id {given[int(np.argmin(values))]}, the one of 2**64 that "
                "stands for none; give another number for it"
            )
        return values
    # Seen as unsigned, a negative id is above every table: one pass finds both ends.
    if not len(values) or int(values.view(f"u{values.itemsize}").max()) < feature.rows:
        return values
    if feature.policy == "clip":
        highest = min(feature.rows - 1, np.iinfo(values.dtype).max)
        if given.dtype == np.uint64:
            return np.minimum(given, np.uint64(highest)).view(np.int64)
        return np.clip(values, 0, highest)
    outside = (values < 0) | (values >= feature.rows)
    if feature.policy == "hash":
        wide = values.astype(np.int64)
        wide[outside] = hash64(wide[outside].view(np.uint64)) % np.uint64(feature.rows)
        return wide
    at = int(np.argmax(outside))
    row = at if offsets is None else int(np.searchsorted(offsets, at, side="right")) - 1
    # More rows help with ids that are too large, not with negative ones.
    largest = int(given.max())
    more_rows = f"set rows = {largest + 1} for the table, or " if largest >= feature.rows else "set "
    raise UserError(
        f"{where}, row {row}: feature {feature.name!r} has id {given[at]}, but its table {feature.table!r} has "
        f"{feature.rows} rows (ids 0 .. {feature.rows - 1}; {int(outside.sum())} ids in this row group are outside); "
        f'{more_rows}id_policy = "clip" or "hash", or prepare the data again'
    )
