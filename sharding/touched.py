"""Which rows of every table part have been looked up, and so updated, since somebody last asked: for delta checkpoints.

    touched = Touched(task)                 watches the kernels of this rank, ours and FBGEMM's
    touched.take()                          rows since the last take, by table part
    touched.give_back(rows)                 they count as touched again: what should have saved them failed

One byte per row, set where the ids of a batch stand after the all-to-all, as each kernel gets them: one scattered write
per id, next to the whole row that the look-up reads and the update writes.  (Comparing a table with a copy of it would
cost its size at each save, and the memory of the copy; keeping the ids of all steps costs memory that grows.)
A row that was looked up but got a gradient of zero counts as touched.  data_parallel tables are not watched: their
gradients are dense, and they are small.

Shapes: N ids of a feature, U rows touched, E rows of a part.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sharding.table_state import Fused, fused_kernels, tables_of

Key = tuple[str, int, int]  # table, first row, first column of a part


class Touched:
    def __init__(self, task: nn.Module) -> None:
        self._marks: dict[Key, Tensor] = {}
        self._of_feature: dict[int, list[Tensor]] = {}  # by the kernel's id
        for kernel in fused_kernels(task):
            marks = []
            for name, row, rows, column, _ in tables_of(kernel):
                device = kernel.emb_module.split_embedding_weights()[0].device
                marks.append(torch.zeros(rows, dtype=torch.bool, device=device))
                self._marks[name, row, column] = marks[-1]
            self._of_feature[id(kernel)] = [marks[table] for table in kernel.emb_module.feature_table_map]
            kernel.register_forward_pre_hook(self._before)

    def take(self) -> dict[Key, Tensor]:
        """(U,) int64 rows of each part, counted from the part's first, ascending; the marks are cleared."""
        found = {key: marks_E.nonzero().flatten() for key, marks_E in self._marks.items()}
        for marks_E in self._marks.values():
            marks_E.zero_()
        return found

    def give_back(self, rows: dict[Key, Tensor]) -> None:
        for key, rows_U in rows.items():
            self._marks[key].index_fill_(0, rows_U, True)

    def mark(self, kernel: Fused, features: KeyedJaggedTensor) -> None:
        """What a call of the kernel looks up is touched."""
        ids, ends = features.values(), features.offset_per_key()
        for marks_E, start, end in zip(self._of_feature[id(kernel)], ends, ends[1:], strict=False):
            marks_E.index_fill_(0, ids[start:end].long(), True)

    def _before(self, kernel: Fused, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():  # an evaluation updates nothing
            self.mark(kernel, inputs[0])
