"""A checkpoint as a whole: a full one, or a full one and the deltas since.

    chain = open_chain(place, "step_60")      step_40 (full) <- step_50 (delta) <- step_60 (delta)
    chain.read("tables/user/weight")          the tensor as it was at step 60
    chain.load(parts)                         into a run, on all ranks together

A delta's rows replace those of what it is a delta to.  All else is whole in every delta, and the newest counts.

Shapes: U rows of a delta, E rows of a table, D columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.files import Files
from trainer.checkpoint.manifest import MANIFEST, Damaged, Entry, Manifest
from trainer.checkpoint.place import Place
from trainer.checkpoint.storage import Part, read_into

LAZY_BYTES = 64 << 20  # of a box that is rewritten at once


@dataclass(frozen=True)
class Rows:
    """The rows of one part of a table in one delta: columns `column` .. `column + columns` - 1.

    size: how many rows the part has, where that may have grown since the full checkpoint (by_id.py).
    """

    files: Files
    prefix: str  # tables/TABLE/delta:ROW-COLUMN, or BASE/delta:0-0:SIZE
    column: int
    columns: int
    size: int | None


class Chain:
    def __init__(self, members: Sequence[Files]) -> None:
        """members: the full checkpoint, then its deltas, oldest first."""
        self.members = tuple(members)
        self._home = {name: i for i, files in enumerate(members) for name in files.manifest.tensors if not _delta(name)}
        self._rows: list[dict[str, list[Rows]]] = [_rows_by_base(files) for files in members]

    @property
    def manifest(self) -> Manifest:
        return self.members[-1].manifest

    @property
    def name(self) -> str:
        return self.members[-1].name

    @property
    def path(self) -> str:
        return self.members[-1].place.path(self.name)

    @property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor of the whole, by name."""
        return {name: self._entry(name) for name in sorted(self._home)}

    def _entry(self, name: str) -> Entry:
        home = self._home[name]
        entry = self.members[home].manifest.tensors[name]
        for of_base in self._rows[home + 1 :] if entry.table is not None else ():
            for rows in of_base.get(_base(name), ()):
                entry = entry if rows.size is None else replace(entry, size=(rows.size, *entry.size[1:]))
        return entry

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows [first, end), on the CPU.  Raises Damaged."""
        entry, home = self._entry(name), self.members[self._home[name]]
        stored = home.manifest.tensors[name].size
        if entry.size == stored:
            found = home.read(name, rows=rows)
        else:  # the rows since are all in the deltas
            first, end = rows or (0, entry.size[0])
            found = torch.zeros((end - first, *entry.size[1:]), dtype=entry.torch_dtype)
            if first < stored[0]:
                there = home.read(name, rows=(first, min(end, stored[0])))
                found[: len(there)] = there
        offset = (rows[0] if rows else 0, *(0 for _ in entry.size[1:]))
        self._apply(Part(name=name, size=entry.size, offset=offset, tensor=found, table=entry.table))
        return found

    def load(self, parts: Sequence[Part]) -> None:
        """Fill the parts in place; all ranks together.  Raises Damaged, or UserError for parts that are not there."""
        homes = {part.name: self._home.get(part.name, 0) for part in parts}
        for i, files in enumerate(self.members):  # every rank takes every turn: they are collective
            read_into([part for part in parts if homes[part.name] == i], files)
        for part in parts:
            self._apply(part)

    def lazy_parts(self, *, share: tuple[int, int] = (0, 1)) -> list[Part]:
        """Everything as boxes of at most LAZY_BYTES that are read when they are written: number k of n ranks' share."""
        parts = []
        for name, entry in self.tensors.items():
            for first, end in steps(entry) if entry.size else ((0, 1),):
                shape = (end - first, *entry.size[1:]) if entry.size else ()
                parts.append(
                    Part(
                        name=name,
                        size=entry.size,
                        offset=(first, *(0 for _ in entry.size[1:])) if entry.size else (),
                        tensor=torch.empty(shape, dtype=entry.torch_dtype, device="meta"),
                        table=entry.table,
                        make=_reader(self, name, (first, end) if entry.size else None),
                    )
                )
        sizes = [0] * share[1]
        mine = []
        for part in sorted(parts, key=lambda part: (-part.nbytes, part.name, part.offset)):
            least = sizes.index(min(sizes))
            sizes[least] += part.nbytes + 1
            if least == share[0]:
                mine.append(part)
        return mine

    def _apply(self, part: Part) -> None:
        """Put the rows of the later deltas that lie in the part's box into it, oldest first."""
        if part.table is None or not part.size:
            return
        first, count = part.offset[0], part.tensor.shape[0]
        what, _, columns = part.name.rpartition("/")[2].partition(":")
        for of_base in self._rows[self._home[part.name] + 1 :]:
            for rows in of_base.get(_base(part.name), ()):
                if columns and columns != f"{rows.column}-{rows.column + rows.columns}":
                    continue
                if f"{rows.prefix}/{what}" not in rows.files.manifest.tensors:
                    continue  # of a table that is cut by columns, only the first part has what is not of a column
                rows_U = rows.files.read(f"{rows.prefix}/rows")
                inside_U = (rows_U >= first) & (rows_U < first + count)
                if not bool(inside_U.any()):
                    continue
                into_U = (rows_U[inside_U] - first).to(part.tensor.device)
                values = rows.files.read(f"{rows.prefix}/{what}")[inside_U].to(part.tensor.device)
                if part.tensor.dim() == 1:
                    part.tensor[into_U] = values
                    continue
                start, end = part.offset[1], part.offset[1] + part.tensor.shape[1]
                low, high = max(start, rows.column), min(end, rows.column + rows.columns)
                if low < high:
                    part.tensor[into_U, low - start : high - start] = values[:, low - rows.column : high - rows.column]


