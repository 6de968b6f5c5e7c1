"""What this rank holds of every physical table: weights and optimizer state, named alike for every plan and kernel.

    held_parts(task) -> list[Held]          of the tables that are updated in the backward
    held_bytes(task) -> int                 of all of them
    set_updates(task, count)                how many updates the kernels count from (Adam's bias correction)

A part is a box of rows and columns.  Weights and states of one number per element are (rows, columns); a state of one
number per row is (rows,), and so are the scales of rows of int8; a table that is cut by columns has one such number per
row and column part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag

from sharding.by_id import ByIdBag
from sharding.compute_kernel import FusedEmbeddingBag
from sharding.plan import embeddings_of

Fused = FusedEmbeddingBag | BatchedFusedEmbeddingBag
WEIGHT, SCALE = "weight", "scale"


@dataclass(frozen=True, kw_only=True)
class Held:
    """what: "weight", "scale" or the name of a state (sum, exp_avg, ...).  tensor: a view, not a copy."""

    table: str
    what: str
    row: int
    column: int
    columns: int  # of the part, also where the tensor has one number per row
    tensor: Tensor


def fused_kernels(task: nn.Module) -> Iterator[Fused]:
    """The kernels of this rank that update tables in the backward, ours and FBGEMM's."""
    # _lookups is a plain list, which modules() does not see.
    for lookup in (lookup for ebc in embeddings_of(task).collections for lookup in ebc._lookups):
        for kernel in lookup.modules():
            if isinstance(kernel, (FusedEmbeddingBag, BatchedFusedEmbeddingBag)):
                yield kernel


def tables_of(kernel: Fused) -> list[tuple[str, int, int, int, int]]:
    """(name, first row, rows, first column, columns) of each table part of a kernel, in the kernel's order."""
    found = []
    for table in kernel._config.embedding_tables:
        row, column = table.local_metadata.shard_offsets if table.local_metadata else (0, 0)
        found.append((table.name, row, table.local_rows, column, table.local_cols))
    return found


def scales_of(kernel: Fused) -> list[Tensor]:
    """(rows,) of each table part of a kernel whose rows are int8; empty for other kernels."""
    return kernel.bags.state.scale_views if isinstance(kernel, FusedEmbeddingBag) else []


def held_parts(task: nn.Module) -> list[Held]:
    """But of the tables whose rows are given to ids, where a row's number means nothing (sharding/by_id.py)."""
    found = []
    for kernel in fused_kernels(task):
        if isinstance(kernel, ByIdBag):
            continue
        if isinstance(kernel, BatchedFusedEmbeddingBag) and kernel.emb_module.current_device.type == "cuda":
            kernel.emb_module.flush()  # rows that FBGEMM caches on the GPU
        for (name, row, rows, column, columns), (weight, scale, state) in zip(
            tables_of(kernel), _tensors(kernel), strict=True
        ):
            shared: dict[str, Any] = {"table": name, "row": row, "column": column, "columns": columns}
            found.append(Held(what=WEIGHT, tensor=weight.detach(), **shared))
            if scale is not None:
                found.append(Held(what=SCALE, tensor=scale, **shared))
            for what, tensor in state.items():
                flat = tensor.detach()
                assert flat.shape[0] == rows, f"{name}: {what} is {tuple(flat.shape)}"
                found.append(Held(what=what, tensor=flat.view(-1) if flat.numel() == rows else flat, **shared))
    return found


def held_bytes(task: nn.Module) -> int:
    """Also of the tables whose rows are given to ids; their id maps come on top."""
    parts = [part for kernel in fused_kernels(task) for part in _tensors(kernel)]
    held = [t for weight, scale, state in parts for t in (weight, scale, *state.values()) if t is not None]
    return sum(t.numel() * t.element_size() for t in held)


def _tensors(kernel: Fused) -> list[tuple[Tensor, Tensor | None, dict[str, Tensor]]]:
    """Weight, scale and states of each table part of a kernel."""
    weights = kernel.emb_module.split_embedding_weights()
    states: list[dict[str, Tensor]] = kernel.emb_module.get_optimizer_state() or [{}] * len(weights)
    return list(zip(weights, scales_of(kernel) or [None] * len(weights), states, strict=True))


def set_updates(task: nn.Module, count: int) -> None:
    for kernel in fused_kernels(task):
        if isinstance(kernel, FusedEmbeddingBag):
            kernel.bags.state.step = count
        else:
            kernel.emb_module.iter.fill_(count)
