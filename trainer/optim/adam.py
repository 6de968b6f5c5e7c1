"""Adam: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr * m' / (sqrt(v') + eps), m' and v' bias-corrected.

On tables the moments of a row move only in the steps whose batch touches it (as FBGEMM does it); the bias correction
counts all steps.

Shapes: E rows, D columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import UserError
from trainer.config import Plugin
from trainer.optim.base import touched_rows


class Config(Plugin):
    """l2 (added to the gradient) is for the dense layers."""

    kind: str = "adam"
    lr: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0)
    l2: float = Field(default=0.0, ge=0.0)


def fused(config: Config, *, device: torch.device) -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    _check_for_tables(config)
    if device.type == "cpu":
        raise UserError(
            'optim.sparse.kind = "adam": FBGEMM has no fused Adam for tables on the CPU; use "rowwise_adagrad", '
            '"adagrad" or "sgd", or tables.sharding = "data_parallel", or train on a GPU'
        )
    return {
        "optimizer": EmbOptimType.ADAM,
        "learning_rate": config.lr,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "eps": config.eps,
    }


def replicated(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    _check_for_tables(config)
    return RowAdam(params, config)


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(params, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.l2)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 2 * 4 * dim


class RowAdam(torch.optim.Optimizer):
    """The formula above on dense (E, D) gradients; a row whose gradient is all zeros stays, and so do its moments."""

    def __init__(self, params: Sequence[Tensor], config: Config) -> None:
        super().__init__(params, {"lr": config.lr, "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["beta1"], group["beta2"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                step = state["step"].item()
                touched_E1 = touched_rows(p.grad)[:, None]
                m_ED, v_ED = state["m"], state["v"]
                m_ED.copy_(torch.where(touched_E1, m_ED.lerp(p.grad, 1 - beta1), m_ED))
                v_ED.copy_(torch.where(touched_E1, v_ED.lerp(p.grad.square(), 1 - beta2), v_ED))
                denominator_ED = (v_ED / (1 - beta2**step)).sqrt() + group["eps"]
                p.detach().sub_(touched_E1 * m_ED / denominator_ED * (group["lr"] / (1 - beta1**step)))


def _check_for_tables(config: Config) -> None:
    if config.l2:
        raise UserError(
            f"optim.sparse.l2 = {config.l2}: Adam on tables has no l2; leave it out, "
            f'or use kind = "rowwise_adagrad", which has it'
        )
