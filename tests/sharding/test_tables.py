"""Every kind in sharding/tables/, with each of its VARIANTS, against its own per-id reference.

Unsharded in output and gradient; sharded in losses, for every sharding type, both pipelines, every optimizer and 1, 2
and 4 ranks, and across checkpoints that change ranks and plan.  A new file in the folder is tested by being there.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels import registry
from kernels.errors import UserError
from sharding.embeddings import build_embeddings, lower, physical_tables
from sharding.initial_weights import full_table
from sharding.plan import make_plan
from sharding.tables.base import SHARDING_TYPES, Table
from tests.models import CPU, PlainModel, build_sharded, make_batches, table_shards, train_plain, train_sharded
from tests.ranks import run_ranks
from trainer.checkpoint import manifest, state, storage
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.place import Place
from trainer.config import Optim
from trainer.models import dlrm
from trainer.models.base import init_dense
from trainer.optim import adagrad, adam, rowwise_adagrad, sgd
from trainer.optim.base import plugin

SEED = 7
CASES = [
    (kind, variant)
    for kind in registry.names("sharding.tables")
    for variant in registry.load("sharding.tables", kind).VARIANTS
]
MODEL = dlrm.Config(bottom=(8,), top=(12, 1), interaction="cat")
OPTIMIZERS = {
    "sgd": Optim(sparse=sgd.Config(lr=0.2), dense=sgd.Config(lr=0.1)),
    "adagrad": Optim(sparse=adagrad.Config(lr=0.05), dense=adagrad.Config(lr=0.05)),
    "rowwise_adagrad": Optim(sparse=rowwise_adagrad.Config(lr=0.05), dense=sgd.Config(lr=0.1)),
    "adam": Optim(sparse=adam.Config(lr=0.01), dense=adam.Config(lr=0.01)),
}
STEPS = {"steps": 6, "rows": 16, "dense": 4, "last_rows": 5}


def table_of(number: int, *, sharding: str = "auto", **changes) -> Table:
    """A table of case `number`, with two features; every second one pools by the mean."""
    kind, variant = CASES[number]
    features = (f"f{number}", f"g{number}")
    pooling = "mean" if number % 2 else "sum"
    if changes.get("row_type") == "int8" and "budget" in variant:
        variant = variant | {"budget": 0.7}  # 4 of 8 columns and a scale: two thirds of 8 columns and a scale
    given = {"rows": 40 + number, "dim": 8, "pooling": pooling, "sharding": sharding, "init_std": 0.4}
    return Table(name=f"t{number}", kind=kind, options=dict(variant), features=features, **{**given, **changes})


def all_tables(sharding: str = "auto", **changes) -> tuple[Table, ...]:
    return tuple(table_of(number, sharding=sharding, **changes) for number in range(len(CASES)))


def features_of(tables) -> tuple[str, ...]:
    return tuple(reversed([feature for table in tables for feature in table.features]))


class Reference(nn.Module):
    """A look-up made of the kinds' `reference`, id by id, on whole physical tables in plain parameters."""

    def __init__(self, tables, features) -> None:
        super().__init__()
        self.tables, self.features = tables, features
        self.table_of = {feature: table for table in tables for feature in table.features}
        self.weights = nn.ParameterDict({t.name: full_table(t, seed=SEED) for t in physical_tables(tables)})
        self.combine = nn.Module()  # named as in Embeddings, since the names are what initial values depend on
        lowered = {f"of_{table.name}": lower(table).combine for table in tables}
        self.combine.combines = nn.ModuleDict({name: module for name, module in lowered.items() if module is not None})
        init_dense(self.combine, seed=SEED)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        bags = ids.to_dict()
        return torch.cat([self._pool(feature, bags[feature]) for feature in self.features], dim=1)

    def _pool(self, feature: str, bags) -> Tensor:
        table = self.table_of[feature]
        kind = registry.load("sharding.tables", table.kind)
        weights = dict(self.weights)
        if f"of_{table.name}" in self.combine.combines:
            weights |= dict(self.combine.combines[f"of_{table.name}"].named_parameters())
        scales = bags.weights_or_none()
        rows = []
        for start, end in zip(bags.offsets()[:-1].tolist(), bags.offsets()[1:].tolist(), strict=True):
            total = torch.zeros(table.dim)
            for i in range(start, end):
                vector = kind.reference(table, feature, int(bags.values()[i]), weights)
                total = total + (vector if scales is None else vector * scales[i])
            rows.append(total / max(1, end - start) if table.pooling == "mean" else total)
        return torch.stack(rows)


