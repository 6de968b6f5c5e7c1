"""Row-wise Adagrad: s += mean(g^2) over the row; w -= lr * g / (sqrt(s) + eps); l2 * w is added to g first.

One s per row: 4 bytes beside the row's 4 * D.  A table that is split by columns has one s per row and column shard,
each the mean over its own columns: a plan with column-wise shards trains slightly differently from one without.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kernels.ops import Optimizer
from trainer.config import Plugin
from trainer.optim.base import RowOptimizer, l2_of


class Config(Plugin):
    kind: str = "rowwise_adagrad"
    lr: float = Field(gt=0)
    eps: float = Field(default=1e-8, gt=0)
    l2: float = Field(default=0.0, ge=0.0)


def table(config: Config) -> Optimizer:
    return Optimizer(kind="rowwise_adagrad", lr=config.lr, eps=config.eps, **l2_of(config))


def dense(config: Config, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """A row of a matrix is one output; a vector counts as one row."""
    return RowOptimizer(config, params)


def row_state(p_ED: Tensor) -> dict[str, Tensor]:
    return {"sum": p_ED.new_zeros(p_ED.shape[0], 1)}


def update_rows(
    config: Config, w_UD: Tensor, g_UD: Tensor, states: Sequence[Tensor], *, lr: float, step: int | None
) -> None:
    (s_U1,) = states
    g_UD = g_UD + config.l2 * w_UD
    s_U1 += g_UD.square().mean(dim=1, keepdim=True)
    w_UD.addcdiv_(g_UD, s_U1.sqrt() + config.eps, value=-lr)


def state_bytes_per_row(config: Config, dim: int) -> int:
    return 4
