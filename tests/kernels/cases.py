"""Batches for the op, and a run of one backend on them whose results two backends can be compared by."""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.choice import choose
from kernels.ops import Spec, State, TableBatchedEmbeddingBag

CPU = torch.device("cpu")
# Triton's kernels are among the backends then, a hundred times slower than others.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class Batch:
    ids_N: Tensor
    offsets: Tensor
    weights_N: Tensor | None
    grad: Tensor


def batch(spec: Spec, *, bags: int, seed: int = 0, longest: int = 4, **kinds) -> Batch:
    """Bags of 0 to `longest` ids; `one_id` makes all ids of a table equal; ids / offsets: their dtypes."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(spec.features) * bags,), generator=rng)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    parts = []
    for f, t in enumerate(spec.features):
        count = int(offsets[(f + 1) * bags] - offsets[f * bags])
        rows = spec.tables[t].rows
        ids = torch.randint(0, rows, (count,), generator=rng)
        parts.append(torch.full_like(ids, rows - 1) if kinds.get("one_id") else ids)
    ids_N = torch.cat(parts).to(kinds.get("ids", torch.int64))
    shape = (len(ids_N), spec.tables[0].dim) if spec.pooling == "none" else (bags, spec.columns[-1])
    return Batch(
        ids_N=ids_N,
        offsets=offsets.to(kinds.get("offsets", torch.int64)),
        weights_N=torch.rand(len(ids_N), generator=rng) + 0.5 if spec.weighted else None,
        grad=torch.randn(shape, generator=rng).to(spec.output),
    )


@dataclass
class Result:
    outputs: list[Tensor] = field(default_factory=list)
    weight_grads: list[Tensor] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)

    def all(self) -> list[tuple[str, Tensor]]:
        found = [(f"output {i}", tensor) for i, tensor in enumerate(self.outputs)]
        found += [(f"gradient of weights {i}", tensor) for i, tensor in enumerate(self.weight_grads)]
        found += [(f"table {t}", tensor) for t, tensor in enumerate(self.tables)]
        return found + [(f"{name} {t}", view) for name, views in self.states.items() for t, view in enumerate(views)]


def fill(state: State, seed: int = 1) -> None:
    rng = torch.Generator().manual_seed(seed)
    for table in state.tables:
        table.copy_(torch.rand(table.shape, generator=rng) - 0.5)


def run(backend: str, spec: Spec, batches: list[Batch]) -> Result:
    bags = TableBatchedEmbeddingBag(spec, backend=backend)
    fill(bags.state)
    result = Result()
    for batch in batches:
        weights_N = batch.weights_N.clone().requires_grad_() if batch.weights_N is not None else None
        out = bags(batch.ids_N, batch.offsets, weights_N)
        result.outputs.append(out.detach().clone())
        out.backward(batch.grad)
        if weights_N is not None:
            result.weight_grads.append(weights_N.grad)
    result.tables = [table.clone() for table in bags.state.tables]
    result.states = {name: [v.clone() for v in bags.state.state_views(name)] for name in bags.state.states}
    return result


def assert_close(backend: str, spec: Spec, batches: list[Batch]) -> None:
    """A backend's results are the reference's, up to the rounding of its float32 sums and of 16-bit tables."""
    ours, true = run(backend, spec, batches), run("reference", spec, batches)
    for (name, got), (_, want) in zip(ours.all(), true.all(), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        narrow = min(
            (d for d in (spec.weights, spec.output) if d != torch.float32),
            key=lambda d: -torch.finfo(d).eps,
            default=torch.float32,
        )
        loose = 4 * len(batches) * torch.finfo(narrow).eps if narrow != torch.float32 else 3e-5
        torch.testing.assert_close(
            got.float(), want.float(), rtol=loose, atol=loose * 0.2, msg=lambda text, n=name: f"{backend} {n}: {text}"
        )


def serves(backend: str, spec: Spec) -> bool:
    """Whether a backend supports a spec; a refusal must say why."""
    from kernels import registry

    reason = registry.load("kernels.backends", backend).supports(spec, CPU)
    assert reason is None or len(reason) > 10
    if reason is None:
        assert choose(spec, CPU, backend).name == backend
    return reason is None
