"""One Parquet row group -> `Columns`: types, missing values, ids out of range, numbers that are not finite.

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
from trainer.data.base import Columns, Ids
from trainer.data.memory import Pool
from trainer.data.order import hash64

IdPolicy = Literal["error", "clip", "hash"]
ID_POLICIES = ("error", "clip", "hash")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What reading needs to know of a categorical column.

    rows: of the table it looks up in; ids are 0 .. rows-1.
    table: its table's name, for errors.
    multi_hot: True: a list column; False: one id or a null; None: either.
    """

    name: str
    rows: int
    table: str
    policy: IdPolicy = "error"
    multi_hot: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The columns that are read, in the batch's order."""

    labels: tuple[str, ...]
    dense: tuple[str, ...]
    features: tuple[Feature, ...]
    weight: str | None = None

    @property
    def columns(self) -> list[str]:
        weight = [self.weight] if self.weight else []
        return [*self.labels, *self.dense, *(f.name for f in self.features), *weight]


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


def decode(table: pa.Table, spec: Spec, where: str, pool: Pool) -> Columns:
    """The rows of one row group, copied out of the table so that Arrow can use its memory again at once.

    where: file and row group, for errors.
    """
    n = table.num_rows
    dense_nK = pool.array((n, len(spec.dense)), np.float32)
    for k, name in enumerate(spec.dense):
        dense_nK[:, k] = _numbers(table, name, where)
    labels_nT = pool.array((n, len(spec.labels)), np.float32)
    for t, name in enumerate(spec.labels):
        labels_nT[:, t] = _numbers(table, name, where)
    weight_n = None
    if spec.weight is not None:
        weight_n = pool.copy(_numbers(table, spec.weight, where))
        if n and weight_n.min() < 0:
            row = int(np.argmax(weight_n < 0))
            raise UserError(
                f"{where}, row {row}: weight {spec.weight!r} is {weight_n[row]:g}; weights must be at least 0"
            )
    ids = tuple(_ids(table, feature, where, pool) for feature in spec.features)
    return Columns(rows=n, ids=ids, dense_nK=dense_nK, labels_nT=labels_nT, weight_n=weight_n)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(table: pa.Table, name: str, where: str) -> np.ndarray:
    """(n,) float32, finite."""
    array = _array(table, name)
    if array.null_count:
        row = int(np.argmax(np.asarray(array.is_null())))
        raise UserError(
            f"{where}, row {row}: column {name!r} has no value here ({array.null_count} such rows here); "
            "fill missing values, or let `tablemesh prepare` do it"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, which is reported below
        values = np.asarray(array).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        bad = ~np.isfinite(values)
        row = int(np.argmax(bad))
        raise UserError(
            f"{where}, row {row}: column {name!r} is {array[row].as_py()} ({int(bad.sum())} such rows here); "
            "every value must be a finite float32: fill or drop such rows, or let `tablemesh prepare` do it"
        )
    return values


def _ids(table: pa.Table, feature: Feature, where: str, pool: Pool) -> Ids:
    array = _array(table, feature.name)
    offsets = None
    if is_list(array.type):
        # A null list takes no room in what Parquet's reader returns, so a null is an empty bag without further ado.
        offsets = np.asarray(array.offsets)
        array = array.values[offsets[0] : offsets[-1]] if len(offsets) else array.values
        offsets = offsets - offsets[0] if len(offsets) and offsets[0] else offsets
        if array.null_count:  # a missing id inside a bag is dropped
            offsets = _running_count(np.asarray(array.is_valid()))[offsets]
            array = array.drop_null()
    elif array.null_count:
        offsets = _running_count(np.asarray(array.is_valid()))
        array = array.drop_null()
    values = _in_range(np.asarray(array), offsets, feature, where)
    return Ids(pool.copy(values), None if offsets is None else pool.copy(offsets))


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
    raise UserError(
        f"{where}, row {row}: feature {feature.name!r} has id {given[at]}, but its table {feature.table!r} has "
        f"{feature.rows} rows (ids 0 .. {feature.rows - 1}; {int(outside.sum())} ids in this row group are outside); "
        f"set rows = {max(int(given.max()) + 1, feature.rows)} for the table, "
        'or id_policy = "clip" or "hash", or prepare the data again'
    )
