"""Both pipelines: the same losses, also around evaluations; precision, regularisation, and where a NaN came from."""

import math

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag

from kernels.errors import UserError
from sharding.plan import embeddings_of
from sharding.tables.base import Table
from tests.models import build_sharded, make_batches, part, table_shards, train_sharded
from tests.ranks import run_ranks
from trainer.config import Optim, Schedule
from trainer.data.batch import Batch
from trainer.models import dcn, dlrm
from trainer.optim import adam, rowwise_adagrad, sgd
from trainer.pipeline import PHASES
from trainer.task import NonFiniteLoss

FEATURES = ("a", "b", "c")
DATA = {"steps": 12, "rows": 16, "dense": 3, "last_rows": 6}
OPTIM = Optim(sparse=rowwise_adagrad.Config(lr=0.1), dense=adam.Config(lr=0.01))


def tables() -> tuple[Table, ...]:
    """One of each: row-wise with mean pooling, table-wise, data-parallel."""
    return (
        Table(name="ta", rows=50, dim=8, features=("a",), sharding="row_wise", pooling="mean", init_std=0.3),
        Table(name="tb", rows=30, dim=8, features=("b",), sharding="table_wise", init_std=0.3),
        Table(name="tc", rows=7, dim=8, features=("c",), sharding="data_parallel", init_std=0.3),
    )


def build(kind: str, **more):
    model = more.pop("model", dlrm.Config(bottom=(8,), top=(8, 1)))
    return build_sharded(tables(), FEATURES, model, more.pop("optim", OPTIM), dense=3, pipeline=kind, **more)


def mine(batches: list[Batch]):
    return iter([part(batch, dist.get_rank(), dist.get_world_size()) for batch in batches])


def with_evaluations(kind: str) -> dict:
    """Train with an evaluation after some steps; what came out and what was seen on the way."""
    pipeline = build(kind)
    batches = make_batches(tables(), FEATURES, **DATA)
    held_out = next(mine(make_batches(tables(), FEATURES, steps=1, rows=16, dense=3, seed=9)))
    stream, losses, evaluated, rows, phases = mine(batches), [], [], [], []
    for step in range(DATA["steps"]):
        loss, logits_BT, batch = pipeline.step(stream)
        losses.append(loss.item())
        rows.append(batch.row_B.tolist())
        phases.append(dict(pipeline.phases_ms))
        if kind == "overlapped":  # its tracing found the collection: the ids travel a batch ahead
            assert len(pipeline._inner._pipelined_modules) == 1
        assert logits_BT.dtype == torch.float32 and not logits_BT.requires_grad and not loss.requires_grad
        if step in (0, 4, 5, 10, 11):
            with pipeline.paused(), torch.no_grad():
                pipeline.dmp.eval()
                evaluated.append(pipeline.dmp(held_out)[0].item())
                pipeline.dmp.train()
    ended = False
    try:
        pipeline.step(stream)
    except StopIteration:
        ended = True
    return {
        "losses": losses, "evaluated": evaluated, "rows": rows, "phases": phases, "ended": ended,
 "steps": pipeline.step_number,
    }  # fmt: skip


def test_overlapped_is_plain_also_around_evaluations():
    plain, overlapped = (run_ranks(with_evaluations, 2, kind) for kind in ("plain", "overlapped"))
    for rank in range(2):
        p, o = plain[rank], overlapped[rank]
        assert p["losses"] == pytest.approx(o["losses"], abs=1e-6) and len(p["losses"]) == DATA["steps"]
        assert p["evaluated"] == pytest.approx(o["evaluated"], abs=1e-6) and len(set(p["evaluated"])) > 3
        assert p["rows"] == o["rows"] and p["ended"] and o["ended"] and p["steps"] == o["steps"] == DATA["steps"]
        for phases in p["phases"] + o["phases"]:
            assert set(phases) == set(PHASES) and all(ms >= 0 for ms in phases.values())


def variants() -> dict[str, list[float]]:
    batches = make_batches(tables(), FEATURES, **DATA)
    found = {}
    for name, kind, options in (
        ("fp32", "plain", {}),
        ("bf16", "overlapped", {"bf16": True}),
        ("dropout", "plain", {"model": dlrm.Config(bottom=(8,), top=(8, 1), dropout=0.3)}),
        ("batch norm", "overlapped", {"model": dlrm.Config(bottom=(8,), top=(8, 1), batch_norm=True)}),
        ("dcn", "overlapped", {"model": dcn.Config(bottom=(8,), rank=4, top=(8, 1))}),
        ("mse", "plain", {"loss": "mse"}),
    ):
        torch.manual_seed(dist.get_rank())
        pipeline = build(kind, **options)
        found[name] = train_sharded(pipeline, batches)
        if name == "batch norm":
            with pipeline.paused():
                buffers = [b for b in pipeline.dmp.module.net.buffers() if b.is_floating_point()]
                found["statistics"] = [round(v, 5) for b in buffers for v in b.tolist()]
        dense = torch.cat([p.detach().flatten() for p in pipeline.dmp.module.net.parameters()])
        found[f"{name}: dense"] = [dense.double().sum().item()]
    return found


