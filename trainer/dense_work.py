"""Counts what the dense layers do, without doing it: a forward and a backward on the meta device.

    dense_work(net, inputs, ...) -> DenseWork       for the planner's cost model

Matrix products are counted in FLOPs, every other operation in bytes read and written; DLRM's dots, which are one op, in
both.  Counted at two batch sizes; both grow linearly with the rows, so two points give what is per row and what is not.

Shapes: B rows, K dense inputs, X sum of the features' dims, T tasks.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kernels import interaction
from sharding.work import DenseWork
from trainer.models.base import ModelInputs

FEW, MANY = 64, 128  # rows


class _Counter(TorchDispatchMode):
    """Adds up the operations that run under it; views and shapes are free."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.ops = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        else:
            read = [
                t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, torch.Tensor)
            ]
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *made))
        self.made += sum(t.numel() * t.element_size() for t in made)
        self.ops += 1
        return out


class _Dots:
    """Stands for a kernel of kernels/interactions/: makes what it makes, and counts what it reads and multiplies."""

    def __init__(self, spec: interaction.Spec, counter: _Counter) -> None:
        self.spec, self.counter = spec, counter

    def forward(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        self._count(dense_BD, emb_BX, products=1)
        return self._made(emb_BX, emb_BX.shape[0], self.spec.columns)

    def backward(self, grad_BY: Tensor, dense_BD: Tensor | None, emb_BX: Tensor) -> tuple[Tensor | None, Tensor]:
        self._count(grad_BY, dense_BD, emb_BX, products=1)  # of G, which is symmetric, with the vectors
        return None if dense_BD is None else self._made(dense_BD, *dense_BD.shape), self._made(emb_BX, *emb_BX.shape)

    @staticmethod
    def _made(like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device)  # given no tensor: none is counted as read

    def _count(self, *read: Tensor | None, products: int) -> None:
        given = [t for t in read if t is not None]
        self.counter.bytes += sum(t.numel() * t.element_size() for t in given)
        self.counter.flops += products * 2 * given[0].shape[0] * self.spec.vectors**2 * self.spec.dim


def dense_work(net: nn.Module, inputs: ModelInputs, *, state_bytes_per_parameter: float) -> DenseWork:
    """What `net`, a model of trainer/models on the meta device, costs a step.  Its parameters' gradients stay None."""
    few, many = _count(net, inputs, FEW), _count(net, inputs, MANY)
    rows = MANY - FEW
    flops, moved = (many.flops - few.flops) / rows, (many.bytes - few.bytes) / rows
    return DenseWork(
        flops_per_row=flops,
        bytes_per_row=moved,
        bytes_fixed=max(0.0, few.bytes - FEW * moved),
        ops=many.ops,
        parameters=sum(p.numel() for p in net.parameters()),
        state_per_parameter=state_bytes_per_parameter,
        activation_bytes_per_row=(many.made - few.made) / rows / 2,  # the backward's half is gone when it is made
        batch_bytes_per_row=4 * inputs.dense + 4 * inputs.tasks + 12,
    )


def _count(net: nn.Module, inputs: ModelInputs, rows: int) -> _Counter:
    meta = torch.device("meta")
    dense_BK = torch.empty(rows, inputs.dense, device=meta)
    emb_BX = torch.empty(rows, sum(inputs.dims), device=meta, requires_grad=True)
    labels_BT = torch.empty(rows, inputs.tasks, device=meta)
    parameters = [p for p in net.parameters() if p.requires_grad]
    counter = _Counter()
    with contextlib.ExitStack() as stack:
        for module in net.modules():
            if isinstance(module, interaction.DotInteraction):
                stack.enter_context(module.served_by(_Dots(module.spec, counter), "meta"))
        stack.enter_context(counter)
        logits_BT = net(dense_BK, emb_BX)
        loss = nn.functional.binary_cross_entropy_with_logits(logits_BT, labels_BT)
        torch.autograd.grad(loss, [emb_BX, *parameters], allow_unused=True)
    return counter
