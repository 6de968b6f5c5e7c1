"""Our kernels in FBGEMM's place: the same losses, the same state dict, for every sharding type and optimizer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from kernels import registry
from sharding.compute_kernel import kernels_of
from sharding.tables.base import SHARDING_TYPES
from tests.models import build_sharded, make_batches, train_sharded
from tests.ranks import run_ranks
from tests.sharding.test_parallelize import BATCHES, FEATURES, MODEL, OPTIM, tables
from trainer.config import Optim, Schedule

ROOT = Path(__file__).resolve().parents[2]
OWN = sorted(set(registry.names("kernels.backends")) - {"fbgemm", "triton"})


def losses_of(shardings, kernel, pipeline, steps=None):
    found = {}
    for sharding in shardings:
        built = build_sharded(
            tables(sharding), FEATURES, MODEL, OPTIM, dense=4, tasks=2, pipeline=pipeline, kernel=kernel
        )
        own = kernels_of(built.dmp.module)
        assert bool(own) == (kernel != "fbgemm" and sharding != "data_parallel"), sharding
        found[sharding] = train_sharded(built, make_batches(tables(sharding), FEATURES, **BATCHES)[:steps])
    return found


@pytest.fixture(scope="module")
def fbgemm():
    return run_ranks(losses_of, 1, ("table_wise",), "fbgemm", "plain")[0]["table_wise"]


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize(("world_size", "pipeline"), [(1, "plain"), (2, "overlapped"), (4, "plain")])
def test_every_sharding_type_has_fbgemms_losses(world_size, pipeline, kernel, fbgemm):
    for found in run_ranks(losses_of, world_size, SHARDING_TYPES, kernel, pipeline):
        for sharding, losses in found.items():
            worst = max(abs(x - y) for x, y in zip(losses, fbgemm, strict=True))
            assert worst <= 1e-5, f"{sharding}: {worst}"


IN_INTERPRETER = """
import json
from tests.ranks import run_ranks
from tests.sharding.test_compute_kernel import losses_of

print(json.dumps(run_ranks(losses_of, 2, ("row_wise",), "triton", "overlapped", 8)))
"""


def test_triton_in_its_interpreter_has_fbgemms_losses(fbgemm):
    """The GPU's kernel under DistributedModelParallel; a process of its own, where Triton starts as an interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IN_INTERPRETER], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-6000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found["row_wise"] == pytest.approx(fbgemm[:8], abs=1e-5)


SPARSE = {
    "sgd": {"kind": "sgd", "lr": 0.1},
    "adagrad": {"kind": "adagrad", "lr": 0.1, "eps": 1e-6},
    "rowwise_adagrad": {"kind": "rowwise_adagrad", "lr": 0.1, "eps": 1e-6},
}


def optim_of(sparse):
    return Optim(
        sparse=sparse, dense={"kind": "sgd", "lr": 0.05}, schedule=Schedule(warmup_steps=5, decay="linear",
        decay_start=10, decay_steps=40)
    )  # fmt: skip


def whole_state(kernel, sparse, shardings, folder, *, load):
    """Train, save into `folder`; or load from it. Returns the losses of the steps after that."""
    built = build_sharded(
        mixed(shardings), FEATURES, MODEL, optim_of(sparse), dense=4, tasks=2, pipeline="plain", kernel=kernel
    )
    batches = make_batches(mixed(shardings), FEATURES, **BATCHES)
    first, second = batches[:25], batches[25:]
    if not load:
        train_sharded(built, first)
    state = {"model": built.dmp.state_dict()}
    if any(built.optimizer.state_dict()["state"].values()):  # SGD has none
        state["optimizer"] = built.optimizer.state_dict()
    if load:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        built.step_number = len(first)
    else:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    return train_sharded(built, second)


def mixed(shardings):
    return tuple(replace(table, sharding=s) for table, s in zip(tables("auto"), shardings, strict=True))


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("sparse", SPARSE)
def test_a_checkpoint_goes_from_one_kernel_to_the_other(tmp_path, kernel, sparse):
    """Saved by FBGEMM on 2 ranks, read by ours in another sharding, and back: the same continuation."""
    here = ("row_wise", "column_wise", "table_wise", "table_row_wise")
    there = ("table_wise", "row_wise", "table_wise", "row_wise")
    if sparse == "rowwise_adagrad":  # one state per row and column shard: another split trains a little differently
        here = ("row_wise", "table_wise", "table_wise", "table_row_wise")
    for wrote, read in (("fbgemm", kernel), (kernel, "fbgemm")):
        folder = tmp_path / f"{wrote}-{read}"
        went_on = run_ranks(_save, 2, wrote, SPARSE[sparse], here, folder)
        resumed = run_ranks(_load, 2, read, SPARSE[sparse], there, folder)
        for losses, expected in zip(resumed, went_on, strict=True):
            assert losses == pytest.approx(expected, abs=1e-5), (wrote, read)


def _save(*args):
    return whole_state(*args, load=False)


def _load(*args):
    return whole_state(*args, load=True)


def adam_losses(kernel, sharding):
    optim = Optim(sparse={"kind": "adam", "lr": 0.02, "l2": 1e-3}, dense={"kind": "sgd", "lr": 0.05})
    built = build_sharded(tables(sharding), FEATURES, MODEL, optim, dense=4, tasks=2, kernel=kernel)
    return train_sharded(built, make_batches(tables(sharding), FEATURES, **BATCHES))


@pytest.mark.parametrize("kernel", OWN)
def test_adam_and_l2_on_the_cpu(kernel):
    """FBGEMM has neither there: the sharded tables agree with replicated ones, which RowOptimizer updates."""
    sharded = run_ranks(adam_losses, 2, kernel, "row_wise")[0]
    replicated = run_ranks(adam_losses, 2, kernel, "data_parallel")[0]
    assert torch.tensor(sharded) == pytest.approx(torch.tensor(replicated), abs=1e-4)


def bf16_losses(shardings):
    """Losses in bf16 with vectors of bf16, and what the tables came to be, which stay float32."""
    built = build_sharded(
        mixed(shardings), FEATURES, MODEL, OPTIM, dense=4, tasks=2, pipeline="overlapped", kernel="auto", bf16=True
    )
    outputs = {kernel.bags.spec.output for kernel in kernels_of(built.dmp.module)}
    return train_sharded(built, make_batches(mixed(shardings), FEATURES, **BATCHES)), outputs


@pytest.mark.parametrize(
    "shardings",
    [("table_wise",) * 4, ("table_wise", "row_wise", "column_wise", "data_parallel")],
    ids=["of tables", "mixed"],
)
def test_vectors_of_bfloat16(shardings, fbgemm):
    """In "mixed" three of four ranks look up nothing table-wise; what they send must have the others' dtype."""
    ranks = run_ranks(bf16_losses, 4, shardings)
    for losses, _ in ranks:
        assert losses == ranks[0][0] and losses == pytest.approx(fbgemm, rel=0.03)
    assert torch.bfloat16 in set().union(*(outputs for _, outputs in ranks))