def test_precision_dropout_batch_norm_and_losses():
    first, second = run_ranks(variants, 2)
    for name in first:
        assert first[name] == second[name], f"ranks disagree about {name}"
        assert all(math.isfinite(v) for v in first[name])
    assert first["fp32"] != first["bf16"]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.03)
    assert first["dropout"] != first["fp32"] and first["batch norm"] != first["fp32"]
    assert all(len(first[name]) == DATA["steps"] for name in ("dropout", "batch norm", "dcn", "mse"))
    assert first["dcn"][-3] < first["dcn"][0] and first["mse"][-3] < first["mse"][0]


def rates(kind: str) -> list[list[float]]:
    """The rates that the fused tables and each param group have while a step runs."""
    optim = Optim(sparse=rowwise_adagrad.Config(lr=0.2), dense=sgd.Config(lr=0.4), schedule=Schedule(warmup_steps=4))
    pipeline = build(kind, optim=optim)
    lookups = embeddings_of(pipeline.dmp.module).ebc._lookups
    kernels = [m.emb_module for look in lookups for m in look.modules() if isinstance(m, BatchedFusedEmbeddingBag)]
    assert len(kernels) == 2
    seen = []
    stream = mine(make_batches(tables(), FEATURES, **DATA))
    for _ in range(6):
        pipeline.step(stream)
        groups = sorted(group["lr"] for group in pipeline.optimizer.param_groups)
        seen.append([*groups, *(kernel.get_learning_rate() for kernel in kernels)])
    return seen


@pytest.mark.parametrize("kind", ["plain", "overlapped"])
def test_the_schedule_reaches_every_rate_in_its_own_step(kind):
    (seen,) = run_ranks(rates, 1, kind)
    for step, values in enumerate(seen):
        factor = min(1.0, (step + 1) / 4)
        expected = [0.2 * factor if value < 0.3 * factor else 0.4 * factor for value in values]
        assert values == pytest.approx(expected) and len(values) == 4 + 2, (step, values)


def nan_in_dense(pipeline, batches):
    batches[2].dense_BK[9, 1] = math.nan


def infinity_in_label(pipeline, batches):
    batches[2].labels_BT[9, 0] = math.inf


def nan_in_weight(pipeline, batches):
    batches[2].weight_B[9] = math.nan


def overflow(pipeline, batches):
    batches[2].weight_B[:] = 3e38


def nan_in_table(pipeline, batches):
    """Row 3 of table ta is NaN, and bag 9 of the third batch is the first that has it."""
    for batch in batches:
        batch.ids["a"].values().clamp_(min=4)
    bags = batches[2].ids["a"]
    assert bags.lengths()[9] > 0
    bags.values()[bags.offsets()[9]] = 3
    (shard,) = (s for name, _, _, s in table_shards(pipeline.dmp) if name == "ta")
    shard[3] = math.nan


def nan_in_layer(pipeline, batches):
    with torch.no_grad():
        pipeline.dmp.module.net.top[2].bias.fill_(math.nan)


# way to break it -> (step of the error, words of its place)
BROKEN = {
    nan_in_dense: (2, "dense column 'd1' in row 41 of the split: nan"),
    infinity_in_label: (2, "label in row 41 of the split: inf"),
    nan_in_weight: (2, "weight in row 41 of the split: nan"),
    overflow: (2, "the loss itself"),
    nan_in_table: (2, "the embedding of feature 'a' in row 41 of the split"),
    nan_in_layer: (0, "layer net.top.2 (Linear; its bias is not finite)"),
}


def broken(kind: str) -> list[tuple[int, str, str, bool]]:
    """For each way of breaking: the error's step, place and message, and whether the failing step left the tables."""
    found = []
    for break_it in BROKEN:
        pipeline = build(kind)
        pipeline.dmp.module.dense_names = ("d0", "d1", "d2")
        batches = make_batches(tables(), FEATURES, steps=4, rows=16, dense=3, seed=4)
        break_it(pipeline, batches)
        stream = iter(batches)
        for _ in batches:
            before = [shard.nan_to_num() for *_, shard in table_shards(pipeline.dmp)]
            try:
                pipeline.step(stream)
            except NonFiniteLoss as error:
                after = [shard.nan_to_num() for *_, shard in table_shards(pipeline.dmp)]
                same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
                found.append((error.step, error.where, str(error), same))
                break
    return found


@pytest.mark.parametrize("kind", ["plain", "overlapped"])
def test_a_loss_that_is_not_finite_stops_before_the_tables_and_says_where_it_began(kind):
    (found,) = run_ranks(broken, 1, kind)
    assert issubclass(NonFiniteLoss, UserError)
    for (step, words), (at, where, message, same) in zip(BROKEN.values(), found, strict=True):
        assert at == step and where.startswith(words), (where, words)
        assert f"step {step + 1}:" in message and where in message and "lower optim" in message and same


def broken_on_one_rank(kind: str) -> None:
    pipeline = build(kind)
    batches = make_batches(tables(), FEATURES, steps=4, rows=16, dense=3, seed=4)
    nan_in_dense(pipeline, batches)  # row 9 of the global batch is one of rank 1's
    train_sharded(pipeline, batches)


@pytest.mark.parametrize("kind", ["plain", "overlapped"])
def test_the_error_names_the_rank_that_has_the_row(kind):
    with pytest.raises(AssertionError, match=r"step 3 on rank 1: .*dense column '1' in row 41"):
        run_ranks(broken_on_one_rank, 2, kind)
