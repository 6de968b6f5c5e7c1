"""A source: all its files, which are read as text or as Parquet."""

from collections.abc import Iterator
from typing import Protocol

from kernels.errors import UserError
from trainer.prepare.blocks import Block, File, Rows
from trainer.prepare.parquet import ParquetReader
from trainer.prepare.spec import Role, Roles, Spec
from trainer.prepare.text import TextReader


class Reader(Protocol):
    """What a pass over a source needs; iterated anew by each.

    files: in order.  roles: the spec matched against their columns.  lists: the columns that hold lists.
    blocks: all of the files in pieces, in order.  parse: the typed columns of a piece, called by several threads; lines
    that cannot be read are among the rejects of its `Rows`.  Both raise UserError naming the file.
    keys_of: what the keys of a vocabulary or hash of this column are made from: "integer", "text" or "hex".
    """

    files: list[File]
    roles: Roles
    lists: set[str]

    def blocks(self) -> Iterator[Block]: ...

    def parse(self, block: Block) -> Rows: ...

    def keys_of(self, role: Role) -> str: ...


def open_source(files: list[File], spec: Spec, *, block_bytes: int, to_predict: bool = False) -> Reader:
    """The reader of these files; UserError where their columns or types do not fit the spec.

    to_predict: the labels may be missing from the files, all of them, and then the weight and the time too.
    """
    for file in files:
        if file.format != files[0].format:
            raise UserError(f"{file.path}: text and Parquet files ({files[0].path}) do not mix in one source")
    if files[0].format == "parquet":
        return ParquetReader(files, spec, to_predict=to_predict)
    return TextReader(files, spec, block_bytes=block_bytes, to_predict=to_predict)
