"""Adagrad: s += g^2; w -= lr * g / (sqrt(s) + eps), one s per weight."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import UserError
from trainer.config import Plugin


class Config(Plugin):
    """l2 (added to the gradient) is for the dense layers; FBGEMM's fused Adagrad has none."""

    kind: str = "adagrad"
    lr: float = Field(gt=0)
    eps: float = Field(default=1e-8, gt=0)
    l2: float = Field(default=0.0, ge=0.0)


def fused(config: Config, *, device: torch.device) -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    _check_for_tables(config)
    return {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": config.lr, "eps": config.eps}


def replicated(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """A row without a gradient stays: 0 is added to s, and 0 / (sqrt(s) + eps) to w."""
    _check_for_tables(config)
    return torch.optim.Adagrad(params, lr=config.lr, eps=config.eps)


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=config.lr, eps=config.eps, weight_decay=config.l2)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 4 * dim


def _check_for_tables(config: Config) -> None:
    if config.l2:
        raise UserError(
            f"optim.sparse.l2 = {config.l2}: Adagrad on tables has no l2; leave it out, "
            f'or use kind = "rowwise_adagrad", which has it'
        )
