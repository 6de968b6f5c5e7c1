"""Tensors <-> verified pieces of files.

Writing hashes every piece just before it goes out, reading just after it came in: xxh3 takes 24 GB/s of a core, a disk
1 to 3, so neither is slowed much and nothing is used that is not what was written.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainer import pulse
from trainer.checkpoint.manifest import Chunk, Damaged, Entry, Manifest
from trainer.checkpoint.place import Place

PIECE_BYTES = 4 << 20  # hashed, read and verified at once; small enough to stay in a cache between the two
READERS = 4  # threads of a rank that read


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def piece_rows_of(size: tuple[int, ...], itemsize: int) -> int:
    """Rows of a piece: as many as fit PIECE_BYTES, at least one."""
    row = math.prod(size[1:]) * itemsize
    return max(1, PIECE_BYTES // max(1, row))


def write_tensor(out: Any, tensor: Tensor) -> tuple[int, list[str]]:
    """Write a contiguous CPU tensor to the stream; (piece_rows, hashes)."""
    size = tuple(tensor.shape)
    rows = piece_rows_of(size, tensor.element_size())
    step = rows * math.prod(size[1:]) * tensor.element_size()
    data = bytes_of(tensor)
    hashes = []
    for start in range(0, len(data), max(1, step)):
        piece = data[start : start + step]
        hashes.append(xxhash.xxh3_128_hexdigest(piece))
        out.write(piece)
        pulse.touch("save")
    return rows, hashes


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop-1 of a chunk, which one hash covers."""

    chunk: Chunk
    number: int
    start: int
    stop: int


class Files:
    """The tensors of one checkpoint, read with every byte verified."""

    def __init__(self, place: Place, name: str, manifest: Manifest) -> None:
        self.place, self.name, self.manifest = place, name, manifest

    def read(self, tensor: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows [first, end), on the CPU.  Raises Damaged."""
        entry = self.manifest.tensors[tensor]
        if not entry.size:
            out = torch.empty((), dtype=entry.torch_dtype)
            for chunk in entry.chunks:
                self.read_box(tensor, chunk, (), (), out)
            return out
        first, end = rows or (0, entry.size[0])
        out = torch.empty((end - first, *entry.size[1:]), dtype=entry.torch_dtype)
        for chunk in entry.chunks:
            low, high = max(first, chunk.offset[0]), min(end, chunk.offset[0] + chunk.size[0])
            if low >= high or not all(chunk.size):
                continue
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offset[1:], chunk.size[1:], strict=True))
            start = (low - chunk.offset[0], *(0 for _ in box))
            size = (high - low, *chunk.size[1:])
            self.read_box(tensor, chunk, start, size, out[(slice(low - first, high - first), *box)])
        return out

    def read_box(self, tensor: str, chunk: Chunk, start: tuple[int, ...], size: tuple[int, ...], into: Tensor) -> None:
        """The box of a chunk that begins at `start` (relative to the chunk) -> `into`, of shape `size`."""
        entry = self.manifest.tensors[tensor]
        first = start[0] if start else 0
        end = first + size[0] if size else 1
        columns = tuple(slice(a, a + n) for a, n in zip(start[1:], size[1:], strict=True))
        direct = into.is_contiguous() and into.device.type == "cpu" and tuple(chunk.size[1:]) == tuple(size[1:])
        for piece in self._pieces(entry, chunk, first, end):
            low, high = max(piece.start, first), min(piece.stop, end)
            if direct and (low, high) == (piece.start, piece.stop):
                target = into[low - first : high - first] if size else into
                self._fill(tensor, entry, piece, bytes_of(target))
                continue
            whole = torch.empty((piece.stop - piece.start, *chunk.size[1:]), dtype=entry.torch_dtype)
            self._fill(tensor, entry, piece, bytes_of(whole))
            wanted = whole[low - piece.start : high - piece.start]
            if size:
                into[low - first : high - first].copy_(wanted[(slice(None), *columns)])
            else:
                into.copy_(wanted.view(()))

    def check(self, chunk: Chunk, entry: Entry, tensor: str, buffer: memoryview | None = None) -> None:
        """Read a chunk to verify it.  Raises Damaged."""
        rows = chunk.rows
        row = entry.bytes_of(chunk) // rows if rows else 0
        buffer = buffer or memoryview(bytearray(min(rows, chunk.piece_rows) * row))
        for piece in self._pieces(entry, chunk, 0, rows):
            self._fill(tensor, entry, piece, buffer[: (piece.stop - piece.start) * row])

    def _pieces(self, entry: Entry, chunk: Chunk, first: int, end: int) -> Iterator[Piece]:
        if not entry.bytes_of(chunk):
            return
        for number in range(first // chunk.piece_rows, -(-end // chunk.piece_rows)):
            start = number * chunk.piece_rows
            yield Piece(chunk, number, start, min(start + chunk.piece_rows, chunk.rows))

    def _fill(self, tensor: str, entry: Entry, piece: Piece, into: memoryview) -> None:
        chunk = piece.chunk
        row = entry.bytes_of(chunk) // chunk.rows
        path = self.place.path(self.name, chunk.file)
        at = chunk.at + piece.start * row
        what = f"{tensor} rows {_rows(piece)}"
        if entry.table is not None:
            what = f"table {entry.table!r} ({tensor.rpartition('/')[2]}), rows {_rows(piece)}"
        try:
            self.place.read_into(self.name, chunk.file, at, into)
        except OSError as error:
            reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise Damaged(f"{path}: {what}: {reason}", file=chunk.file, table=entry.table) from error
        pulse.touch("building")
        if xxhash.xxh3_128_hexdigest(into) != chunk.hashes[piece.number]:
            raise Damaged(
                f"{path}: {what}: bytes {at} to {at + len(into) - 1} are not what was written (their hash differs)",
                file=chunk.file,
                table=entry.table,
            )


def _rows(piece: Piece) -> str:
    base = piece.chunk.offset[0] if piece.chunk.offset else 0
    return f"{base + piece.start} to {base + piece.stop - 1}"


def verify(place: Place, name: str, manifest: Manifest) -> list[Damaged]:
    """Every damage of a checkpoint's files, which are all read and hashed again; also files that it does not know."""
    found: list[Damaged] = []
    sizes = place.sizes(name)
    files = Files(place, name, manifest)
    for file, size in manifest.files.items():
        if file in sizes and sizes[file] > size:
            path = place.path(name, file)
            found.append(Damaged(f"{path}: {sizes[file]} bytes, {size} were written", file=file))
    for file in sorted(set(sizes) - set(manifest.files) - {"manifest.json"}):
        found.append(Damaged(f"{place.path(name, file)}: not a file of this checkpoint", file=file))

    def check(work: tuple[str, Entry, Chunk]) -> Damaged | None:
        try:
            files.check(work[2], work[1], work[0])
        except Damaged as damage:
            return damage
        return None

    chunks = [(tensor, entry, chunk) for tensor, entry in manifest.tensors.items() for chunk in entry.chunks]
    with ThreadPoolExecutor(READERS) as pool:
        found += [damage for damage in pool.map(check, chunks) if damage is not None]
    return found
