"""Optimizers: formulas against loops, and the fused update of sharded tables against the plain one."""

import math

import pytest
import torch
from torch import Tensor

from kernels import registry
from kernels.errors import UserError
from sharding.fbgemm import fused_params
from sharding.tables.base import Table
from tests.models import PlainModel, build_sharded, make_batches, table_shards, train_plain, train_sharded, whole_tables
from tests.ranks import run_ranks
from trainer.config import Optim, Plugin, Schedule
from trainer.models import dlrm
from trainer.optim import adagrad, adam, rowwise_adagrad, sgd
from trainer.optim.base import RowOptimizer, plugin

FEATURES = ("a", "b", "c")
MODEL = dlrm.Config(bottom=(8,), top=(8, 1))
DATA = {"steps": 20, "rows": 16, "dense": 3, "last_rows": 7}


def tables(sharding: str) -> tuple[Table, ...]:
    return (
        Table(name="ta", rows=500, dim=8, features=("a",), sharding=sharding, init_std=0.3),
        Table(name="tbc", rows=300, dim=8, features=("b", "c"), sharding=sharding, init_std=0.3),
    )


def optim(sparse: Plugin, dense: Plugin | None = None, **more) -> Optim:
    return Optim(sparse=sparse, dense=dense or sgd.Config(lr=0.05), **more)


def train(sharding: str, config: Optim, pipeline: str = "plain") -> tuple[list[float], list]:
    built = build_sharded(tables(sharding), FEATURES, MODEL, config, dense=3, pipeline=pipeline)
    losses = train_sharded(built, make_batches(tables(sharding), FEATURES, **DATA))
    return losses, [(n, r, c, s.clone()) for n, r, c, s in table_shards(built.dmp)]


def train_all(cases: list[tuple[str, Optim, str]]) -> list[tuple[list[float], list]]:
    return [train(*case) for case in cases]


CASES = {
    "rowwise_adagrad": [
        (s, optim(rowwise_adagrad.Config(lr=0.1)), p)
        for s, p in (("table_wise", "overlapped"), ("row_wise", "plain"), ("data_parallel", "plain"))
    ],
    "rowwise_adagrad with l2": [
        (s, optim(rowwise_adagrad.Config(lr=0.1, l2=0.02)), p)
        for s, p in (("table_wise", "overlapped"), ("table_row_wise", "plain"), ("data_parallel", "plain"))
    ],
    "sgd and adagrad with l2": [
        ("column_wise", optim(sgd.Config(lr=0.5, l2=0.02)), "plain"),
        ("grid_shard", optim(adagrad.Config(lr=0.1, l2=0.02)), "plain"),
    ],
    "adagrad": [
        (s, optim(adagrad.Config(lr=0.1, eps=1e-6), adagrad.Config(lr=0.05)), "plain")
        for s in ("column_wise", "row_wise", "data_parallel")
    ],
    "adam": [("data_parallel", optim(adam.Config(lr=0.02), adam.Config(lr=0.01)), "plain")],
    "momentum and l2 on the dense layers": [
        ("table_wise", optim(sgd.Config(lr=0.5), sgd.Config(lr=0.05, momentum=0.9, l2=0.01)), "overlapped")
    ],
    "schedule": [
        (
            "row_wise",
            optim(
                rowwise_adagrad.Config(lr=0.1),
                adam.Config(lr=0.01),
                schedule=Schedule(warmup_steps=5, decay="poly", decay_start=8, decay_steps=10),
            ),
            pipeline,
        )
        for pipeline in ("plain", "overlapped")
    ],
    "clipping": [("table_wise", optim(sgd.Config(lr=0.5), clip_grad_norm=0.05), p) for p in ("plain", "overlapped")],
}


@pytest.fixture(scope="module")
def sharded() -> dict[str, list]:
    """All cases on 2 ranks, in one set of processes: case -> [(losses, whole tables)]."""
    flat = [case for cases in CASES.values() for case in cases]
    by_rank = run_ranks(train_all, 2, flat)
    results = []
    for i, (sharding, _, _) in enumerate(flat):
        results.append((by_rank[0][i][0], whole_tables(tables(sharding), [rank[i][1] for rank in by_rank])))
    found, at = {}, 0
    for name, cases in CASES.items():
        found[name] = results[at : at + len(cases)]
        at += len(cases)
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_sharded_updates_are_those_of_whole_tables(name, sharded):
    for (sharding, config, pipeline), (losses, whole) in zip(CASES[name], sharded[name], strict=True):
        plain = PlainModel(tables(sharding), FEATURES, MODEL, dense=3)
        expected = train_plain(plain, config, make_batches(tables(sharding), FEATURES, **DATA))
        worst = max(abs(x - y) for x, y in zip(losses, expected, strict=True))
        assert worst <= 1e-5, f"{sharding}, {pipeline}: {worst}"
        for table, weights_ED in whole.items():
            torch.testing.assert_close(weights_ED, plain.weights[table].detach(), rtol=1e-4, atol=2e-5)


