"""The op in Triton: for NVIDIA GPUs, and for tests in Triton's interpreter on CPU tensors.

kernels/interactions/_triton_dots.py computes.  Shapes: as in kernels/interaction.py.
"""

import torch
from torch import Tensor

from kernels.backends import triton as bags
from kernels.interaction import Spec

SPEED = {"cuda": 2}  # "cpu" only in the interpreter, and when asked for
MOST = 128  # vectors of a sample: their dots are one tile
SMALLEST = 16  # side of a tile that the matrix units take
COLUMNS = 64  # of the vectors, at a time

available = bags.available


def supports(spec: Spec, device: torch.device) -> str | None:
    reason = bags.refusal(device)
    if reason is None and spec.vectors > MOST:
        return f"{spec.vectors} vectors a sample are more than {MOST}"
    return reason


class Kernel:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        block = max(SMALLEST, 1 << (spec.vectors - 1).bit_length())
        self._options = {
            "VECTORS": spec.vectors,
            "D": spec.dim,
            "DENSE": spec.dense,
            "BLOCK_I": block,
            "BLOCK_D": min(COLUMNS, max(SMALLEST, 1 << (spec.dim - 1).bit_length())),
            "num_warps": max(1, block // 16),
        }

    def forward(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        from kernels.interactions._triton_dots import dots

        given = emb_BX if dense_BD is None else dense_BD
        out_BY = torch.empty((len(emb_BX), self.spec.columns), dtype=given.dtype, device=emb_BX.device)
        if len(emb_BX):
            with bags.on(emb_BX.device):
                dots[(len(emb_BX),)](out_BY, given, emb_BX, PRECISION=_precision(given, emb_BX), **self._options)
        return out_BY

    def backward(self, grad_BY: Tensor, dense_BD: Tensor | None, emb_BX: Tensor) -> tuple[Tensor | None, Tensor]:
        from kernels.interactions._triton_dots import gradients

        given = emb_BX if dense_BD is None else dense_BD
        emb_grad_BX = torch.empty_like(emb_BX)
        dense_grad_BD = None if dense_BD is None else torch.empty_like(dense_BD)
        if len(emb_BX):
            with bags.on(emb_BX.device):
                gradients[(len(emb_BX),)](
                    emb_grad_BX if dense_grad_BD is None else dense_grad_BD,
                    emb_grad_BX,
                    grad_BY,
                    given,
                    emb_BX,
                    PRECISION=_precision(grad_BY, given, emb_BX),
                    **self._options,
                )
        return dense_grad_BD, emb_grad_BX


def _precision(*factors: Tensor) -> str:
    return "tf32" if all(tensor.dtype == torch.bfloat16 for tensor in factors) else "ieee"
