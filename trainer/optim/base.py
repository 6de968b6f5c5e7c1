"""The contract of an optimizer, and the one optimizer of a run that is put together from them.

An optimizer is a file in this folder.  It holds

    class Config(trainer.config.Plugin)           lr and its own options; l2
    table(config) -> kernels.ops.Optimizer        the update of a table's rows inside the backward; UserError for
                                                  options that tables cannot have
    dense(config, params) -> Optimizer            everything that is not a table
    row_state(p_ED) -> dict[str, Tensor]          zeros: the state of a table's rows, each (E, ...), by name
    update_rows(config, w_UD, g_UD, states, *, lr, step)
                                                  the update in plain torch, in place, of the rows that a batch touches
                                                  and of their states (in the order of row_state); step counts from 1
    state_bytes_per_row(config, dim) -> int       optimizer state of one table row of `dim` columns

`params` are tensors in a fixed order.  Every learning rate is a plain float in a param
group: `set_factor` scales them all by the schedule.  `l2` adds l2 * w to the gradient of w; for a table, of the rows
that the batch touches and no others.  Where FBGEMM's kernel was asked for and does not have it, `update_rows` takes the
kernel's place.

data_parallel tables, whose gradients arrive as dense (E, D) tensors, are updated by `update_rows` too: `RowOptimizer`.

Shapes: E rows of a table, D columns, U rows that the batch touches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels import registry
from trainer.config import Optim, Plugin

# What the names of table weights begin with: the collections of sharding.embeddings.
TABLES = tuple(f"embeddings.{ebc}.embedding_bags." for ebc in ("ebc", "ebc_per_id", "ebc_by_id"))


def table_of(parameter: str) -> str:
    """embeddings.ebc.embedding_bags.NAME.weight -> NAME; table names have no dots."""
    return parameter.split(".")[3]


def plugin(config: Plugin) -> Any:
    """The module of the config's kind."""
    return registry.load("trainer.optim", config.kind)


def l2_of(config: Any) -> dict[str, Any]:
    """`l2` of a Config as arguments of kernels.ops.Optimizer."""
    return {"weight_decay": config.l2, "decay": "l2"} if config.l2 else {}


def fused(params: Sequence[Tensor]) -> bool | None:
    """Whether torch's optimizer makes its update in one pass over a parameter: on the CPU; elsewhere torch chooses."""
    return True if all(p.device.type == "cpu" and p.is_floating_point() for p in params) else None


def table_update(config: Optim, plan: Any, *, device: torch.device, kernel: str) -> dict[str, Any]:
    """How the tables of a plan are looked up and updated, as keyword arguments of `sharding.parallelize`:

    kernel: as given, but FBGEMM's for "auto" on a GPU; optimizer: None when all tables are data_parallel;
    row_update: None unless the kernel is FBGEMM's and lacks what is asked.
    """
    from sharding.fbgemm import lacks_decay
    from sharding.plan import has_fused_tables

    if not has_fused_tables(plan):
        return {"kernel": "fbgemm", "optimizer": None, "row_update": None}
    optimizer = plugin(config.sparse).table(config.sparse)
    if kernel == "auto" and device.type != "cpu":
        kernel = "fbgemm"  # the triton backend has not been measured beside it on a GPU; it serves when asked for
    replace = kernel == "fbgemm" and lacks_decay(optimizer, device=device)
    update = partial(plugin(config.sparse).update_rows, config.sparse, step=None) if replace else None
    return {"kernel": kernel, "optimizer": optimizer, "row_update": update}


def build_optimizer(config: Optim, dmp: nn.Module) -> Any:
    """The optimizer of everything in a DistributedModelParallel: TorchRec's CombinedOptimizer of

        the fused update of sharded tables (`dmp.fused_optimizer`), which happens in the backward
        RowOptimizer of the data_parallel tables, when there are any
        the dense layers' optimizer

    Its `state_dict()` names each state by its parameter, whatever the plan.
    """
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    rest = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    replicated = {name: p for name, p in rest.items() if name.startswith(TABLES)}
    dense = {name: p for name, p in rest.items() if name not in replicated}
    parts: list[Any] = [dmp.fused_optimizer]
    if replicated:
        parts.append(KeyedOptimizerWrapper(replicated, partial(RowOptimizer, config.sparse)))
    if dense:
        parts.append(KeyedOptimizerWrapper(dense, partial(plugin(config.dense).dense, config.dense)))
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


class RowOptimizer(torch.optim.Optimizer):
    """`update_rows` on dense gradients: the rows whose gradient is not all zeros count as touched.

    A vector counts as one row.
    """

    def __init__(self, config: Plugin, params: Sequence[Tensor]) -> None:
        super().__init__(params, {"lr": config.lr})
        self.config, self.kind = config, plugin(config)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros(()), **self.kind.row_state(_rows(p.detach()))}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step, *states = self.state[p].values()
                step += 1
                w_ED, g_ED = _rows(p.detach()), _rows(p.grad)
                rows_U = (g_ED != 0).any(dim=1).nonzero().flatten()
                w_UD, *states_U = (tensor[rows_U] for tensor in (w_ED, *states))
                self.kind.update_rows(self.config, w_UD, g_ED[rows_U], states_U, lr=group["lr"], step=int(step))
                for tensor, new in zip((w_ED, *states), (w_UD, *states_U), strict=True):
                    tensor[rows_U] = new


def _rows(p: Tensor) -> Tensor:
    return p if p.dim() == 2 else p.view(1, -1)
