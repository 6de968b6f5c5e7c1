"""`manifest.json`: what a checkpoint holds.  A checkpoint without a whole manifest does not exist.

    {"format": "tablemesh-checkpoint", "version": 1, "id": text,
     "kind": "full" | "delta", "parent": null | {"name", "id"} of what a delta is to,
     "position": {...}, "config": TOML text, "values": {...},
     "files": {"rank_0.0.bin": bytes, ...},
     "tensors": {name: {"dtype", "size", "table": name or null,
                        "chunks": [{"offset", "size", "file", "at", "piece_rows", "hashes"}]}},
     "hash": xxh3_128 of all the text before this key}

A chunk is a box of the tensor, stored row by row (little-endian) at byte `at` of its file; `hashes` are the xxh3_128 of
its pieces of `piece_rows` rows each, the last one shorter.  The chunks tile the files: no byte is without a hash.

A delta holds everything as a full checkpoint does, but of the tables that are updated in the backward only the rows
that were touched since its parent: tables/TABLE/delta:ROW-COLUMN/rows (U,) and, for the part of the table that begins
at ROW and COLUMN, .../weight (U, columns) and .../STATE.  chain.py reads both together.
"""

import json
import math
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import xxhash

from kernels.errors import UserError
from trainer.checkpoint.place import MANIFEST, Place

COUNTED_SINCE = "counted_since"  # in `values`: the step from which updates of rows are counted, where they are
FORMAT, VERSION = "tablemesh-checkpoint", 1
# The dtypes that a checkpoint may hold, as they are named in it.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}


class Damaged(UserError):
    """A file of a checkpoint is missing, too short, or not what was written.

    file, table: where, as far as it is known.
    """

    def __init__(self, message: str, *, file: str, table: str | None = None) -> None:
        super().__init__(message)
        self.file, self.table, self.message = file, table, message

    def __reduce__(self) -> Any:  # it travels between ranks
        return _damaged, (self.message, self.file, self.table)


def _damaged(message: str, file: str, table: str | None) -> Damaged:
    return Damaged(message, file=file, table=table)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the run a checkpoint was taken, and of what."""

    step: int  # steps done
    epoch: int  # of the next step
    samples: int
    world_size: int
    config_sha256: str
    data_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    at: int
    piece_rows: int
    hashes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.size[0] if self.size else 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor."""

    dtype: str
    size: tuple[int, ...]
    table: str | None
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Of a row of the whole tensor."""
        return math.prod(self.size[1:]) * self.torch_dtype.itemsize

    def bytes_of(self, chunk: Chunk) -> int:
        return math.prod(chunk.size) * self.torch_dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Manifest:
    position: Position
    config: str
    values: dict[str, Any]
    files: dict[str, int]
    tensors: dict[str, Entry]
    kind: str = "full"
    parent: dict[str, str] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # stays when a delta is made full (compacted)
    hash: str = field(default="", compare=False)

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def to_bytes(self) -> bytes:
        found = asdict(self)
        del found["hash"]
        text = json.dumps({"format": FORMAT, "version": VERSION, **found}, separators=(",", ":"))
        return _sealed(text[:-1].encode())


def _sealed(body: bytes) -> bytes:
    return body + b',"hash":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n'


_TAIL = len(_sealed(b""))


def read(place: Place, name: str) -> Manifest:
    """The manifest of a checkpoint.  Raises Damaged when it is missing, torn or changed."""
    path = place.path(name, MANIFEST)
    try:
        data = place.read(name, MANIFEST)
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror or error}", file=MANIFEST) from error
    if len(data) <= _TAIL or _sealed(data[:-_TAIL]) != data:
        raise Damaged(f"{path}: it was cut short or changed since it was written (its own hash differs)", file=MANIFEST)
    found = json.loads(data)
    if found.pop("format") != FORMAT or found["version"] > VERSION:
        raise UserError(f"{path}: version {found['version']}, this tablemesh reads up to {VERSION}; upgrade tablemesh")
    del found["version"]
    try:
        tensors = {name: _entry(entry) for name, entry in found.pop("tensors").items()}
        return Manifest(**found | {"tensors": tensors, "position": Position(**found["position"])})
    except (TypeError, KeyError) as error:  # whole, as its hash is right
        raise UserError(f"{path}: of another tablemesh, which wrote other keys ({error}); read it with that") from error


def _entry(found: dict[str, Any]) -> Entry:
    chunks = tuple(Chunk(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in found["chunks"])
    return Entry(dtype=found["dtype"], size=tuple(found["size"]), table=found["table"], chunks=chunks)
