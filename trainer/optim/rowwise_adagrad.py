"""Row-wise Adagrad: s += mean(g^2) over the row; w -= lr * g / (sqrt(s) + eps).  One s per row: 4 bytes beside 4 * D.

A table that is split by columns has one s per row and column shard, each the mean over its own columns: a plan with
column-wise shards trains slightly differently from one without.

Shapes: E rows, D columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from trainer.config import Plugin
from trainer.optim.base import touched_rows


class Config(Plugin):
    """l2 adds l2 * w to the gradient of the rows that the batch touches."""

    kind: str = "rowwise_adagrad"
    lr: float = Field(gt=0)
    eps: float = Field(default=1e-8, gt=0)
    l2: float = Field(default=0.0, ge=0.0)


def fused(config: Config, *, device: torch.device) -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, WeightDecayMode

    params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": config.lr, "eps": config.eps}
    if config.l2:
        params |= {"weight_decay": config.l2, "weight_decay_mode": WeightDecayMode.L2}
    return params


def replicated(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return RowwiseAdagrad(params, lr=config.lr, eps=config.eps, l2=config.l2)


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """A vector counts as one row."""
    return RowwiseAdagrad(params, lr=config.lr, eps=config.eps, l2=config.l2)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 4


class RowwiseAdagrad(torch.optim.Optimizer):
    """The formula above on dense gradients; a row whose gradient is all zeros stays, whatever `l2`."""

    def __init__(self, params: Sequence[Tensor], *, lr: float, eps: float, l2: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "l2": l2})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.zeros(_rows(p).shape[0], 1, device=p.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                w_ED, g_ED, s_E1 = _rows(p.detach()), _rows(p.grad), self.state[p]["sum"]
                if group["l2"]:
                    g_ED = g_ED + group["l2"] * w_ED * touched_rows(g_ED)[:, None]
                s_E1 += g_ED.square().mean(dim=1, keepdim=True)
                w_ED.addcdiv_(g_ED, s_E1.sqrt() + group["eps"], value=-group["lr"])


def _rows(p: Tensor) -> Tensor:
    return p if p.dim() == 2 else p.view(1, -1)
