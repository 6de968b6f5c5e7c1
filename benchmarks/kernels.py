"""`tablemesh bench kernels`: the cpu backend beside FBGEMM's CPU kernels, torch.nn.EmbeddingBag and a plain gather.

26 tables x 200k x 64, float32, batch 2048, uniform ids unless a row says otherwise; L ids per bag.  A step is forward +
backward with rowwise Adagrad (with SGD where torch's EmbeddingBag and its sparse SGD are the baseline).  Each row takes
turns A B A B over fresh batches and checks in the same run that both sides came to the same outputs and tables.
Compiling is done before the first turn.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.base import Row, paired, rate_row, report
from benchmarks.gather import gather_loop
from kernels.ops import Optimizer, Spec, Table, TableBatchedEmbeddingBag

TABLES, ROWS, DIM, BATCH = 26, 200_000, 64, 2048
GIANT_ROWS, GIANT_IDS = 5_000_000, 50  # rows of the one giant table, ids per bag of it; the 25 others have 1 each
ZIPF = 1.2
BATCHES = 4  # made before, then taken in turns
PAIRS = {1: 15, 20: 7}
WORKSPACE = 64 << 20  # bytes
ADAGRAD = Optimizer(kind="rowwise_adagrad", lr=0.01)


@dataclass(frozen=True)
class Batch:
    ids_N: Tensor
    offsets: Tensor


def main(*, json: bool = False) -> int:
    """Run everything, print it; the exit code."""
    rows = []
    for ids_per_bag in (1, 20):
        rows += beside_fbgemm(ids_per_bag)
        rows.append(beside_embedding_bag(ids_per_bag))
    rows.append(beside_gather())
    rows += beside_uniform()
    rows += [workspace(ids_per_bag) for ids_per_bag in (1, 20)]
    return report("kernels", rows, json=json)


def uniform_spec(optimizer: Optimizer = ADAGRAD) -> Spec:
    return Spec(tables=tuple(Table(rows=ROWS, dim=DIM) for _ in range(TABLES)), optimizer=optimizer)


def filled(spec: Spec) -> TableBatchedEmbeddingBag:
    bags = TableBatchedEmbeddingBag(spec, backend="cpu")
    torch.manual_seed(1)
    bags.state.weights.uniform_(-0.5, 0.5)
    return bags


def batches(spec: Spec, per_bag: list[int], *, zipf: float | None = None) -> list[Batch]:
    """Batches with per_bag[f] ids in every bag of feature f, uniform over the rows or by a power law."""
    rng = torch.Generator().manual_seed(2)
    found = []
    for _ in range(BATCHES):
        ids = [drawn(spec.tables[t].rows, BATCH * per_bag[f], zipf, rng) for f, t in enumerate(spec.features)]
        lengths = torch.tensor(per_bag).repeat_interleave(BATCH)
        found.append(Batch(torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])))
    return found


def drawn(rows: int, count: int, zipf: float | None, rng: torch.Generator) -> Tensor:
    """Row k has a share proportional to 1 / (k + 1) ** zipf; the rows then stand in no order of frequency."""
    if zipf is None:
        return torch.randint(0, rows, (count,), generator=rng)
    shares = torch.arange(1, rows + 1, dtype=torch.float64).pow(-zipf).cumsum(0)
    ranks = torch.searchsorted(shares, torch.rand(count, generator=rng, dtype=torch.float64) * shares[-1])
    return (ranks.clamp(max=rows - 1) * 0x9E3779B1) % rows


def giant_ids_in(batch: Batch, rows: int) -> Batch:
    """The batch with the ids of its first feature, the giant table's, in its first `rows` rows."""
    count = BATCH * GIANT_IDS
    return Batch(torch.cat([batch.ids_N[:count] % rows, batch.ids_N[count:]]), batch.offsets)


