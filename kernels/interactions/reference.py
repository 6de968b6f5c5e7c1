"""The op in plain torch and float64: slow and true.  Every other backend is tested against it.

Shapes: B samples, D columns of a vector, I vectors of a sample, P pairs.
"""

import torch
from torch import Tensor

from kernels.interaction import Spec

SPEED = {"cpu": 1, "cuda": 1}


def available() -> bool:
    return True


def supports(spec: Spec, device: torch.device) -> str | None:
    return None


class Kernel:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def forward(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        vectors_BID = self._vectors(dense_BD, emb_BX)
        i_P, j_P = self._pairs(emb_BX.device)
        dots_BP = (vectors_BID @ vectors_BID.mT)[:, i_P, j_P]
        if dense_BD is None:
            return dots_BP.to(emb_BX.dtype)
        return torch.cat([dense_BD, dots_BP.to(dense_BD.dtype)], dim=1)

    def backward(self, grad_BY: Tensor, dense_BD: Tensor | None, emb_BX: Tensor) -> tuple[Tensor | None, Tensor]:
        vectors_BID = self._vectors(dense_BD, emb_BX)
        i_P, j_P = self._pairs(emb_BX.device)
        g_BII = vectors_BID.new_zeros(emb_BX.shape[0], self.spec.vectors, self.spec.vectors)
        g_BII[:, i_P, j_P] = grad_BY[:, -self.spec.pairs :].double()
        grad_BID = (g_BII + g_BII.mT) @ vectors_BID
        if dense_BD is None:
            return None, grad_BID.flatten(1).to(emb_BX.dtype)
        grad_BD = grad_BID[:, 0] + grad_BY[:, : self.spec.dim].double()
        return grad_BD.to(dense_BD.dtype), grad_BID[:, 1:].flatten(1).to(emb_BX.dtype)

    def _vectors(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        emb_BFD = emb_BX.double().view(-1, self.spec.features, self.spec.dim)
        return emb_BFD if dense_BD is None else torch.cat([dense_BD.double()[:, None], emb_BFD], dim=1)

    def _pairs(self, device: torch.device) -> Tensor:
        return torch.tril_indices(self.spec.vectors, self.spec.vectors, offset=-1, device=device)
