"""Rows of int8: the arithmetic, and that every backend which has them makes the reference's very bits."""

import pytest
import torch

from kernels import registry
from kernels.choice import choose
from kernels.errors import UserError
from kernels.int8 import MOST, dequantise, quantise
from kernels.ops import Optimizer, Spec, Table, TableBatchedEmbeddingBag
from tests.kernels.cases import CPU, batch

TABLES = (Table(rows=13, dim=16), Table(rows=101, dim=5))
SPEC = Spec(tables=TABLES, features=(0, 1, 0), weights=torch.int8, optimizer=Optimizer(lr=0.1))


def test_values_are_within_half_a_step_and_stay_when_written_again():
    w_UD = torch.randn(1000, 13) * torch.exp(4 * torch.randn(1000, 1))
    numbers_UD, scale_U = quantise(w_UD)
    assert (numbers_UD.abs().amax(1) >= 64).all() and (numbers_UD.abs() <= MOST).all()
    assert ((dequantise(numbers_UD, scale_U) - w_UD).abs() <= scale_U[:, None] / 2).all()
    again_UD, same_U = quantise(dequantise(numbers_UD, scale_U))
    assert torch.equal(again_UD, numbers_UD) and torch.equal(same_U, scale_U)


def test_awkward_rows():
    inf, nan = float("inf"), float("nan")
    numbers_UD, scale_U = quantise(
        torch.tensor([[0.0, 0.0], [127.0, -127.0], [128.0, 1.0], [1e-45, 0], [inf, 1], [nan, 1]])
    )
    assert numbers_UD[:3].tolist() == [[0, 0], [127, -127], [64, 0]] and scale_U[1:3].tolist() == [1.0, 2.0]
    values = dequantise(numbers_UD, scale_U)
    assert values[:4].isfinite().all() and values[4:].isnan().all()


def test_rounding_at_random_is_right_on_average():
    w_UD = torch.full((20_000, 2), 0.3)
    w_UD[:, 0] = 1.0
    bits_UD = torch.randint(0, 1 << 32, (20_000, 2), generator=torch.Generator().manual_seed(1))
    values = dequantise(*quantise(w_UD, bits_UD))
    assert (values[:, 0] == 1).all() and values[:, 1].unique().numel() == 2
    assert abs(values[:, 1].double().mean().item() - 0.3) < 2e-4


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam"])
@pytest.mark.parametrize("backend", [b for b in registry.names("kernels.backends") if b != "reference"])
def test_backends_do_what_the_reference_does(backend, kind, stochastic):
    optimizer = Optimizer(kind=kind, lr=0.1, eps=1e-4)
    spec = Spec(tables=TABLES, features=(0, 1, 0), weights=torch.int8, stochastic=stochastic, optimizer=optimizer)
    if (reason := registry.load("kernels.backends", backend).supports(spec, CPU)) is not None:
        with pytest.raises(UserError, match=r"(?s)cannot serve"):
            choose(spec, CPU, backend)
        pytest.skip(reason)
    found = []
    for name in (backend, "reference"):
        bags = TableBatchedEmbeddingBag(spec, backend=name)
        rng = torch.Generator().manual_seed(2)
        for t, table in enumerate(TABLES):
            bags.state.write(t, torch.rand(table.rows, table.dim, generator=rng) - 0.5)
        outputs = []
        for seed in range(3):
            made = batch(spec, bags=11, seed=seed)
            out = bags(made.ids_N, made.offsets)
            out.backward(made.grad)
            outputs.append(out.detach())
        found.append((outputs, bags.state))
    (ours, state), (theirs, true) = found
    for t in range(len(TABLES)):
        step_E = torch.maximum(state.scale_views[t], true.scale_views[t])
        gap_ED = (state.read(t) - true.read(t)).abs()
        assert (gap_ED <= 2 * step_E[:, None]).all() and (gap_ED == 0).double().mean() > 0.98
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_auto_takes_a_backend_that_can_and_bytes_count_scales():
    assert choose(SPEC, CPU).name in ("cpu", "reference")
    state = TableBatchedEmbeddingBag(SPEC).state
    assert state.bytes() == state.weights.numel() + 4 * state.scales.numel() + 4 * state.states["momentum1"].numel()
