"""The contract of an optimizer, and the one optimizer of a run that is put together from them.

An optimizer is a file in this folder.  It holds

    class Config(trainer.config.Plugin)           lr and its own options
    fused(config, *, device) -> dict              TorchRec's fused_params: the update of a table's rows inside the
                                                  backward; UserError where FBGEMM has no such kernel
    replicated(config, params) -> Optimizer       the same update for data-parallel tables, whose gradients arrive as
                                                  dense (E, D) tensors: rows without a gradient must not move
    dense(config, params) -> Optimizer            everything that is not a table
    state_bytes_per_row(config, dim) -> int       optimizer state of one table row of `dim` columns

`params` are tensors in a fixed order; `device` is a torch.device.  Every learning rate is a plain float in a param
group: `set_factor` scales them all by the schedule.  L2 (`l2`) adds l2 * w to the gradient of w; for a table, of the
rows that the batch touches and no others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels import registry
from trainer.config import Optim, Plugin

TABLES = "embeddings.ebc.embedding_bags."  # what the names of table weights begin with


def plugin(config: Plugin) -> Any:
    """The module of the config's kind."""
    return registry.load("trainer.optim", config.kind)


def fused_params(config: Optim, *, device: torch.device) -> dict[str, Any]:
    """What `sharding.parallelize` needs for the tables."""
    return plugin(config.sparse).fused(config.sparse, device=device)


def build_optimizer(config: Optim, dmp: nn.Module) -> Any:
    """The optimizer of everything in a DistributedModelParallel: TorchRec's CombinedOptimizer of

        ""            the fused update of sharded tables (`dmp.fused_optimizer`), which happens in the backward
        "replicated"  data-parallel tables, when there are any
        "dense"       the dense layers

    Its `state_dict()` names each state by its parameter, whatever the plan.
    """
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    rest = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    replicated = {name: p for name, p in rest.items() if name.startswith(TABLES)}
    dense = {name: p for name, p in rest.items() if name not in replicated}
    parts: list[Any] = [dmp.fused_optimizer]
    for params, build, options in (
        (replicated, plugin(config.sparse).replicated, config.sparse),
        (dense, plugin(config.dense).dense, config.dense),
    ):
        if params:
            parts.append(KeyedOptimizerWrapper(params, lambda p, build=build, options=options: build(options, p)))
    optimizer = CombinedOptimizer(parts)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_factor(optimizer: Any, factor: float) -> None:
    """Every learning rate becomes `factor` times its configured value.

    A fused table update takes the new rate over at the optimizer's next `zero_grad()`, so call this before it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_grad_norm(params: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
    return nn.utils.clip_grad_norm_(params, max_norm)


def touched_rows(grad_ED: Tensor) -> Tensor:
    """(E,) bool: rows with a gradient."""
    return (grad_ED != 0).any(dim=1)