def test_schedule_and_clipping_change_the_losses(sharded):
    first = sharded["rowwise_adagrad"][1][0]
    assert abs(first[10] - sharded["schedule"][0][0][10]) > 1e-3
    unclipped = PlainModel(tables("table_wise"), FEATURES, MODEL, dense=3)
    losses = train_plain(unclipped, optim(sgd.Config(lr=0.5)), make_batches(tables("table_wise"), FEATURES, **DATA))
    assert abs(losses[-1] - sharded["clipping"][0][0][-1]) > 1e-3


def test_l2_shrinks_the_rows_of_the_batch_and_no_others(sharded):
    touched = {t.name: torch.zeros(t.rows, dtype=torch.bool) for t in tables("auto")}
    for batch in make_batches(tables("auto"), FEATURES, **DATA):
        for table in tables("auto"):
            for feature in table.features:
                touched[table.name][batch.ids[feature].values()] = True
    start = PlainModel(tables("auto"), FEATURES, MODEL, dense=3)
    for _, whole in sharded["rowwise_adagrad with l2"] + sharded["sgd and adagrad with l2"]:
        for name, weights_ED in whole.items():
            moved = (weights_ED != start.weights[name]).any(dim=1)
            assert not touched[name].all() and torch.equal(moved, touched[name])


def one_step(config: Plugin, weights_ED: Tensor, grads: list[Tensor]) -> Tensor:
    p = torch.nn.Parameter(weights_ED.clone())
    optimizer = RowOptimizer(config, [p])
    for grad_ED in grads:
        p.grad = grad_ED.clone()
        optimizer.step()
    return p.detach()


GRADS = [torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.5, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.0, 0.0]])]
WEIGHTS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def test_rowwise_adagrad_by_hand():
    found = one_step(rowwise_adagrad.Config(lr=0.1, eps=1e-3, l2=0.5), WEIGHTS, GRADS)
    expected = WEIGHTS.tolist()
    sums = [0.0] * 3
    for grad in GRADS:
        for r, row in enumerate(grad.tolist()):
            if any(row):
                g = [gi + 0.5 * wi for gi, wi in zip(row, expected[r], strict=True)]
                sums[r] += sum(x * x for x in g) / 2
                expected[r] = [w - 0.1 * x / (math.sqrt(sums[r]) + 1e-3) for w, x in zip(expected[r], g, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_adam_on_tables_by_hand():
    found = one_step(adam.Config(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3), WEIGHTS, GRADS)
    expected, m, v = WEIGHTS.tolist(), [[0.0] * 2 for _ in range(3)], [[0.0] * 2 for _ in range(3)]
    for step, grad in enumerate(GRADS, start=1):
        for r, row in enumerate(grad.tolist()):
            for c, g in enumerate(row):
                if any(row):
                    m[r][c] = 0.8 * m[r][c] + 0.2 * g
                    v[r][c] = 0.9 * v[r][c] + 0.1 * g * g
                    expected[r][c] -= 0.1 * (m[r][c] / (1 - 0.8**step)) / (math.sqrt(v[r][c] / (1 - 0.9**step)) + 1e-3)
    torch.testing.assert_close(found, torch.tensor(expected))


CONFIGS = {
    "sgd": sgd.Config(lr=0.1),
    "adagrad": adagrad.Config(lr=0.1),
    "rowwise_adagrad": rowwise_adagrad.Config(lr=0.1),
    "adam": adam.Config(lr=0.1),
}


def test_every_kind_is_tested():
    assert set(CONFIGS) == set(registry.names("trainer.optim"))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
class TestEveryKind:
    def test_a_row_without_a_gradient_stays(self, kind):
        after = one_step(CONFIGS[kind], WEIGHTS, GRADS)
        assert torch.equal(after[1], WEIGHTS[1]) and (after[0] != WEIGHTS[0]).all()

    def test_the_dense_update_takes_vectors_and_matrices(self, kind):
        params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
        optimizer = plugin(CONFIGS[kind]).dense(CONFIGS[kind], params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all((p < 1).all() for p in params)

    def test_state_bytes_are_those_of_the_state(self, kind):
        p = torch.nn.Parameter(torch.ones(5, 8))
        optimizer = RowOptimizer(CONFIGS[kind], [p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        held = sum(4 * v.numel() for v in optimizer.state[p].values() if torch.is_tensor(v) and v.numel() > 1)
        assert plugin(CONFIGS[kind]).state_bytes_per_row(CONFIGS[kind], 8) * 5 == held


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (adam.Config(lr=0.1), ["adam", "CPU", "rowwise_adagrad", "kernels.embedding_bag"]),
        (sgd.Config(lr=0.1, momentum=0.9), ["optim.sparse.momentum = 0.9"]),
    ],
)
def test_what_tables_cannot_have_is_refused(config, words):
    with pytest.raises(UserError) as error:
        optimizer = plugin(config).table(config)
        fused_params(optimizer, device=torch.device("cpu"))
    assert all(word in str(error.value) for word in words), str(error.value)
