"""DLRM (Naumov et al., 2019): bottom MLP -> z0; dots of every pair of {z0, e_1 .. e_F}, joined with z0; top MLP.

    dense_BK -> bottom -> z0_BD --+--------------------------+
                                  +-> {z0, e_1..e_F}: dots --+-> top -> logits_BT
    emb_BX  ----------------------+

Data without dense columns has no bottom MLP: the pairs are those of the features alone, and nothing is joined to them.

Shapes: B rows, K dense inputs, F features, D dim, X = F * D, T tasks, I = F (+ 1 with dense inputs) interacting
vectors, P = I * (I - 1) / 2 pairs.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.errors import UserError
from kernels.interaction import DotInteraction, Spec
from trainer.config import Plugin, Positive
from trainer.models.base import MLP, ModelInputs, check_top, same_dims


class Config(Plugin):
    """bottom: widths after the dense inputs, the last one the tables' dim; unused where the data has no dense columns.
    top: widths after the interaction; the last one is the number of labels.
    interaction: "dot" (one dim for all tables) or "cat" (any dims, vectors side by side).
    dropout: share of activations zeroed after each ReLU.  batch_norm: before each ReLU.
    """

    kind: str = "dlrm"
    bottom: tuple[Positive, ...] = ()
    top: Annotated[tuple[Positive, ...], Field(min_length=1)]
    interaction: Literal["dot", "cat"] = "dot"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    batch_norm: bool = False


def build(config: Config, inputs: ModelInputs) -> nn.Module:
    """The module; UserError when bottom, top or the tables' dims do not fit together."""
    check_top(config.top, inputs.tasks, key="model.top")
    if inputs.dense and not config.bottom:
        raise UserError(f"model.bottom is empty, but the data has {inputs.dense} dense columns; give its widths")
    if config.interaction == "dot":
        dim = same_dims(inputs, why='model.interaction = "dot"')
        if inputs.dense and config.bottom[-1] != dim:
            raise UserError(
                f"model.bottom = {list(config.bottom)} ends in {config.bottom[-1]}, but the tables' dim is {dim} and "
                f'both take part in the dots; make them equal, or set model.interaction = "cat"'
            )
        if len(inputs.dims) + bool(inputs.dense) < 2:
            raise UserError('model.interaction = "dot" needs two vectors; with a single feature use "cat"')
    return DLRM(config, inputs)


class DLRM(nn.Module):
    def __init__(self, config: Config, inputs: ModelInputs) -> None:
        super().__init__()
        options = {"dropout": config.dropout, "batch_norm": config.batch_norm}
        z0 = config.bottom[-1] if inputs.dense else 0
        self.bottom = MLP(inputs.dense, config.bottom, last_relu=True, **options) if inputs.dense else None
        if config.interaction == "dot":
            spec = Spec(features=len(inputs.dims), dim=inputs.dims[0], dense=bool(inputs.dense))
            self.interaction: nn.Module | None = DotInteraction(spec, backend=inputs.interaction)
            width = spec.columns
        else:
            self.interaction = None
            width = z0 + sum(inputs.dims)
        self.top = MLP(width, config.top, last_relu=False, **options)

    def forward(self, dense_BK: Tensor, emb_BX: Tensor) -> Tensor:
        z0_BD = None if self.bottom is None else self.bottom(dense_BK)
        if self.interaction is not None:
            return self.top(self.interaction(z0_BD, emb_BX))
        return self.top(emb_BX if z0_BD is None else torch.cat([z0_BD, emb_BX.to(z0_BD.dtype)], dim=1))