def steps(entry: Entry) -> Iterator[tuple[int, int]]:
    """Rows [first, end) of a tensor, LAZY_BYTES at a time."""
    step = max(1, LAZY_BYTES // max(1, entry.row_bytes))
    for first in range(0, entry.size[0], step):
        yield first, min(first + step, entry.size[0])


def _reader(chain: Chain, name: str, rows: tuple[int, int] | None) -> Callable[[], Tensor]:
    return lambda: chain.read(name, rows=rows)


def _delta(name: str) -> bool:
    return "/delta:" in name


def _base(name: str) -> str:
    """What a tensor and the rows of it in deltas have in common: tables/TABLE, or tables/TABLE/parts:P0-P1."""
    return name.partition("/delta:")[0] if _delta(name) else name.rpartition("/")[0]


def _rows_by_base(files: Files) -> dict[str, list[Rows]]:
    found: dict[str, list[Rows]] = {}
    for name, entry in files.manifest.tensors.items():
        if _delta(name) and name.endswith("/weight"):
            prefix = name.removesuffix("/weight")
            column, _, size = prefix.rpartition("-")[2].partition(":")
            rows = Rows(files, prefix, int(column), entry.size[1], int(size) if size else None)
            found.setdefault(_base(name), []).append(rows)
    return found


def members(place: Place, name: str) -> Iterator[tuple[str, Manifest]]:
    """(name, manifest) of a checkpoint, of what it is a delta to, and so on to the full one.  Raises Damaged."""
    wanted: str | None = None
    while True:
        manifest = manifests.read(place, name)
        if wanted is not None and manifest.id != wanted:
            raise Damaged(
                f"{place.path(name)}: is not the checkpoint that the deltas after it belong to", file=MANIFEST
            )
        yield name, manifest
        if manifest.parent is None:
            return
        child, name, wanted = name, manifest.parent["name"], manifest.parent["id"]
        if not place.sizes(name):
            raise Damaged(f"{place.path(child)}: a delta to {name}, which is missing", file=MANIFEST)


def open_chain(place: Place, name: str) -> Chain:
    """Raises Damaged when the manifest of a member is missing, torn or changed."""
    return Chain([Files(place, n, manifest) for n, manifest in members(place, name)][::-1])


def rewrite_bytes(chain: Chain) -> int:
    """What the whole takes as one full checkpoint."""
    return sum(math.prod(entry.size) * entry.torch_dtype.itemsize for entry in chain.tensors.values())