def stepper(bags: TableBatchedEmbeddingBag, made: Iterator[Batch], grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        batch = next(made)
        bags(batch.ids_N, batch.offsets).backward(grad)

    return step


def beside_fbgemm(ids_per_bag: int) -> list[Row]:
    """Whole steps, then the forward alone, beside FBGEMM's TBE on the CPU."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    spec = uniform_spec()
    made = batches(spec, [ids_per_bag] * TABLES)
    bags = filled(spec)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=ADAGRAD.lr,
        eps=ADAGRAD.eps,
    )
    for theirs, ours in zip(tbe.split_embedding_weights(), bags.state.tables, strict=True):
        theirs.copy_(ours)
    grad = torch.randn(BATCH, TABLES * DIM)
    theirs_made = cycle(made)

    def theirs_step() -> None:
        batch = next(theirs_made)
        tbe(batch.ids_N, batch.offsets).backward(grad)

    runs = paired(stepper(bags, cycle(made), grad), theirs_step, pairs=PAIRS[ids_per_bag])
    same = close(tbe.split_embedding_weights(), bags.state.tables)
    same &= close([s[0] for s in tbe.split_optimizer_states()], bags.state.state_views("momentum1"))
    first = made[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return bags(first.ids_N, first.offsets)

    def theirs_forward() -> Tensor:
        with torch.no_grad():
            return tbe(first.ids_N, first.offsets)

    forward_runs = paired(forward, theirs_forward, pairs=2 * PAIRS[ids_per_bag])
    name, baseline = f"L={ids_per_bag}", "FBGEMM CPU TBE"
    shared = {"count": first.ids_N.numel(), "unit": "ids/s", "baseline_name": baseline}
    return [
        rate_row(f"{name} forward + backward + rowwise Adagrad", runs, correct=same, **shared),
        rate_row(f"{name} forward", forward_runs, correct=same and close([theirs_forward()], [forward()]), **shared),
    ]


def beside_embedding_bag(ids_per_bag: int) -> Row:
    """Whole steps with SGD, beside one torch.nn.EmbeddingBag a table with sparse gradients and torch.optim.SGD."""
    spec = uniform_spec(Optimizer(kind="sgd", lr=0.01))
    made = batches(spec, [ids_per_bag] * TABLES)
    bags = filled(spec)
    modules = [
        torch.nn.EmbeddingBag.from_pretrained(table.clone(), freeze=False, mode="sum", sparse=True)
        for table in bags.state.tables
    ]
    optimizer = torch.optim.SGD([module.weight for module in modules], lr=0.01)
    grad = torch.randn(BATCH, TABLES * DIM)
    # Each table's ids and bags in advance: cutting the batch up is no part of what torch is measured by.
    cut = [
        [(ids, torch.arange(BATCH) * ids_per_bag) for ids in batch.ids_N.view(TABLES, -1).unbind()] for batch in made
    ]
    theirs_made = cycle(cut)

    def theirs() -> None:
        out = torch.cat([m(*given) for m, given in zip(modules, next(theirs_made), strict=True)], dim=1)
        out.backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    runs = paired(stepper(bags, cycle(made), grad), theirs, pairs=PAIRS[ids_per_bag])
    return rate_row(
        f"L={ids_per_bag} forward + backward + SGD",
        runs,
        count=made[0].ids_N.numel(),
        unit="ids/s",
        baseline_name="torch EmbeddingBag, sparse SGD",
        correct=close([module.weight.detach() for module in modules], bags.state.tables),
    )


def beside_gather() -> Row:
    """Bytes of rows read at random per second: the forward at L=20, beside a loop that only reads and adds the rows."""
    spec = uniform_spec()
    bags = filled(spec)
    batch = batches(spec, [20] * TABLES)[0]
    flat_N = batch.ids_N + torch.arange(TABLES).repeat_interleave(BATCH * 20) * ROWS  # packed: 200k rows end on a line
    read, total = gather_loop(bags.state.weights.view(-1, DIM), flat_N)
    last = []

    def forward() -> None:
        with torch.no_grad():
            last[:] = [bags(batch.ids_N, batch.offsets)]

    runs = paired(forward, read, pairs=9)
    expected = bags.state.weights.view(-1, DIM)[flat_N].double().sum()
    close_sums = [abs(float(x) - float(expected)) < 1e-3 * DIM * TABLES for x in (last[0].double().sum(), total())]
    return rate_row(
        "L=20 forward, bytes of rows",
        runs,
        count=flat_N.numel() * DIM * 4,
        unit="B/s",
        baseline_name="plain gather loop",
        correct=all(close_sums),
    )


def beside_uniform() -> list[Row]:
    """Skewed work, per id, beside uniform ids at L=20 in the same form."""
    rows = []
    spec = uniform_spec()
    even = batches(spec, [20] * TABLES)
    giant_spec = Spec(
        tables=(Table(rows=GIANT_ROWS, dim=DIM), *(Table(rows=ROWS, dim=DIM) for _ in range(TABLES - 1))),
        optimizer=ADAGRAD,
    )
    level_rows = GIANT_ROWS // TABLES
    level = Spec(tables=tuple(Table(rows=level_rows, dim=DIM) for _ in range(TABLES)), optimizer=ADAGRAD)
    level_batches = batches(level, [3] * TABLES)
    giant_name = f"one table of 5M rows with {GIANT_IDS} ids a bag beside 25 with 1"
    giant_batches = batches(giant_spec, [GIANT_IDS, *[1] * (TABLES - 1)])
    # The same work with the giant table's ids in as few rows as a level table has: what is left of the difference then
    # is the kernel's (its sort, its shares of the threads), not that 1.3 GB are read at random.
    few_rows = [giant_ids_in(batch, level_rows) for batch in giant_batches]
    cases = [
        ("L=20 Zipf 1.2", spec, batches(spec, [20] * TABLES, zipf=ZIPF), spec, even),
        (giant_name, giant_spec, giant_batches, level, level_batches),
        (f"{giant_name}, its ids in {level_rows // 1000}k rows", giant_spec, few_rows, level, level_batches),
    ]
    grad = torch.randn(BATCH, TABLES * DIM)
    for name, skewed, skewed_batches, flat, flat_batches in cases:
        bags, others = filled(skewed), filled(flat)
        runs = paired(
            stepper(bags, cycle(skewed_batches), grad), stepper(others, cycle(flat_batches), grad), pairs=PAIRS[20]
        )
        per_id = skewed_batches[0].ids_N.numel() / flat_batches[0].ids_N.numel()
        runs = [(replace(ours, seconds=ours.seconds / per_id), theirs) for ours, theirs in runs]
        rows.append(
            rate_row(
                f"{name}, step",
                runs,
                count=flat_batches[0].ids_N.numel(),
                unit="ids/s",
                baseline_name="ours on uniform ids",
                correct=right(skewed, skewed_batches[0], grad),
            )
        )
    return rows


def workspace(ids_per_bag: int) -> Row:
    """Memory that steps take beside tables and optimizer state, outputs included, beside what they may."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        taken = fresh.apply(grown, (ids_per_bag,))
    shared = {"baseline": WORKSPACE / 1e6, "baseline_name": "what it may take", "correct": taken <= WORKSPACE}
    name = f"L={ids_per_bag} memory of a step beside tables and state"
    return Row(name=name, unit="MB", ours=taken / 1e6, ratio=WORKSPACE / max(taken, 1), **shared)


def grown(ids_per_bag: int) -> int:
    """Bytes by which this process's peak grows over steps, once tables, states, batches and loops are there."""
    small = Spec(tables=(Table(rows=100, dim=DIM),), optimizer=ADAGRAD)
    TableBatchedEmbeddingBag(small, backend="cpu")(
        torch.zeros(1, dtype=torch.long), torch.tensor([0, 1])
    ).sum().backward()
    bags = filled(uniform_spec())
    for state in bags.state.states.values():
        state.fill_(0.0)  # its pages, too
    step = stepper(bags, cycle(batches(bags.spec, [ids_per_bag] * TABLES)), torch.randn(BATCH, TABLES * DIM))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    for _ in range(2 * BATCHES):
        step()
    return memory("VmHWM") - before


def memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def right(spec: Spec, batch: Batch, grad: Tensor) -> bool:
    """One step from fresh tables against plain torch, on the rows of the first table, which has the skew."""
    bags = filled(spec)
    before_ED = bags.state.tables[0].clone()
    bags(batch.ids_N, batch.offsets).backward(grad)
    end = int(batch.offsets[BATCH])
    rows_U, at_N = torch.unique(batch.ids_N[:end], return_inverse=True)
    bag_N = torch.repeat_interleave(torch.arange(BATCH), batch.offsets[: BATCH + 1].diff())
    g_UD = torch.zeros(len(rows_U), DIM, dtype=torch.float64).index_add_(0, at_N, grad[bag_N, :DIM].double())
    s_U = g_UD.square().mean(1)
    w_UD = before_ED[rows_U].double() - ADAGRAD.lr * g_UD / (s_U.sqrt() + ADAGRAD.eps)[:, None]
    before_ED[rows_U] = w_UD.float()
    return close([before_ED], [bags.state.tables[0]])


def close(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, two, strict=True))
