"""Stochastic gradient descent: w -= lr * (g + l2 * w)."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import UserError
from kernels.ops import Optimizer
from trainer.config import Plugin
from trainer.optim.base import fused, l2_of


class Config(Plugin):
    """momentum is for the dense layers; on tables SGD has none."""

    kind: str = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    l2: float = Field(default=0.0, ge=0.0)


def table(config: Config) -> Optimizer:
    _check_for_tables(config)
    return Optimizer(kind="sgd", lr=config.lr, **l2_of(config))


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.l2, fused=fused(params))


def row_state(p_ED: Tensor) -> dict[str, Tensor]:
    return {}


def update_rows(
    config: Config, w_UD: Tensor, g_UD: Tensor, states: Sequence[Tensor], *, lr: float, step: int | None
) -> None:
    _check_for_tables(config)
    w_UD.sub_(g_UD + config.l2 * w_UD, alpha=lr)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 0


def _check_for_tables(config: Config) -> None:
    if config.momentum:
        raise UserError(
            f"optim.sparse.momentum = {config.momentum}: SGD on tables has no momentum; leave it out, or use "
            f'kind = "rowwise_adagrad"'
        )
