"""Training runs of known tables under known plans, on real ranks: what the cost model is fitted to and held against.

    with Ranks(train, 2, case, tuned=True) as ranks: ranks.call("run", 10)     # (seconds, losses) by rank
    predicted(case, topology) -> seconds                                       # of the same step

Every rank plans for itself, with the built-in numbers of a CPU, so that all have one plan and a fit does not change it.

Shapes: B rows of a rank, K dense inputs.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.workload import SEED, Side
from sharding import topology
from sharding.cost import Load, load_alone
from sharding.embeddings import Embeddings, build_embeddings
from sharding.plan import Figures, rules_of, to_torchrec, work_of
from sharding.planner import Solution, solve
from sharding.tables.base import Table
from sharding.work import Work
from trainer.config import Optim
from trainer.data.batch import Batch
from trainer.dense_work import dense_work
from trainer.models import dlrm
from trainer.models.base import ModelInputs, init_dense
from trainer.optim.base import build_optimizer, plugin, table_update
from trainer.pipeline import build_pipeline
from trainer.task import TrainTask

BATCHES = 4
OPTIM = Optim.model_validate(
    {"sparse": {"kind": "rowwise_adagrad", "lr": 0.001}, "dense": {"kind": "adam", "lr": 0.001}}
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A DLRM of tables that are alike, but for their sharding.

    shardings: one for each table.  features: of each table.  ids: of each bag, uniform over the rows.  batch: rows of a
    rank.
    """

    name: str
    shardings: tuple[str, ...]
    rows: int
    dim: int
    batch: int
    features: int = 1
    ids: int = 1
    dense: int = 13
    bottom: tuple[int, ...] = (64, 32, 16)
    top: tuple[int, ...] = (128, 64, 1)
    interaction: str = "cat"
    bf16: bool = False
    ranks: int = 2

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        return tuple(
            Table(
                name=f"t{i}",
                rows=self.rows,
                dim=self.dim,
                features=tuple(f"f{i}_{k}" for k in range(self.features)),
                sharding=sharding,
            )
            for i, sharding in enumerate(self.shardings)
        )

    @cached_property
    def inputs(self) -> ModelInputs:
        names = tuple(f for t in self.tables for f in t.features)
        return ModelInputs(dense=self.dense, dims=(self.dim,) * len(names), tasks=1, features=names)

    def net(self) -> torch.nn.Module:
        config = dlrm.Config(bottom=self.bottom, top=self.top, interaction=self.interaction)
        with torch.device("meta"):
            return dlrm.build(config, self.inputs)

    def embeddings(self) -> Embeddings:
        return build_embeddings(tables=self.tables, features=self.inputs.features)

    @cached_property
    def work(self) -> Work:
        sparse, dense = OPTIM.sparse, OPTIM.dense
        return work_of(
            self.embeddings(),
            batch_size=self.batch * self.ranks,
            figures={f: Figures(ids_per_bag=self.ids) for f in self.inputs.features},
            dense=dense_work(
                self.net(),
                self.inputs,
                state_bytes_per_parameter=plugin(dense).state_bytes_per_row(dense, 1024) / 1024,
            ),
            state_bytes_per_row=lambda dim: plugin(sparse).state_bytes_per_row(sparse, dim),
            bf16=self.bf16,
            vector_element=2 if self.bf16 else 4,
        )

    @cached_property
    def solution(self) -> Solution:
        """The plan, by the built-in numbers."""
        cluster = topology.CPU_HOST.sized(hosts=1, ranks_per_host=self.ranks)
        return solve(self.work, cluster, rules=rules_of(self.embeddings(), cluster))


def predicted(case: Case, cluster: topology.Topology) -> Load:
    """The case's plan priced with another machine's numbers."""
    choices = case.solution.choices
    kinds = [case.solution.prices.kinds[choice.kind].kind for choice in choices]
    return load_alone(case.work, cluster, kinds, [choice.ranks for choice in choices])


def train(case: Case) -> Side:
    """A rank of the case; .run(steps) gives (seconds, losses)."""
    import torch.distributed as dist

    from sharding.parallelize import parallelize

    cpu, world = torch.device("cpu"), dist.get_world_size()
    task = TrainTask(case.embeddings(), case.net(), world_size=world, device=cpu, bf16=case.bf16)
    plan = to_torchrec(case.solution, case.embeddings())
    update = table_update(OPTIM, plan, device=cpu, kernel="auto")
    output = torch.bfloat16 if case.bf16 else torch.float32
    dmp = parallelize(task, plan, device=cpu, seed=SEED, init_dense=init_dense, output=output, **update)
    pipeline = build_pipeline("overlapped", dmp, build_optimizer(OPTIM, dmp), device=cpu)
    dmp.train()
    made = cycle([_batch(case, dist.get_rank(), i) for i in range(BATCHES)])
    return Side(lambda given: pipeline.step(given)[0], made, pipeline)


class Cases:
    """Several cases in one set of ranks: .build(name), .run(name, steps) as often as wanted, .drop(name)."""

    def __init__(self, cases: tuple[Case, ...]) -> None:
        self.cases = {case.name: case for case in cases}
        self.built: dict[str, Side] = {}

    def build(self, name: str) -> None:
        self.built[name] = train(self.cases[name])

    def run(self, name: str, steps: int) -> list[float]:
        """Seconds of each step."""
        return self.built[name].run(steps)[0]

    def drop(self, name: str) -> None:
        del self.built[name]


def _batch(case: Case, rank: int, number: int) -> Any:
    rng = torch.Generator().manual_seed(1000 * (1 + rank) + number)
    names, rows = list(case.inputs.features), case.batch
    return Batch(
        dense_BK=torch.rand(rows, case.dense, generator=rng),
        ids=KeyedJaggedTensor(
            keys=names,
            values=torch.randint(0, case.rows, (len(names) * rows * case.ids,), generator=rng),
            lengths=torch.full((len(names) * rows,), case.ids),
            stride=rows,
        ),
        labels_BT=torch.randint(0, 2, (rows, 1), generator=rng).float(),
        weight_B=torch.ones(rows),
        row_B=torch.arange(rows),
        rows_in_step=rows * case.ranks,
    )
