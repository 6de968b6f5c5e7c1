"""Table parts as they are at one moment, copied while the training goes on.

    snapshot.begin()          from here on the rows that a step is about to change are kept as they were
    snapshot.copy(into)       in another thread: the table parts as they were at `begin`

A row can only change after its kernel has been called with its id, so what a call's rows hold when it begins is kept;
the step stops for that and not for the copy.  Copied are blocks of rows, one table after the other, and a row that is
behind the copy, or was kept before, is left alone: of 8 rows, where the copy has reached row 4,

    a step with the ids 2 5 6 keeps 5 and 6, the next one with 5 7 keeps 7

and when all is copied the kept rows are put over the copy.

Shapes: E rows of a table part, N ids of a call, U rows kept of them.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharding.table_state import Fused, scales_of
from sharding.update_counts import counts_of

BLOCK_BYTES = 4 << 20  # of a table's weights, copied at once


@dataclass
class _Table:
    """tensors: (E, ...) weights and states.  copied: rows before this one are.  kept_E: which rows were kept."""

    tensors: tuple[Tensor, ...]
    kept_E: Tensor
    copied: int = 0

    @property
    def rows(self) -> int:
        return len(self.kept_E)


class Snapshot:
    """seconds: how long the steps have stopped for it, since the last `begin`."""

    def __init__(self, kernels: Iterable[Fused]) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._active = False
        self._kept: list[tuple[_Table, Tensor, list[Tensor]]] = []
        self._tables: dict[int, list[_Table]] = {}  # by the kernel's id
        self._kernels = list(kernels)
        for kernel in self._kernels:
            kernel.register_forward_pre_hook(self._before)

    def begin(self) -> None:
        """On the thread of the steps, between two of them."""
        if not self._tables:
            self._tables = {id(kernel): _tables(kernel) for kernel in self._kernels}
        for tables in self._tables.values():
            for table in tables:
                table.copied = 0
        self.seconds, self._active = 0.0, True

    def copy(self, into: Mapping[int, Tensor]) -> None:
        """Fill CPU tensors with what the table parts were at `begin`; nothing more is kept afterwards, nor on an error.

        into: data_ptr of a part's weights or state -> a tensor of its shape.
        """
        try:
            for table in (table for tables in self._tables.values() for table in tables):
                pairs = [(t, into[t.data_ptr()]) for t in table.tensors if t.data_ptr() in into]
                step = max(1, BLOCK_BYTES // max(1, table.tensors[0][:1].nbytes))
                for first in range(0, table.rows, step):
                    for source, to in pairs:
                        # Not torch's copy, which would have its threads take the cores from the step's.
                        np.copyto(_bytes(to[first : first + step]), _bytes(source[first : first + step]))
                    table.copied = min(first + step, table.rows)
        finally:
            with self._lock:
                self._active = False
                kept, self._kept = self._kept, []
            for table, rows_U, _ in kept:
                table.kept_E.index_fill_(0, rows_U, False)
        for table, rows_U, values in kept:
            for tensor, value in zip(table.tensors, values, strict=True):
                if (to := into.get(tensor.data_ptr())) is not None:
                    to.index_copy_(0, rows_U, value.view(-1, *to.shape[1:]))

    def _before(self, kernel: Fused, inputs: tuple) -> None:
        if not self._active or not torch.is_grad_enabled():
            return
        started = time.perf_counter()
        ids, ends = inputs[0].values(), inputs[0].offset_per_key()
        of_table: dict[int, list[Tensor]] = {}
        for number, first, end in zip(kernel.emb_module.feature_table_map, ends, ends[1:], strict=False):
            of_table.setdefault(number, []).append(ids[first:end])
        for number, parts in of_table.items():
            table = self._tables[id(kernel)][number]
            copied = table.copied  # as it is before the step; it only grows
            if copied == table.rows:
                continue
            ids_N = torch.cat(parts) if len(parts) > 1 else parts[0]
            if copied:
                ids_N = ids_N[ids_N >= copied]
            rows_U = ids_N[~table.kept_E[ids_N]].long()  # an id that is there twice is kept twice, with equal values
            values = [tensor.index_select(0, rows_U) for tensor in table.tensors]
            with self._lock:
                if self._active:
                    table.kept_E.index_fill_(0, rows_U, True)
                    self._kept.append((table, rows_U, values))
        self.seconds += time.perf_counter() - started


def _tables(kernel: Fused) -> list[_Table]:
    weights = [tensor.detach() for tensor in kernel.emb_module.split_embedding_weights()]
    states = kernel.emb_module.split_optimizer_states() or [[]] * len(weights)
    scales = [[scale] for scale in scales_of(kernel)] or [[]] * len(weights)
    counts = counts_of(kernel)
    return [
        _Table(
            tensors=(weight, *scale, *(s.detach() for s in of_table), *([counts[t]] if t in counts else [])),
            kept_E=torch.zeros(len(weight), dtype=torch.bool),
        )
        for t, (weight, scale, of_table) in enumerate(zip(weights, scales, states, strict=True))
    ]


def _bytes(tensor: Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()
