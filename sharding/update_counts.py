"""In how many steps every row of every table was updated, exactly, for every plan and number of ranks.

    counted = UpdateCounts(task)       watches the kernels of this rank, ours and FBGEMM's, and the replicated tables
    counted.after_step()               after every step, all ranks together
    counts_bytes(task) -> int          of this rank
    held_counts(task) -> list[Held]    (E,) int32 of each part, as sharding/table_state.py has weights and states

A row is updated by a step in whose global batch it was looked up: once, however many samples and features have it, and
also where its gradient happens to be zero.  Its rank sees that when the row's kernel is called.  Of a table that is cut
by columns the first part counts, as the others would count the same.  A replicated table is looked up by each rank for
its own samples, so what the ranks have looked up is put together after the step (one byte a row; its gradient, which
they add up anyway, has four a number).

Rows that are given to ids (sharding/by_id.py) count from 0 when an id gets them.

Shapes: N ids of a call, E rows of a part, R rows of all replicated tables.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.row_counts import MOST, RowCounter
from sharding.by_id import ByIdBag
from sharding.plan import embeddings_of
from sharding.table_state import Fused, Held, fused_kernels, tables_of

UPDATES = "updates"
_COUNTS = "_tablemesh_update_counts"  # on a kernel, ours or not: {table part: (E,) int32}


class UpdateCounts:
    def __init__(self, task: nn.Module) -> None:
        self._counters: dict[int, RowCounter] = {}  # by the kernel's id
        for kernel in fused_kernels(task):
            self._counters[id(kernel)] = _counter(kernel)
            kernel.register_forward_hook(self._after)
        self._replicas = list(_replicated_kernels(task))
        rows = [t.num_embeddings for kernel in self._replicas for t in kernel._config.embedding_tables]
        if not self._replicas:
            return
        device = next(self._replicas[0].parameters()).device
        self._looked_up_R = torch.zeros(sum(rows), dtype=torch.uint8, device=device)
        parts = iter(self._looked_up_R.split(rows))
        counts = iter(torch.zeros(sum(rows), dtype=torch.int32, device=device).split(rows))
        self._marks: dict[int, list[Tensor]] = {}  # of each feature, by the kernel's id
        self._of_table: list[tuple[Tensor, Tensor]] = []  # (looked up, counts)
        for kernel in self._replicas:
            tables = [(next(parts), next(counts)) for _ in kernel._config.embedding_tables]
            self._of_table += tables
            self._marks[id(kernel)] = [tables[t][0] for t in kernel._feature_table_map]
            setattr(kernel, _COUNTS, {t: counts_E for t, (_, counts_E) in enumerate(tables)})
            kernel.register_forward_hook(self._mark)

    def count(self, kernel: Fused, features: KeyedJaggedTensor) -> None:
        """What a call of the kernel has looked up is updated by it, in its backward."""
        rows = kernel.updated_by(features) if isinstance(kernel, ByIdBag) else _rows(features)
        self._counters[id(kernel)].add(*rows)

    def _after(self, kernel: Fused, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():  # an evaluation updates nothing
            self.count(kernel, inputs[0])

    def _mark(self, kernel: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            ids, ends = inputs[0].values(), inputs[0].offset_per_key()
            for marks_E, first, end in zip(self._marks[id(kernel)], ends, ends[1:], strict=False):
                marks_E.index_fill_(0, ids[first:end].long(), 1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the rows of the replicated tables that any rank has looked up."""
        if not self._replicas:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._looked_up_R, op=dist.ReduceOp.MAX)
        for marks_E, counts_E in self._of_table:
            counts_E.add_((marks_E > 0) & (counts_E < MOST))
        self._looked_up_R.zero_()


def counts_of(kernel: nn.Module) -> dict[int, Tensor]:
    """{number of a table part of the kernel: (E,) int32}; empty where nobody counts."""
    return getattr(kernel, _COUNTS, {})


def held_counts(task: nn.Module) -> list[Held]:
    """But of the tables whose rows are given to ids, where a row's number means nothing."""
    found = []
    for kernel in fused_kernels(task):
        if not isinstance(kernel, ByIdBag):
            parts = tables_of(kernel)
            found += [_held(*parts[t], counts_E) for t, counts_E in counts_of(kernel).items()]
    for kernel in _replicated_kernels(task):
        for t, counts_E in counts_of(kernel).items():
            table = kernel._config.embedding_tables[t]
            found.append(_held(table.name, 0, table.num_embeddings, 0, table.embedding_dim, counts_E))
    return found


def counts_bytes(task: nn.Module) -> int:
    kernels = [*fused_kernels(task), *_replicated_kernels(task)]
    return sum(t.numel() * t.element_size() for kernel in kernels for t in counts_of(kernel).values())


def _held(name: str, row: int, rows: int, column: int, columns: int, counts_E: Tensor) -> Held:
    assert len(counts_E) == rows
    return Held(table=name, what=UPDATES, row=row, column=column, columns=columns, tensor=counts_E)


def _counter(kernel: Fused) -> RowCounter:
    """Of the first columns of a kernel's tables."""
    parts = tables_of(kernel)
    counted = [t for t, (_, _, _, column, _) in enumerate(parts) if column == 0]
    number = {t: n for n, t in enumerate(counted)}
    device = kernel.emb_module.split_embedding_weights()[0].device
    features = [number.get(t) for t in kernel.emb_module.feature_table_map]
    counter = RowCounter(rows=[parts[t][2] for t in counted], features=features, device=device)
    setattr(kernel, _COUNTS, {t: counter.counts[n] for t, n in number.items()})
    if isinstance(kernel, ByIdBag):
        kernel.count(counter.counts)
    return counter


def _rows(features: KeyedJaggedTensor) -> tuple[Tensor, list[int]]:
    return features.values(), features.offset_per_key()


def _replicated_kernels(task: nn.Module) -> Iterator[BatchedDenseEmbeddingBag]:
    # _lookups is a plain list, which modules() does not see.
    for lookup in (lookup for ebc in embeddings_of(task).collections for lookup in ebc._lookups):
        for kernel in lookup.modules():
            if isinstance(kernel, BatchedDenseEmbeddingBag):
                yield kernel
