"""Parquet sources: types that fit, batches, typed columns."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kernels.errors import UserError
from trainer.prepare.blocks import Block, File, Rows, check_names, reading
from trainer.prepare.spec import Role, Roles, Spec, without_labels

BATCH_ROWS = 65536
_READ_AS = {"number": pa.float64(), "integer": pa.int64()}


class ParquetReader:
    """Blocks and typed columns of the Parquet files of one source."""

    def __init__(self, files: list[File], spec: Spec, *, to_predict: bool = False) -> None:
        self.files = files
        columns = _open(files[0]).schema_arrow.names
        check_names(columns, files[0])
        if to_predict:
            spec = without_labels(spec, columns)
        self.roles = Roles.resolve(spec, columns, where=str(files[0].path))
        self._text: dict[str, tuple[bool, File]] = {}  # whether a column is text, and the first file that says so
        self.lists = self._check_types()  # columns that are lists

    def _check_types(self) -> set[str]:
        """Every file has the columns with types that fit; returns the columns that are lists."""
        lists: set[str] = set()
        for i, file in enumerate(self.files):
            schema = _open(file).schema_arrow
            for role in self.roles.all:
                if role.column not in schema.names:
                    raise UserError(f"{file.path}: no column {role.column!r}, which {self.files[0].path} has")
                check_names(schema.names, file)
                kind = schema.field(role.column).type
                listed = is_list(kind)
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
                kind = kind.value_type if listed else kind
                _check_type(file, role, kind)
                self._check_keys(file, role, kind)
        return lists

    def _check_keys(self, file: File, role: Role, kind: pa.DataType) -> None:
        """5 and "5" have different keys, so ids made from both would be two where the user means one."""
        if role.kind != "value" or role.how.ids == "as_is" or pa.types.is_null(kind):
            return
        text, first = self._text.setdefault(role.column, (is_text(kind), file))
        if text != is_text(kind):
            raise UserError(
                f"{file.path}: column {role.column!r} is {kind}, and {'text' if text else 'integers'} in {first.path}; "
                "write it with one type"
            )

    def keys_of(self, role: Role) -> str:
        return "hex" if role.how.hex else "text" if self._text.get(role.column, (False,))[0] else "integer"

    def blocks(self) -> Iterator[Block]:
        """All batches of all files, in order."""
        columns = list(dict.fromkeys(role.column for role in self.roles.all))
        before = 0
        for file in self.files:
            with reading(file):
                parquet = _open(file)
                row, rows = 0, parquet.metadata.num_rows
                if not rows:
                    raise UserError(f"{file.path}: the file has no rows; remove it from the source")
                for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                    done = before + int(file.bytes * (row + len(batch)) / rows)
                    yield Block(file, row, None, pa.Table.from_batches([batch]), done)
                    row += len(batch)
            before += file.bytes

    def parse(self, block: Block) -> Rows:
        """Typed columns of a batch.  Called by several threads."""
        columns = {}
        for role in self.roles.all:
            if (role.column, role.kind) in columns:
                continue
            array = block.table.column(role.column).chunk(0)
            columns[role.column, role.kind] = _cast(array, role, block)
        row = block.first_row + np.arange(block.table.num_rows, dtype=np.int64)
        return Rows(block, columns, row, [])


def _open(file: File) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file.path}: not a readable Parquet file: {error}") from error


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(inner)
        or pa.types.is_binary(inner)
        or pa.types.is_large_string(inner)
        or pa.types.is_large_binary(inner)
    )


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
        text = is_text(kind)
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
    if is_list(kind):
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
        raise UserError(
            f"{block.file.path}: column {role.column!r}: {error}; ids = 'vocab' and 'hash' take any integer"
        ) from error
