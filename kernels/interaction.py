"""The dot interaction of DLRM: dots of every pair of vectors of a sample, joined with the dense one, in one op.

    dots = DotInteraction(Spec(features=26, dim=64, dense=True))      # `auto` backend; dots.choice(device) says why
    out_BY = dots(dense_BD, emb_BX)                                   # differentiable in both
    out_BY = DotInteraction(Spec(features=26, dim=64, dense=False))(None, emb_BX)

The I = F + 1 vectors of a sample are v_0 = its row of dense_BD and v_1 .. v_F = the F parts of its row of emb_BX (no
dense: I = F, v_0 is the first part).  A row of out_BY is the row of dense_BD, where there is one, and then the P =
I * (I - 1) / 2 dots of the strict lower triangle, by rows.  Three vectors, dense among them:

    out = [v_0 | v_1.v_0  v_2.v_0  v_2.v_1]

The backward gives, with G the (I, I) symmetric matrix of the dots' gradients, zero on its diagonal,

    d v_i = sum over j of G[i, j] * v_j          and for v_0 also the gradient of the copy of dense_BD

Shapes: B samples, D columns of a vector, F features, X = F * D, I vectors, P pairs, Y = P (+ D with dense).
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kernels.choice import Choice, choose
from kernels.errors import UserError

BACKENDS = "kernels.interactions"
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """features: F.  dim: D.  dense: whether every call brings a dense vector of each sample."""

    features: int
    dim: int
    dense: bool = True

    def __post_init__(self) -> None:
        if self.dim < 1 or self.vectors < 2:
            raise UserError(
                f"{self.vectors} vectors of dim {self.dim}: the dot interaction needs two vectors of 1 or more columns"
            )

    @cached_property
    def vectors(self) -> int:
        return self.features + self.dense

    @cached_property
    def pairs(self) -> int:
        return self.vectors * (self.vectors - 1) // 2

    @cached_property
    def columns(self) -> int:
        """Y."""
        return self.pairs + (self.dim if self.dense else 0)


class DotInteraction(nn.Module):
    """The op as a module, without parameters.

    backend: "auto", or a file name in kernels/interactions/.  It is chosen at the first call on a kind of device, or by
    `choice(device)`; either raises UserError, with the reason, when the one asked for cannot serve there.
    """

    def __init__(self, spec: Spec, *, backend: str = "auto") -> None:
        super().__init__()
        self.spec, self.backend = spec, backend
        self._made: dict[str, tuple[Choice, Any]] = {}

    @contextlib.contextmanager
    def served_by(self, kernel: Any, device: str) -> Iterator[None]:
        """Meanwhile, `kernel` (as kernels/interactions/base.py has it) serves this kind of device."""
        before = dict(self._made)
        self._made[device] = Choice(name="given", why="by served_by", module=sys.modules[__name__]), kernel
        try:
            yield
        finally:
            self._made = before

    def choice(self, device: torch.device | str) -> Choice:
        return self._on(torch.device(device))[0]

    def forward(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        """(B, Y), of the dtype of dense_BD, or of emb_BX without it.

        dense_BD: float32 or bfloat16.  emb_BX: float32 or bfloat16, not always the same.  Gradients have the dtype of
        what they are the gradient of.
        """
        check(self.spec, dense_BD, emb_BX)
        return _Dots.apply(dense_BD, emb_BX, self._on(emb_BX.device)[1])

    def _on(self, device: torch.device) -> tuple[Choice, Any]:
        if device.type not in self._made:
            choice = choose(self.spec, device, self.backend, package=BACKENDS)
            self._made[device.type] = choice, choice.module.Kernel(self.spec)
        return self._made[device.type]


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dense_BD, emb_BX, kernel):
        ctx.kernel = kernel
        dense_BD, emb_BX = None if dense_BD is None else dense_BD.contiguous(), emb_BX.contiguous()
        ctx.save_for_backward(dense_BD, emb_BX)
        return kernel.forward(dense_BD, emb_BX)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BY):
        dense_BD, emb_BX = ctx.saved_tensors
        return *ctx.kernel.backward(grad_BY.contiguous(), dense_BD, emb_BX), None


def check(spec: Spec, dense_BD: Tensor | None, emb_BX: Tensor) -> None:
    """Dtypes and shapes of one call: UserError for what does not fit the spec."""
    if spec.dense != (dense_BD is not None):
        raise UserError(f"the dense vectors are {'missing' if spec.dense else 'given'} and dense = {spec.dense}")
    wanted = [("vectors of the features", emb_BX, spec.features * spec.dim)]
    wanted += [("dense vectors", dense_BD, spec.dim)] if dense_BD is not None else []
    for name, tensor, columns in wanted:
        if tensor.dtype not in DTYPES or tensor.dim() != 2 or tensor.shape[1] != columns:
            raise UserError(
                f"the {name} are {tensor.dtype} of shape {tuple(tensor.shape)}; give (samples, {columns}) of float32 "
                "or bfloat16"
            )
        if tensor.shape[0] != emb_BX.shape[0]:
            raise UserError(f"{tensor.shape[0]} {name} for {emb_BX.shape[0]} samples")
