"""DCNv2 with low rank, as in MLPerf's DLRM-DCNv2: bottom MLP, joined with the features' vectors; cross; top MLP.

    dense_BK -> bottom -> z0 --+
                               +-- x0_BX -> cross layers -> top -> logits_BT
    emb_BX  -------------------+

    x_{l+1} = x0 * (U_l V_l^T x_l + b_l) + x_l        U_l, V_l: (X, rank)

Dims may differ from table to table. Without dense columns x0 is emb_BX.

Shapes: B rows, K dense inputs, X width of x0, R rank, T tasks.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.errors import UserError
from trainer.config import Plugin, Positive
from trainer.models.base import MLP, ModelInputs, check_top


class Config(Plugin):
    """bottom: widths after the dense inputs; may be empty: the dense inputs then join x0 as they are.
    cross_layers: how many.  rank: R of each; it pays while it is below half of x0's width.
    top: widths after the cross layers; the last one is the number of labels.
    dropout: share of activations zeroed after each ReLU.  batch_norm: before each ReLU.
    """

    kind: str = "dcn"
    bottom: tuple[Positive, ...] = ()
    cross_layers: Positive = 3
    rank: Positive = 64
    top: Annotated[tuple[Positive, ...], Field(min_length=1)]
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    batch_norm: bool = False


def build(config: Config, inputs: ModelInputs) -> nn.Module:
    """The module; UserError when top does not fit the labels or the rank exceeds x0's width."""
    check_top(config.top, inputs.tasks, key="model.top")
    width = sum(inputs.dims) + (config.bottom[-1] if inputs.dense and config.bottom else inputs.dense)
    if config.rank > width:
        raise UserError(
            f"model.rank = {config.rank} is above the width {width} of the cross layers' input (dense part + the sum "
            f"of the features' dims); use {width} or less"
        )
    return DCN(config, inputs, width=width)


class DCN(nn.Module):
    def __init__(self, config: Config, inputs: ModelInputs, *, width: int) -> None:
        super().__init__()
        options = {"dropout": config.dropout, "batch_norm": config.batch_norm}
        self.dense_inputs = inputs.dense
        has_bottom = bool(inputs.dense and config.bottom)
        self.bottom = MLP(inputs.dense, config.bottom, last_relu=True, **options) if has_bottom else None
        self.cross = nn.ModuleList(LowRankCross(width, config.rank) for _ in range(config.cross_layers))
        self.top = MLP(width, config.top, last_relu=False, **options)

    def forward(self, dense_BK: Tensor, emb_BX: Tensor) -> Tensor:
        if self.bottom is not None:
            z0_BX = self.bottom(dense_BK)
            x0_BX = torch.cat([z0_BX, emb_BX.to(z0_BX.dtype)], dim=1)
        else:
            x0_BX = torch.cat([dense_BK, emb_BX.to(dense_BK.dtype)], dim=1) if self.dense_inputs else emb_BX
        x_BX = x0_BX
        for layer in self.cross:
            x_BX = layer(x0_BX, x_BX)
        return self.top(x_BX)


class LowRankCross(nn.Module):
    """x0 * (U V^T x + b) + x."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.v_RX = nn.Parameter(torch.empty(rank, width))
        self.u_XR = nn.Parameter(torch.empty(width, rank))
        self.bias_X = nn.Parameter(torch.empty(width))

    def init(self, generator: torch.Generator) -> None:
        """Xavier-normal factors and a zero bias: each layer starts near the identity."""
        for weight in (self.v_RX, self.u_XR):
            std = math.sqrt(2.0 / (weight.shape[0] + weight.shape[1]))
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        self.bias_X.zero_()

    def forward(self, x0_BX: Tensor, x_BX: Tensor) -> Tensor:
        inner_BX = nn.functional.linear(nn.functional.linear(x_BX, self.v_RX), self.u_XR, self.bias_X)
        return torch.addcmul(x_BX, x0_BX, inner_BX)