def unsharded(tables, features, **options):
    """Embeddings on the CPU with their initial weights."""
    found = build_embeddings(tables=tables, features=features, device="cpu", **options)
    with torch.no_grad():
        for collection in found.collections:
            for name, bag in collection.embedding_bags.items():
                (table,) = (t for t in found.physical if t.name == name)
                bag.weight.zero_()
                bag.weight[:, : table.dim] = full_table(table, seed=SEED)
    init_dense(found.combine, seed=SEED)
    return found


def with_weights(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
    weights = torch.linspace(-1.0, 2.0, ids.values().numel())
    return KeyedJaggedTensor(keys=ids.keys(), values=ids.values(), lengths=ids.lengths(), weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{kind}-{v}" for kind, v in CASES])
def test_output_and_gradient_are_those_of_the_reference(number, weighted):
    tables = (table_of(number),)
    features = features_of(tables)
    found, plain = unsharded(tables, features, weighted=weighted), Reference(tables, features)
    for batch in make_batches(tables, features, steps=2, rows=9, dense=1, last_rows=3):
        ids = with_weights(batch.ids) if weighted else batch.ids
        ours, theirs = found(ids), plain(ids)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
        ours.backward(upstream)
        theirs.backward(upstream)
    gradients = {t.name: None for t in found.physical}
    for collection in found.collections:
        gradients |= {name: bag.weight.grad for name, bag in collection.embedding_bags.items()}
    for table in found.physical:
        torch.testing.assert_close(
            gradients[table.name][:, : table.dim], plain.weights[table.name].grad, rtol=1e-4, atol=1e-5
        )
    dense = dict(plain.combine.named_parameters())
    for name, parameter in found.combine.named_parameters():
        torch.testing.assert_close(parameter.grad, dense[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{kind}-{v}" for kind, v in CASES])
def test_bags_of_one_id_need_no_second_collection(number):
    tables = (table_of(number, multi_hot=False),)
    features = features_of(tables)
    found, plain = unsharded(tables, features), Reference(tables, features)
    assert found.ebc_per_id is None
    ids = KeyedJaggedTensor(
        keys=list(features), values=torch.tensor([3, 39, 0, 3, 11]), lengths=torch.tensor([1, 0, 1, 1, 1, 1])
    )
    torch.testing.assert_close(found(ids), plain(ids), rtol=1e-5, atol=1e-6)


def test_empty_bags_alone():
    tables = all_tables()
    features = features_of(tables)
    found = unsharded(tables, features)
    lengths = torch.zeros(2 * len(features), dtype=torch.int64)
    ids = KeyedJaggedTensor(keys=list(features), values=torch.zeros(0, dtype=torch.int64), lengths=lengths)
    emb_BX = found(ids)
    emb_BX.sum().backward()
    assert torch.equal(emb_BX, torch.zeros(2, sum(found.dims)))


class ReferenceModel(PlainModel):
    """tests.models.PlainModel with the look-up of `Reference`."""

    def __init__(self, tables, features) -> None:
        super().__init__(tables, features, MODEL, dense=4, seed=SEED)
        self.weights = nn.ParameterDict()
        self.lookup = Reference(tables, features)

    def forward(self, batch):
        logits_BT = self.net(batch.dense_BK, self.lookup(batch.ids))
        return self.loss(logits_BT, batch.labels_BT, batch.weight_B, batch.rows_in_step, True), logits_BT.detach()

    def optimizers(self, optim: Optim):
        from trainer.optim.base import RowOptimizer

        dense = [*self.net.parameters(), *self.lookup.combine.parameters()]
        tables = list(self.lookup.weights.values())
        return [RowOptimizer(optim.sparse, tables), plugin(optim.dense).dense(optim.dense, dense)]


@pytest.fixture(scope="module")
def losses_of_reference():
    found = {}
    for name, optim in OPTIMIZERS.items():
        tables = all_tables()
        batches = make_batches(tables, features_of(tables), **STEPS)
        found[name] = train_plain(ReferenceModel(tables, features_of(tables)), optim, batches)
    return found


def sharded(sharding: str, pipeline: str, optimizer: str, *, bf16: bool = False, **changes):
    tables = all_tables(sharding, **changes)
    optim = OPTIMIZERS[optimizer]
    return build_sharded(
        tables, features_of(tables), MODEL, optim, dense=4, pipeline=pipeline, kernel="auto", seed=SEED, bf16=bf16
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of all kinds.  bf16: look-ups give bfloat16."""

    sharding: str
    pipeline: str = "plain"
    optimizer: str = "adagrad"
    bf16: bool = False
    row_type: str = "fp32"

    @property
    def is_exact(self) -> bool:
        return not self.bf16 and self.row_type == "fp32"


NARROW = [
    Run(sharding="row_wise", row_type="bf16"),
    Run(sharding="column_wise", row_type="fp16"),
    Run(sharding="row_wise", row_type="int8"),
]
SCALED = [  # int8: every sharding type but copies, every optimizer, and look-ups of 16 bits
    *(Run(sharding=s, row_type="int8") for s in SHARDING_TYPES if s not in ("data_parallel", "row_wise")),
    *(Run(sharding="table_wise", pipeline="overlapped", optimizer=name, row_type="int8") for name in OPTIMIZERS),
    Run(sharding="table_wise", bf16=True, row_type="int8"),
]
RUNS = {  # world size -> trainings, all in one process group: starting ranks takes longer than their steps
    1: [*(Run(sharding="table_wise", pipeline="overlapped", optimizer=name) for name in OPTIMIZERS), *NARROW],
    2: [
        *(Run(sharding=sharding) for sharding in SHARDING_TYPES),
        *(Run(sharding="row_wise", pipeline="overlapped", optimizer=name) for name in OPTIMIZERS),
        *(Run(sharding=sharding, bf16=True) for sharding in ("table_wise", "row_wise")),
        *NARROW,
        Run(sharding="table_wise", row_type="bf16"),
        *SCALED,
    ],
    4: [
        Run(sharding="row_wise", pipeline="overlapped"),
        Run(sharding="column_wise", optimizer="sgd"),
        Run(sharding="auto", optimizer="adam"),
    ],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def train_all(runs: list[Run]) -> list[tuple[list[float], set]]:
    """Of each run the losses, and the dtypes of the tables."""
    found = []
    for run in runs:
        tables = all_tables(run.sharding, row_type=run.row_type)
        built = sharded(run.sharding, run.pipeline, run.optimizer, bf16=run.bf16, row_type=run.row_type)
        losses = train_sharded(built, make_batches(tables, features_of(tables), **STEPS))
        found.append((losses, {shard.dtype for *_, shard in table_shards(built.dmp)}))
    return found


@pytest.mark.parametrize("world_size", RUNS)
def test_sharded_losses_are_those_of_the_reference(world_size, losses_of_reference):
    by_rank = run_ranks(train_all, world_size, RUNS[world_size])
    assert str(by_rank[0]) == str(by_rank[-1])
    for run, (losses, dtypes) in zip(RUNS[world_size], by_rank[0], strict=True):
        expected = losses_of_reference[run.optimizer]
        worst = max(abs(x - y) for x, y in zip(losses, expected, strict=True))
        assert worst <= (2e-5 if run.is_exact else 0.03), f"{run}: {worst}"
        assert run.is_exact or losses != expected, run
        assert dtypes == {DTYPES[run.row_type]} or run.sharding == "data_parallel", (run, dtypes)
    assert all(expected[-2] != expected[0] for expected in losses_of_reference.values())


def go_on(folder, sharding: str, first: int, last: int) -> list[float]:
    """Steps first .. last-1, from the checkpoint of the step before where there is one."""
    tables = all_tables(sharding)
    built = sharded(sharding, "plain", "adagrad")
    place = Place(folder)
    if first:
        state.load(built.dmp, built.optimizer, open_chain(place, f"step_{first}"))
    losses = train_sharded(built, make_batches(tables, features_of(tables), **STEPS)[first:last])
    world = dist.get_world_size()
    position = manifest.Position(step=last, epoch=0, samples=0, world_size=world, config_sha256="", data_fingerprint="")
    storage.write(
        state.parts_of(built.dmp, built.optimizer),
        place,
        f"step_{last}",
        lambda files, tensors: manifest.Manifest(position=position, config="", values={}, files=files, tensors=tensors),
    )
    return losses


def test_checkpoints_move_to_other_ranks_and_plans(tmp_path, losses_of_reference):
    losses = []
    for world_size, sharding, first, last in ((1, "table_wise", 0, 2), (2, "row_wise", 2, 4), (4, "column_wise", 4, 6)):
        losses += run_ranks(go_on, world_size, tmp_path, sharding, first, last)[0]
    assert losses == pytest.approx(losses_of_reference["adagrad"], abs=2e-5)


def test_a_copy_on_every_rank_has_rows_of_32_bits_only():
    with pytest.raises(UserError, match=r"'t0', 't1'.* data_parallel.*fp32"):
        run_plan(all_tables("data_parallel", row_type="bf16"))


def run_plan(tables) -> None:
    task = nn.ModuleDict({"embeddings": build_embeddings(tables=tables, features=features_of(tables))})
    make_plan(task, world_size=1, local_world_size=1, device=CPU, batch_size=8)
