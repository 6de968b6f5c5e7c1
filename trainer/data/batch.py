"""One batch of one rank.

Shapes: B rows of this rank, K dense inputs, T tasks, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    dense_BK: Tensor  # float32
    ids: KeyedJaggedTensor  # F keys, stride B; values int64
    labels_BT: Tensor  # float32
    weight_B: Tensor  # float32; 0 for padding rows
    row_B: Tensor  # int64, the row's number in its split in file order; -1 for padding rows
    rows_in_step: int  # rows of the *global* batch that are not padding

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(
            dense_BK=self.dense_BK.to(device=device, non_blocking=non_blocking),
            ids=self.ids.to(device=device, non_blocking=non_blocking),
            labels_BT=self.labels_BT.to(device=device, non_blocking=non_blocking),
            weight_B=self.weight_B.to(device=device, non_blocking=non_blocking),
            row_B=self.row_B.to(device=device, non_blocking=non_blocking),
            rows_in_step=self.rows_in_step,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.dense_BK, self.labels_BT, self.weight_B, self.row_B):
            tensor.record_stream(stream)
        self.ids.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return Batch(
            dense_BK=self.dense_BK.pin_memory(),
            ids=self.ids.pin_memory(),
            labels_BT=self.labels_BT.pin_memory(),
            weight_B=self.weight_B.pin_memory(),
            row_B=self.row_B.pin_memory(),
            rows_in_step=self.rows_in_step,
        )
