"""The dot interaction on the CPU, in Numba: one pass over the samples, each thread a range of them.

Forward: the products of a vector with 8 others at once, in registers, then one tree of shuffles for their sums; nothing
but the output is written.  Backward: (G v) with 4 rows of it in registers, from a G of one sample in the first cache.
What torch would make in between (bmm's full square, index_select's copy, cat, and as much again in the backward) does
not exist.  A sample is one thread's work, so results do not depend on their number.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from kernels.interaction import Spec
from kernels.threads import run, shares

SPEED = {"cpu": 3}
WIDEST = 1024  # columns: a sample's vectors are to stay in the caches


def available() -> bool:
    return importlib.util.find_spec("numba") is not None


def supports(spec: Spec, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if not available():
        return "needs Numba, which is not installed"
    if spec.dim > WIDEST:
        return f"vectors of {spec.dim} columns, more than {WIDEST}"
    return None


class Kernel:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        for name in ("forward", "backward"):
            _compiled(name, spec.dim, torch.float32, torch.float32)

    def forward(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        like = emb_BX if dense_BD is None else dense_BD
        out_BY = torch.empty(emb_BX.shape[0], self.spec.columns, dtype=like.dtype)
        loop = _compiled("forward", self.spec.dim, like.dtype, emb_BX.dtype)
        arrays = (_array(emb_BX[:0] if dense_BD is None else dense_BD), _array(emb_BX), _array(out_BY))
        self._run(loop, arrays, emb_BX.shape[0])
        return out_BY

    def backward(self, grad_BY: Tensor, dense_BD: Tensor | None, emb_BX: Tensor) -> tuple[Tensor | None, Tensor]:
        grad_BX = torch.empty_like(emb_BX)
        grad_BD = None if dense_BD is None else torch.empty_like(dense_BD)
        loop = _compiled("backward", self.spec.dim, grad_BY.dtype, emb_BX.dtype)
        dense, dense_grad = (emb_BX[:0], grad_BX[:0]) if dense_BD is None else (dense_BD, grad_BD)
        arrays = [_array(tensor) for tensor in (grad_BY, dense, emb_BX, dense_grad, grad_BX)]
        self._run(loop, arrays, emb_BX.shape[0])
        return grad_BD, grad_BX

    def _run(self, loop, arrays, samples: int) -> None:
        spec = self.spec
        work = samples * spec.vectors * spec.vectors * spec.dim // 32
        run(
            lambda first, end: loop(*arrays, first, end, spec.features, int(spec.dense)),
            shares(samples, work=work),
        )


@cache
def _compiled(name: str, dim: int, dense: torch.dtype, emb: torch.dtype):
    """A loop for this width and these dtypes, called without the literals."""
    from numba import types

    from kernels.interactions import _dots

    def flat(dtype):
        return types.Array(types.float32 if dtype == torch.float32 else types.uint16, 1, "C")

    # Padded to whole registers; from 64 columns on, the backward sums 64 at once.
    step = 16 if dim <= 64 else 64
    padded = -(-dim // step) * step
    d, e = flat(dense), flat(emb)
    arrays = (d, e, d) if name == "forward" else (d, d, e, d, e)
    literals = (dim, padded) if name == "forward" else (dim, padded, min(padded, 64))
    given = (*arrays, *[types.int64] * 4, *(types.literal(value) for value in literals))
    entry = getattr(_dots, name).compile(given)
    return lambda *args: entry(*args, *literals)


def _array(tensor: Tensor):
    """A flat NumPy view; bfloat16 as the uint16 of its bits."""
    flat = tensor.detach().view(-1)
    return flat.view(torch.int16).numpy().view("uint16") if flat.dtype == torch.bfloat16 else flat.numpy()
