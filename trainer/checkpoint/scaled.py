"""Tables with rows of int8 in a checkpoint: numbers in tables/T/weight, the rows' scales in tables/T/scale:C0-C1.

    values(chain, "tables/user/weight")        float32, whatever the table is stored in
    fit(parts, chain) -> (parts, merge)        scales where a table is cut by other columns than when it was saved

A part by columns has scales of its own.  Columns that come from several parts get the largest of their scales: numbers
of that part stay as they are, those of the others are rounded to the nearest multiple of it.  Columns of one part keep
its scale, and are what they were bit for bit.

    saved as columns 0-4 with scale 2**-7 and 4-8 with 2**-9; read as 0-8: scale 2**-7, the numbers of 4-8 divided by 4

Shapes: E rows, U rows of a part, D columns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.int8 import dequantise
from sharding.table_state import SCALE, WEIGHT
from trainer.checkpoint.chain import Chain
from trainer.checkpoint.storage import Part


def scales_in(chain: Chain, base: str) -> list[tuple[str, int, int]]:
    """(name, first column, end) of the scales of BASE/weight; none for tables of other dtypes."""
    if f"{base}/{SCALE}" in chain.tensors:  # rows given to ids are whole
        return [(f"{base}/{SCALE}", 0, chain.tensors[f"{base}/{WEIGHT}"].size[1])]
    prefix = f"{base}/{SCALE}:"
    found = [name for name in chain.tensors if name.startswith(prefix)]
    return [(name, *map(int, name.removeprefix(prefix).split("-"))) for name in found]


def values(chain: Chain, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
    """A tensor of the checkpoint, or its rows [first, end); weights of int8 times their scales, in float32.

    Raises Damaged.
    """
    stored = chain.read(name, rows=rows)
    if stored.dtype != torch.int8 or not name.endswith(f"/{WEIGHT}"):
        return stored
    found_ED = torch.empty(stored.shape)
    for scale, first, end in scales_in(chain, name.removesuffix(f"/{WEIGHT}")):
        found_ED[:, first:end] = dequantise(stored[:, first:end], chain.read(scale, rows=rows))
    return found_ED


def fit(parts: Sequence[Part], chain: Chain) -> tuple[list[Part], Callable[[], None]]:
    """What to read instead of scales that are not in the checkpoint under their names, and what to call when all of it
    and the tables' weights are read."""
    tensors = chain.tensors
    weights = {(p.table, p.offset): p.tensor for p in parts if p.table and p.name.endswith(f"/{WEIGHT}")}
    found: list[Part] = []
    read: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    merges: list[tuple[Part, Tensor, list[tuple[int, int, Tensor]]]] = []
    for part in parts:
        if part.table is None or part.name in tensors or not part.name.startswith(f"tables/{part.table}/{SCALE}:"):
            found.append(part)
            continue
        first, end = map(int, part.name.rpartition(":")[2].split("-"))
        sources = []
        for name, a, b in scales_in(chain, f"tables/{part.table}"):
            if max(first, a) >= min(end, b):
                continue
            if (name, part.offset) not in read:
                room = torch.empty_like(part.tensor, device="cpu")
                read[name, part.offset] = room
                found.append(Part(name=name, size=part.size, offset=part.offset, tensor=room, table=part.table))
            sources.append((max(first, a) - first, min(end, b) - first, read[name, part.offset]))
        merges.append((part, weights[part.table, (*part.offset, first)], sources))

    def merge() -> None:
        for part, numbers_UD, sources in merges:
            scale_U = torch.stack([scale_U for *_, scale_U in sources]).amax(0)
            part.tensor.copy_(scale_U)
            for first, end, own_U in sources:
                # Where both are zero, as in rows that were never written, the numbers are too.
                share_U = torch.where(own_U == scale_U, 1.0, own_U / scale_U).to(numbers_UD.device)
                numbers_UD[:, first:end] = (numbers_UD[:, first:end] * share_U[:, None]).round().to(torch.int8)

    return found, merge
