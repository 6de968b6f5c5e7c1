"""A new run that begins with the weights of another, by the names of tables and dense parameters; no optimizer state.

A table with more rows here than there is grown (its new rows keep their initial weights), one with fewer is cut (its
first rows are taken); either must be asked for, as it is a mistake more often than not.
"""

from typing import Literal

import torch
from torch import nn

from kernels.errors import UserError
from kernels.int8 import quantise
from sharding.table_state import SCALE
from trainer.checkpoint import by_id
from trainer.checkpoint.chain import Chain
from trainer.checkpoint.scaled import values
from trainer.checkpoint.state import parts_of
from trainer.checkpoint.storage import Part

Rows = Literal["same", "grow", "cut", "any"]


@torch.no_grad()
def init_from(model: nn.Module, chain: Chain, *, rows: Rows) -> list[str]:
    """Fill what this rank holds of the model; what was left as it is initialised, grown or cut, in words.

    Raises UserError when a table's columns differ, or its rows and `rows` does not allow it; Damaged.
    """
    notes: dict[str, str] = {}
    parts = parts_of(model, None)
    scales = {(p.table, p.offset[0], _first_column(p)): p.tensor for p in parts if is_scale(p)}
    for part in parts:
        if is_scale(part):
            continue  # filled with its weights, which may be of another dtype there
        what = f"table {part.table!r}" if part.table else part.name.removeprefix("dense/")
        entry = chain.tensors.get(part.name)
        if entry is None:
            notes[what] = f"{what} is not in {chain.path} and begins as a new one"
        elif part.table is not None:
            _check(what, part, entry.size, rows, notes)
            first, end = part.offset[0], min(part.offset[0] + part.tensor.shape[0], entry.size[0])
            if first < end:
                columns = slice(part.offset[1], part.offset[1] + part.tensor.shape[1])
                rows_UD = values(chain, part.name, rows=(first, end))[:, columns]
                if part.tensor.dtype == torch.int8:
                    rows_UD, scale_U = quantise(rows_UD.float())
                    scales[part.table, *part.offset][: end - first].copy_(scale_U)
                part.tensor[: end - first].copy_(rows_UD)
        elif entry.size != part.size:
            notes[what] = f"{what} has the size {entry.size} there and {part.size} here, and begins as a new one"
        else:
            part.tensor.copy_(chain.read(part.name))
    for name in by_id.load(model, chain, with_states=False):
        notes[name] = f"table {name!r} has no id map in {chain.path} and begins as a new one"
    return list(notes.values())


def is_scale(part: Part) -> bool:
    return part.table is not None and part.name.startswith(f"tables/{part.table}/{SCALE}:")


def _first_column(part: Part) -> int:
    return int(part.name.rpartition(":")[2].partition("-")[0])


def _check(what: str, part: Part, size: tuple[int, ...], rows: Rows, notes: dict[str, str]) -> None:
    if size[1] != part.size[1]:
        raise UserError(
            f"{what} is stored with {size[1]} columns there and {part.size[1]} here: the weights of another dim mean "
            "nothing; use the same dim, or another name for the table"
        )
    if size[0] == part.size[0]:
        return
    change, text = ("grow", "grown") if size[0] < part.size[0] else ("cut", "cut")
    if rows not in (change, "any"):
        raise UserError(
            f"{what} has {size[0]} rows there and {part.size[0]} here; "
            f'checkpoint.init_rows = "{change}" lets it be {text}, "any" allows both'
        )
    notes[what] = f"{what} is {text} from {size[0]} to {part.size[0]} rows"
