"""Every backend in kernels/interactions/ does what the reference does; a new file there is tested as it is."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import registry
from kernels.errors import UserError
from kernels.interaction import BACKENDS, DotInteraction, Spec
from tests.kernels.cases import INTERPRETED

KINDS = registry.names(BACKENDS)
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True, params=KINDS)
def backend(request, monkeypatch):
    """One backend; every tensor it makes without filling it holds NaN."""
    empty = torch.empty

    def poisoned(*size, **kinds):
        tensor = empty(*size, **kinds)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-7)

    monkeypatch.setattr(torch, "empty", poisoned)
    return request.param


def run(backend, spec, *, samples, dense=F32, emb=F32, seed=0):
    """Output and gradients: [out_BY, gradient of dense_BD (if there is one), gradient of emb_BX]."""
    rng = torch.Generator().manual_seed(seed)
    dense_BD = torch.randn(samples, spec.dim, generator=rng).to(dense).requires_grad_() if spec.dense else None
    emb_BX = torch.randn(samples, spec.features * spec.dim, generator=rng).to(emb).requires_grad_()
    op = DotInteraction(spec, backend=backend)
    out_BY = op(dense_BD, emb_BX)
    out_BY.backward(torch.randn(samples, spec.columns, generator=rng).to(out_BY.dtype))
    return [out_BY.detach(), *([dense_BD.grad] if spec.dense else []), emb_BX.grad]


def skip_unless_served(backend, spec):
    reason = registry.load(BACKENDS, backend).supports(spec, CPU)
    if reason is not None:
        assert len(reason) > 10
        pytest.skip(f"{backend} says why it does not: {reason}")


def assert_close(backend, spec, **kinds):
    skip_unless_served(backend, spec)
    for got, want in zip(run(backend, spec, **kinds), run("reference", spec, **kinds), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
        loose = 2 * torch.finfo(got.dtype).eps if got.dtype == BF16 else 3e-6
        size = want.float().abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got.float(), want.float(), rtol=loose, atol=loose * max(size, 1.0))


@pytest.mark.parametrize(
    "features, dim, dense, samples",
    [
        (26, 64, True, 33),
        (26, 16, True, 17),
        (4, 16, False, 5),
        (2, 3, True, 7),  # odd in everything
        (1, 4, True, 3),  # a single pair
        (2, 1, False, 3),
        (39, 20, True, 2),
        (26, 64, True, 1),
        (26, 64, True, 0),
    ],
)
def test_shapes(backend, features, dim, dense, samples):
    assert_close(backend, Spec(features=features, dim=dim, dense=dense), samples=samples)


@pytest.mark.parametrize("dense, emb", [(BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
def test_dtypes(backend, dense, emb):
    assert_close(backend, Spec(features=26, dim=16), samples=9, dense=dense, emb=emb)


@settings(
    max_examples=6 if INTERPRETED else 15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(1, 40), st.sampled_from((4, 16)), st.booleans(), st.integers(0, 40))
def test_any_count_of_vectors(backend, features, dim, dense, samples):
    if features + dense >= 2:
        assert_close(backend, Spec(features=features, dim=dim, dense=dense), samples=samples)


def test_the_number_of_threads_does_not_matter(backend):
    spec = Spec(features=26, dim=16)
    skip_unless_served(backend, spec)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(backend, spec, samples=257))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_views_that_are_not_contiguous(backend):
    spec = Spec(features=3, dim=4)
    skip_unless_served(backend, spec)
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 20, generator=rng)
    op, true = DotInteraction(spec, backend=backend), DotInteraction(spec, backend="reference")
    torch.testing.assert_close(op(wide[:, :4], wide[:, 6:18]), true(wide[:, :4], wide[:, 6:18]))


def test_errors(backend):
    op = DotInteraction(Spec(features=3, dim=4), backend=backend)
    with pytest.raises(UserError, match="missing"):
        op(None, torch.zeros(2, 12))
    with pytest.raises(UserError, match=r"\(2, 13\).*\(samples, 12\)"):
        op(torch.zeros(2, 4), torch.zeros(2, 13))
    with pytest.raises(UserError, match="3 dense vectors for 2 samples"):
        op(torch.zeros(3, 4), torch.zeros(2, 12))
    with pytest.raises(UserError, match="two vectors"):
        Spec(features=1, dim=4, dense=False)


def test_the_choice_says_why():
    choice = DotInteraction(Spec(features=3, dim=4)).choice("cpu")
    assert choice.name in KINDS and "fastest on cpu" in choice.why
    with pytest.raises(UserError, match="reference"):
        DotInteraction(Spec(features=3, dim=4), backend="referense").choice("cpu")
