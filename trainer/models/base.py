"""The contract of a model, and the pieces that models share.

A model is a file in this folder.  It holds

    class Config(trainer.config.Plugin)      frozen; its own options, validated when made
    build(config, inputs) -> nn.Module       called once on every rank, under `torch.device("meta")`

and the module's `forward(dense_BK, emb_BX) -> logits_BT` is called once per batch, under autocast when the precision
is bf16.  `emb_BX` holds one pooled vector per feature, side by side in feature order; X is the sum of `inputs.dims`.
Logits are raw: the loss applies the sigmoid.  What the module computes must depend on its inputs, its parameters and
(when training) the random generator alone, and every parameter must be used in every forward: DistributedDataParallel
waits for each gradient.  `build` raises UserError, with the key and the numbers, for options that do not fit `inputs`.

Weights are not drawn by `build`: `init_dense` fills them after the module left the meta device, alike on every rank.
A module of the model's own with parameters that are not Linear or BatchNorm1d has a method `init(generator)`.

Only torch is imported here, not TorchRec: a config is checked without it.

Shapes: B rows of this rank, K dense inputs, F features, D dim of a feature, X sum of the dims, T tasks.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kernels.errors import UserError
from kernels.linear import Linear


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What the data gives to a model.

    dense: K, dense inputs per row; 0 where the data has none.
    dims: D of every feature, in feature order.
    tasks: T, labels per row.
    features: the features' names, in the same order; for error messages.
    interaction: a file in kernels/interactions/, or "auto", for a model that has kernels.interaction.DotInteraction.
    """

    dense: int
    dims: tuple[int, ...]
    tasks: int = 1
    features: tuple[str, ...] = ()
    interaction: str = "auto"

    def __post_init__(self) -> None:
        assert not self.features or len(self.features) == len(self.dims)

    def feature(self, i: int) -> str:
        return self.features[i] if self.features else f"feature {i}"


class MLP(nn.Sequential):
    """Linear layers of the given widths: (B, width_in) -> (B, widths[-1]).

    Between two layers: batch norm (if asked for), ReLU, dropout. `last_relu` says whether the last layer has them too:
    a bottom MLP's does, a top MLP's gives logits.
    """

    def __init__(
        self, width_in: int, widths: Sequence[int], *, last_relu: bool, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            hidden = last_relu or i + 1 < len(widths)
            layers.append(Linear(width_in, width, relu=hidden and not batch_norm))
            if hidden:
                # Where the linear layer has the ReLU in it, Identity holds its place: checkpoints name layers by place.
                layers += [nn.BatchNorm1d(width), nn.ReLU()] if batch_norm else [nn.Identity()]
                if dropout:
                    layers.append(nn.Dropout(dropout))
            width_in = width
        super().__init__(*layers)


def same_dims(inputs: ModelInputs, *, why: str) -> int:
    """The one D that all features share; UserError naming those that differ from the most frequent."""
    dims = inputs.dims
    if not dims:
        raise UserError("the data has no categorical features; this model needs at least one")
    common = max(sorted(set(dims)), key=dims.count)
    odd = [f"{inputs.feature(i)} ({d})" for i, d in enumerate(dims) if d != common]
    if odd:
        shown = ", ".join(odd[:8]) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
        raise UserError(f"{why} needs one dim for all features; most have {common}, but not {shown}; set tables.dim")
    return common


def check_top(top: Sequence[int], tasks: int, *, key: str) -> None:
    """UserError unless the last layer has one output per task."""
    if top[-1] != tasks:
        labels = "1 label" if tasks == 1 else f"{tasks} labels"
        raise UserError(
            f"{key} = {list(top)} ends in {top[-1]}, but the data has {labels} and each needs its own logit; "
            f"set {key} = {[*top[:-1], tasks]}"
        )


@torch.no_grad()
def init_dense(module: nn.Module, *, seed: int) -> None:
    """Fill every parameter of `module` as a pure function of (seed, the parameter's name, its shape).

    Linear as in the reference DLRM, for a layer from n to m: weight ~ N(0, 2 / (m + n)), bias ~ N(0, 1 / m) (the second
    number is the variance).  BatchNorm1d starts as the identity.  Drawn on the CPU, so that every device and every rank
    gets the same numbers.
    """
    for name, child in module.named_modules():
        # The seed is hashed with the name: a CPU generator looks at the low 32 bits of its seed only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if hasattr(child, "init"):
            child.init(generator)
        elif isinstance(child, nn.Linear):
            m, n = child.weight.shape
            child.weight.copy_(torch.randn(m, n, generator=generator) * math.sqrt(2.0 / (m + n)))
            if child.bias is not None:
                child.bias.copy_(torch.randn(m, generator=generator) * math.sqrt(1.0 / m))
        elif isinstance(child, nn.BatchNorm1d):
            child.reset_parameters()
        else:
            own = [n for n, _ in child.named_parameters(recurse=False)]
            assert not own, f"{type(child).__name__} {name!r} has parameters {own} and no init(generator)"
