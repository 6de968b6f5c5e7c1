"""Adagrad: s += g^2; w -= lr * g / (sqrt(s) + eps), one s per weight; l2 * w is added to g first."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kernels.ops import Optimizer
from trainer.config import Plugin
from trainer.optim.base import fused, l2_of


class Config(Plugin):
    kind: str = "adagrad"
    lr: float = Field(gt=0)
    eps: float = Field(default=1e-8, gt=0)
    l2: float = Field(default=0.0, ge=0.0)


def table(config: Config) -> Optimizer:
    return Optimizer(kind="adagrad", lr=config.lr, eps=config.eps, **l2_of(config))


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=config.lr, eps=config.eps, weight_decay=config.l2, fused=fused(params))


def row_state(p_ED: Tensor) -> dict[str, Tensor]:
    return {"sum": torch.zeros_like(p_ED)}


def update_rows(
    config: Config, w_UD: Tensor, g_UD: Tensor, states: Sequence[Tensor], *, lr: float, step: int | None
) -> None:
    (s_UD,) = states
    g_UD = g_UD + config.l2 * w_UD
    s_UD.addcmul_(g_UD, g_UD)
    w_UD.addcdiv_(g_UD, s_UD.sqrt() + config.eps, value=-lr)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 4 * dim
