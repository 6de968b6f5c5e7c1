"""Models against their formulas, and what holds for every kind found in trainer/models."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from kernels import registry
from kernels.errors import UserError
from trainer.models import dcn, dlrm
from trainer.models.base import MLP, ModelInputs, init_dense


def made(config, inputs: ModelInputs, seed: int = 3) -> nn.Module:
    """As parallelize makes it: built on the meta device, materialised, initialised."""
    with torch.device("meta"):
        module = registry.load("trainer.models", config.kind).build(config, inputs)
    module = module.to_empty(device="cpu")
    init_dense(module, seed=seed)
    return module


def data(inputs: ModelInputs, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inputs.dense, generator=generator), torch.randn(
        rows, sum(inputs.dims), generator=generator
    )


def by_hand(mlp: MLP, x: list[float], *, last_relu: bool) -> list[float]:
    linears = [m for m in mlp if isinstance(m, nn.Linear)]
    for i, linear in enumerate(linears):
        w, b = linear.weight.tolist(), linear.bias.tolist()
        x = [sum(wij * xj for wij, xj in zip(wi, x, strict=True)) + bi for wi, bi in zip(w, b, strict=True)]
        if last_relu or i + 1 < len(linears):
            x = [max(0.0, v) for v in x]
    return x


@pytest.mark.parametrize("dense", [3, 0])
def test_dlrm_is_its_formula(dense):
    inputs = ModelInputs(dense=dense, dims=(4, 4, 4), tasks=2)
    model = made(dlrm.Config(bottom=(6, 4), top=(7, 2)), inputs)
    dense_BK, emb_BX = data(inputs)
    logits_BT = model(dense_BK, emb_BX)
    for b in range(len(emb_BX)):
        vectors = [emb_BX[b, 4 * f : 4 * f + 4].tolist() for f in range(3)]
        joined: list[float] = []
        if dense:
            joined = by_hand(model.bottom, dense_BK[b].tolist(), last_relu=True)
            vectors = [joined, *vectors]
        pairs = [
            sum(map(math.prod, zip(vectors[i], vectors[j], strict=True)))
            for i, j in ((i, j) for i in range(len(vectors)) for j in range(i))
        ]
        expected = by_hand(model.top, joined + pairs, last_relu=False)
        torch.testing.assert_close(logits_BT[b], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert dense or model.bottom is None


def test_dlrm_cat_takes_any_dims():
    inputs = ModelInputs(dense=2, dims=(1, 5, 3))
    model = made(dlrm.Config(bottom=(4,), top=(6, 1), interaction="cat"), inputs)
    dense_BK, emb_BX = data(inputs)
    joined_BX = torch.cat([model.bottom(dense_BK), emb_BX], dim=1)
    torch.testing.assert_close(model(dense_BK, emb_BX), model.top(joined_BX))


@pytest.mark.parametrize(("dense", "bottom"), [(3, (6, 4)), (3, ()), (0, ())])
def test_dcn_is_its_formula(dense, bottom):
    inputs = ModelInputs(dense=dense, dims=(2, 5))
    model = made(dcn.Config(bottom=bottom, cross_layers=2, rank=3, top=(6, 1)), inputs)
    with torch.no_grad():
        for layer in model.cross:
            layer.bias_X.copy_(torch.randn(layer.bias_X.shape, generator=torch.Generator().manual_seed(1)))
    dense_BK, emb_BX = data(inputs)
    front = model.bottom(dense_BK) if bottom else dense_BK
    x0 = torch.cat([front, emb_BX], dim=1).double()
    x = x0
    for layer in model.cross:
        u, v, bias = layer.u_XR.double(), layer.v_RX.T.double(), layer.bias_X.double()
        inner = torch.stack([u @ (v.T @ row) + bias for row in x])
        x = x0 * inner + x
    torch.testing.assert_close(model(dense_BK, emb_BX), model.top(x.float()), rtol=1e-4, atol=1e-5)


def test_dropout_and_batch_norm_stand_after_each_hidden_layer():
    names = [type(m).__name__ for m in MLP(4, (3, 2), last_relu=False, dropout=0.5, batch_norm=True)]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    names = [type(m).__name__ for m in MLP(4, (3,), last_relu=True, dropout=0.5, batch_norm=True)]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]


SMALLEST = {
    "dlrm": dlrm.Config(bottom=(4,), top=(8, 2)),
    "dcn": dcn.Config(bottom=(4,), rank=2, top=(8, 2)),
}
INPUTS = ModelInputs(dense=3, dims=(4, 4), tasks=2, features=("f", "g"))


def test_every_kind_is_tested():
    assert set(SMALLEST) == set(registry.names("trainer.models"))


@pytest.mark.parametrize("kind", sorted(SMALLEST))
class TestEveryKind:
    def test_every_parameter_gets_a_gradient(self, kind):
        model = made(SMALLEST[kind], INPUTS)
        model(*data(INPUTS)).square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing

    def test_one_logit_per_task_also_without_dense_columns(self, kind):
        for dense in (3, 0):
            inputs = ModelInputs(dense=dense, dims=(4, 4), tasks=2)
            dense_BK, emb_BX = data(inputs)
            emb_BX.requires_grad_()
            logits_BT = made(SMALLEST[kind], inputs)(dense_BK, emb_BX)
            assert logits_BT.shape == (5, 2) and logits_BT.isfinite().all()
            logits_BT.sum().backward()
            assert emb_BX.grad.isfinite().all() and (emb_BX.grad != 0).any()

    def test_equal_seeds_give_equal_weights_and_others_do_not(self, kind):
        first, again, other = (made(SMALLEST[kind], INPUTS, seed=s).state_dict() for s in (3, 3, 4))
        assert all(torch.equal(first[k], again[k]) for k in first)
        drawn = [k for k in first if first[k].std() > 0]
        assert drawn and all(not torch.equal(first[k], other[k]) for k in drawn)

    def test_a_top_that_does_not_fit_the_labels_is_refused(self, kind):
        config = type(SMALLEST[kind])(**SMALLEST[kind].model_dump() | {"top": (8, 1)})
        with pytest.raises(UserError, match=r"model\.top = \[8, 1\] ends in 1, but the data has 2 labels.*\[8, 2\]"):
            made(config, INPUTS)

    def test_bf16_autocast_is_close(self, kind):
        model = made(SMALLEST[kind], INPUTS)
        dense_BK, emb_BX = data(INPUTS, rows=64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(dense_BK.bfloat16(), emb_BX.bfloat16())
        assert (low.float() - model(dense_BK, emb_BX)).abs().mean() < 0.05


def test_linear_layers_start_as_the_reference_dlrms():
    inputs = ModelInputs(dense=300, dims=(200, 200))
    model = made(dlrm.Config(bottom=(400, 200), top=(1,)), inputs)
    first = model.bottom[0]
    assert (
        abs(first.weight.std() / math.sqrt(2 / 700) - 1) < 0.02
        and abs(first.bias.std() / math.sqrt(1 / 400) - 1) < 0.12
    )


@pytest.mark.parametrize(
    ("config", "inputs", "words"),
    [
        (
            dlrm.Config(bottom=(4,), top=(1,)),
            ModelInputs(dense=3, dims=(4, 8, 4, 2), features=("a", "b", "c", "d")),
            ["dot", "most have 4", "b (8), d (2)", "tables.dim"],
        ),
        (
            dlrm.Config(bottom=(8,), top=(1,)),
            ModelInputs(dense=3, dims=(4, 4)),
            ["[8]", "ends in 8", "dim is 4", "cat"],
        ),
        (dlrm.Config(top=(1,)), ModelInputs(dense=13, dims=(4, 4)), ["model.bottom is empty", "13 dense"]),
        (dlrm.Config(top=(1,)), ModelInputs(dense=0, dims=(4,)), ["two vectors", "cat"]),
        (dlrm.Config(top=(1,)), ModelInputs(dense=0, dims=()), ["no categorical"]),
        (dcn.Config(rank=64, top=(1,)), ModelInputs(dense=2, dims=(4, 4)), ["model.rank = 64", "width 10"]),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused_with_their_numbers(config, inputs, words):
    with pytest.raises(UserError) as error:
        made(config, inputs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_checking_a_config_does_not_import_torchrec():
    kinds = itertools.chain(
        (f"trainer.models.{k}" for k in registry.names("trainer.models")),
        (f"trainer.optim.{k}" for k in registry.names("trainer.optim")),
    )
    code = "import sys\n" + "".join(f"import {k}\n" for k in kinds) + "assert 'torchrec' not in sys.modules"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
