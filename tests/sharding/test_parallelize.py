"""Sharded training is unsharded training: the losses of 50 steps, and the golden DLRM, in real processes over gloo."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sharding.initial_weights import full_table
from sharding.tables.base import SHARDING_TYPES, Table
from tests.models import (
    PlainModel,
    build_sharded,
    make_batches,
    part,
    set_tables,
    table_shards,
    train_plain,
    train_sharded,
    whole_tables,
)
from tests.ranks import run_ranks
from trainer.config import Optim
from trainer.data.batch import Batch
from trainer.models import dlrm
from trainer.optim import sgd
from trainer.task import TrainTask

FEATURES = ("a", "b", "c", "d", "e")
MODEL = dlrm.Config(bottom=(16, 12), top=(16, 2), interaction="cat")
OPTIM = Optim(sparse=sgd.Config(lr=0.5), dense=sgd.Config(lr=0.1))
BATCHES = {"steps": 50, "rows": 16, "dense": 4, "tasks": 2, "last_rows": 5}


def tables(sharding: str) -> tuple[Table, ...]:
    """A shared table with mean pooling, one row per rank, a dim that is stored wider, a larger table."""
    return (
        Table(name="ta", rows=37, dim=16, features=("a",), sharding=sharding),
        Table(name="tbc", rows=101, dim=8, features=("c", "b"), pooling="mean", sharding=sharding, init_std=0.2),
        Table(name="td", rows=4, dim=8, features=("d",), sharding=sharding),
        Table(name="te", rows=1000, dim=6, features=("e",), sharding=sharding),
    )


def losses_of(shardings: tuple[str, ...], pipeline: str, local_world_size: int) -> dict[str, list[float]]:
    losses = {}
    for sharding in shardings:
        built = build_sharded(
            tables(sharding), FEATURES, MODEL, OPTIM, dense=4, tasks=2, pipeline=pipeline,
            local_world_size=local_world_size, task_weights=(1.0, 0.5),
        )  # fmt: skip
        losses[sharding] = train_sharded(built, make_batches(tables(sharding), FEATURES, **BATCHES))
    return losses


@pytest.fixture(scope="module")
def unsharded() -> list[float]:
    model = PlainModel(tables("auto"), FEATURES, MODEL, dense=4, tasks=2, task_weights=(1.0, 0.5))
    return train_plain(model, OPTIM, make_batches(tables("auto"), FEATURES, **BATCHES))


BY_HOST = ("table_row_wise", "table_column_wise", "grid_shard")


@pytest.mark.parametrize(
    ("world_size", "local_world_size", "pipeline", "shardings"),
    [
        (1, 1, "plain", (*SHARDING_TYPES, "auto")),
        (2, 2, "plain", (*SHARDING_TYPES, "auto")),
        (2, 2, "overlapped", SHARDING_TYPES),
        (4, 4, "overlapped", SHARDING_TYPES),
        (4, 2, "plain", BY_HOST),
    ],
)
def test_losses_are_those_of_the_unsharded_model(world_size, local_world_size, pipeline, shardings, unsharded):
    by_rank = run_ranks(losses_of, world_size, shardings, pipeline, local_world_size, local_world_size=local_world_size)
    assert len(unsharded) == BATCHES["steps"] and unsharded[-2] < unsharded[0]
    for sharding in shardings:
        assert by_rank[0][sharding] == by_rank[-1][sharding]
        worst = max(abs(x - y) for x, y in zip(by_rank[0][sharding], unsharded, strict=True))
        assert worst <= 1e-5, f"{sharding}: {worst}"


def initial_shards(shardings: tuple[str, ...]) -> dict[str, list]:
    found = {}
    for sharding in shardings:
        built = build_sharded(tables(sharding), FEATURES, MODEL, OPTIM, dense=4, tasks=2)
        found[sharding] = [(name, row, column, shard.clone()) for name, row, column, shard in table_shards(built.dmp)]
    return found


def test_shards_start_with_their_part_of_the_table():
    by_rank = run_ranks(initial_shards, 2, ("row_wise", "column_wise"))
    for sharding in ("row_wise", "column_wise"):
        whole = whole_tables(tables(sharding), [rank[sharding] for rank in by_rank])
        for table in tables(sharding):
            assert torch.equal(whole[table.name], full_table(table, seed=7))


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dlrm.json").read_text())


def golden_tables(shardings: str) -> tuple[Table, ...]:
    """shardings: one for each of the three tables, separated by spaces, or one for all."""
    each = shardings.split() * (1 if " " in shardings else 3)
    return tuple(
        Table(name=f"t{i}", rows=len(rows), dim=2, features=(f"c{i}",), sharding=each[i])
        for i, rows in enumerate(GOLDEN["tables"])
    )


def golden_batches() -> list[Batch]:
    """The printed batches of 2 rows, padded with weight-0 rows to 4, so that four ranks can share one."""
    batches = []
    for batch in GOLDEN["batches"]:
        bags = [[*feature, [], []] for feature in batch["ids"]]
        batches.append(
            Batch(
                dense_BK=nn.functional.pad(torch.tensor(batch["dense"]), (0, 0, 0, 2)),
                ids=KeyedJaggedTensor(
                    keys=["c0", "c1", "c2"],
                    values=torch.tensor([i for feature in bags for bag in feature for i in bag]),
                    lengths=torch.tensor([len(bag) for feature in bags for bag in feature]),
                ),
                labels_BT=nn.functional.pad(torch.tensor(batch["labels"]), (0, 0, 0, 2)),
                weight_B=torch.tensor([1.0, 1.0, 0.0, 0.0]),
                row_B=torch.tensor([0, 1, -1, -1]),
                rows_in_step=2,
            )
        )
    return batches


@torch.no_grad()
def set_golden_mlps(net: nn.Module) -> None:
    for mlp, layers in ((net.bottom, GOLDEN["bottom"]), (net.top, GOLDEN["top"])):
        linears = [m for m in mlp if isinstance(m, nn.Linear)]
        for linear, values in zip(linears, layers, strict=True):
            linear.weight.copy_(torch.tensor(values["weight"]))
            linear.bias.copy_(torch.tensor(values["bias"]))


def golden_run(shardings: tuple[str, ...], pipeline: str) -> dict[str, tuple[list[float], list, list]]:
    """Sharding -> losses, this rank's tables and the MLPs' parameters after the last step."""
    found = {}
    for sharding in shardings:
        optim = Optim(sparse=sgd.Config(lr=GOLDEN["lr"]), dense=sgd.Config(lr=GOLDEN["lr"]))
        model = dlrm.Config(bottom=(3, 2), top=(4, 2, 1))
        built = build_sharded(
            golden_tables(sharding), ("c0", "c1", "c2"), model, optim, dense=4, pipeline=pipeline, loss="mse"
        )
        task: TrainTask = built.dmp.module
        set_tables(built.dmp, {f"t{i}": torch.tensor(rows) for i, rows in enumerate(GOLDEN["tables"])})
        set_golden_mlps(task.net)
        losses = train_sharded(built, golden_batches())
        shards = [(n, r, c, s.clone()) for n, r, c, s in table_shards(built.dmp)]
        found[sharding] = losses, shards, [p.detach() for p in task.net.parameters()]
    return found


@pytest.mark.parametrize(
    ("world_size", "pipeline", "shardings"),
    [
        (1, "plain", ("table_wise", "data_parallel")),
        (2, "overlapped", ("table_wise", "row_wise", "data_parallel", "table_row_wise")),
        (4, "plain", ("table_wise", "row_wise data_parallel table_wise")),
    ],
)
def test_golden_dlrm(world_size, pipeline, shardings):
    by_rank = run_ranks(golden_run, world_size, shardings, pipeline)
    for sharding in shardings:
        losses, _, mlps = by_rank[0][sharding]
        assert max(abs(x - y) for x, y in zip(losses, GOLDEN["losses_printed"], strict=True)) <= 5e-6
        assert max(abs(x - y) for x, y in zip(losses, GOLDEN["losses_rebuilt"], strict=True)) <= 1e-6
        whole = whole_tables(golden_tables(sharding), [rank[sharding][1] for rank in by_rank])
        for i, rows in enumerate(GOLDEN["updated"]["tables"]):
            torch.testing.assert_close(whole[f"t{i}"], torch.tensor(rows), rtol=0, atol=2e-5)
        updated = [
            torch.tensor(layer[key])
            for layer in GOLDEN["updated"]["bottom"] + GOLDEN["updated"]["top"]
            for key in ("weight", "bias")
        ]
        for parameter, expected in zip(mlps, updated, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-5)


def lowered_runs(pipelines: tuple[str, ...]) -> list[tuple[list[float], list[float]]]:
    return [lowered_run(pipeline) for pipeline in pipelines]


def lowered_run(pipeline: str) -> tuple[list[float], list[float]]:
    """Losses of the quotient-remainder kind, and of the same model with one whole table whose rows are put together
    from the two parts (so they train alike for one step)."""
    table = Table(name="t", rows=40, dim=8, features=("a", "b"), kind="tests.sharding.quotient", sharding="row_wise")
    model = dlrm.Config(bottom=(8,), top=(8, 1))
    built = build_sharded((table,), ("b", "a"), model, OPTIM, dense=3, pipeline=pipeline)
    batches = make_batches((table,), ("a", "b"), steps=6, rows=8, dense=3)
    if pipeline == "overlapped":
        losses = train_sharded(built, batches)
        assert [type(m).__name__ for m in built._inner._pipelined_postprocs] == ["PipelinedPostproc"]
        return losses, []
    q, r = (full_table(t, seed=7) for t in built.dmp.module.embeddings.physical)
    ids = torch.arange(40)
    plain = PlainModel((table,), ("b", "a"), model, dense=3)
    with torch.no_grad():
        plain.weights["t"].copy_(torch.cat([q[ids // 8], r[ids % 8]], dim=1))
    mine = part(batches[0], dist.get_rank(), dist.get_world_size())
    plain_loss = plain(mine)[0] * dist.get_world_size()
    losses = train_sharded(built, batches)
    dist.all_reduce(plain_loss)
    return losses, [plain_loss.item() / dist.get_world_size()]


def test_a_lowered_kind_trains_sharded_in_both_pipelines():
    ((plain, reference), (overlapped, _)), _ = run_ranks(lowered_runs, 2, ("plain", "overlapped"))
    assert abs(plain[0] - reference[0]) <= 1e-6
    assert plain == pytest.approx(overlapped, abs=1e-6) and len(plain) == 6
