"""Adam: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr * m' / (sqrt(v') + eps), m' and v' bias-corrected.

On tables the moments of a row move only in the steps whose batch touches it (as FBGEMM does it); the bias correction
counts all steps.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kernels.ops import Optimizer
from trainer.config import Plugin
from trainer.optim.base import fused, l2_of


class Config(Plugin):
    """l2 (added to the gradient) is for the dense layers and for data_parallel tables."""

    kind: str = "adam"
    lr: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0)
    l2: float = Field(default=0.0, ge=0.0)


def table(config: Config) -> Optimizer:
    betas = {"beta1": config.beta1, "beta2": config.beta2}
    return Optimizer(kind="adam", lr=config.lr, eps=config.eps, **betas, **l2_of(config))


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(
        params, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.l2, fused=fused(params)
    )


def row_state(p_ED: Tensor) -> dict[str, Tensor]:
    return {"m": torch.zeros_like(p_ED), "v": torch.zeros_like(p_ED)}


def update_rows(
    config: Config, w_UD: Tensor, g_UD: Tensor, states: Sequence[Tensor], *, lr: float, step: int | None
) -> None:
    m_UD, v_UD = states
    g_UD = g_UD + config.l2 * w_UD
    m_UD.lerp_(g_UD, 1 - config.beta1)
    v_UD.lerp_(g_UD.square(), 1 - config.beta2)
    denominator_UD = (v_UD / (1 - config.beta2**step)).sqrt() + config.eps
    w_UD.addcdiv_(m_UD, denominator_UD, value=-lr / (1 - config.beta1**step))


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 2 * 4 * dim
