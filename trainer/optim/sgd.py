"""Stochastic gradient descent: w -= lr * g."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import UserError
from trainer.config import Plugin


class Config(Plugin):
    """momentum and l2 (added to the gradient) are for the dense layers; FBGEMM's fused SGD has neither."""

    kind: str = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    l2: float = Field(default=0.0, ge=0.0)


def fused(config: Config, *, device: torch.device) -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    _check_for_tables(config)
    return {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": config.lr}


def replicated(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    _check_for_tables(config)
    return torch.optim.SGD(params, lr=config.lr)


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.l2)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 0


def _check_for_tables(config: Config) -> None:
    for key in ("momentum", "l2"):
        if getattr(config, key):
            raise UserError(
                f"optim.sparse.{key} = {getattr(config, key)}: SGD on tables has no {key}; leave it out, "
                f'or use kind = "rowwise_adagrad", which has l2'
            )
