"""`tablemesh bench idmap`: beside TorchRec's managed collision (MCHManagedCollisionModule: a sorted array).

With --device cuda both are on the GPU, each turn from an idle GPU to an idle GPU.

10 million random 62-bit ids that have rows, in slots filled to 80%; batches of a million.  Each row takes turns A B A B
on the same batches and checks in the same run that ids have the rows that are theirs.  Compiling is done before the
first turn.

    find                  look-up alone, ids drawn uniformly from those that have rows
    admit, known ids      the same in training: what was looked up is also marked as seen
    admit, new ids        a million ids never seen before, into an empty map that grows as they come, or an empty module
    admit after 10        ids by a power law over 100 million, so many wait in the counting filter; the baseline counts
                          exactly what is in the batch alone (torch.unique with counts) and forgets it
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle

import torch
from torch import Tensor
from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from benchmarks.base import Row, paired, rate_row, report
from kernels.id_map import IdMap
from kernels.id_maps.base import HOST, Policy

BATCHES = 4  # made before, then taken in turns
PAIRS = 7
ZIPF, AFTER = 1.05, 10
MANAGED = "TorchRec's MCHManagedCollisionModule"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """rows: of the map; batch: ids of a call; universe: different ids of the power law."""

    device: torch.device = HOST
    backend: str = "cpu"
    rows: int = 10_000_000
    batch: int = 1_000_000
    universe: int = 100_000_000

    def ids(self, limit: int, **policy: int) -> IdMap:
        return IdMap(Policy(limit=limit, **policy), backend=self.backend, device=self.device)

    def managed(self, rows: int) -> MCHManagedCollisionModule:
        """TorchRec's module for `rows` ids; it keeps one row more, for the ids that have none."""
        return MCHManagedCollisionModule(
            zch_size=rows + 1,
            device=self.device,
            eviction_policy=LFU_EvictionPolicy(),
            eviction_interval=1,
            input_hash_size=1 << 62,
        )

    def drawn(self, size: int, high: int, rng: torch.Generator) -> Tensor:
        return torch.randint(0, high, (size,), generator=rng).to(self.device)

    def turns(self, ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int) -> list:
        return paired(partial(self._done, ours), partial(self._done, theirs), pairs=pairs)

    def _done(self, work: Callable[[], object]) -> None:
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(*, json: bool = False, device: str = "cpu", bench: Bench | None = None) -> int:
    """Run everything, print it; the exit code."""
    if device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU that torch can use; --device cuda measures one", file=sys.stderr)
        return 2
    if bench is None:
        bench = Bench() if device == "cpu" else Bench(device=torch.device("cuda"), backend="triton")
    rng = torch.Generator().manual_seed(1)
    return report("idmap", [*known_ids(bench, rng), new_ids(bench, rng), waiting_ids(bench, rng)], json=json)


def known_ids(bench: Bench, rng: torch.Generator) -> list[Row]:
    ids_E = bench.drawn(bench.rows, 1 << 62, rng)
    ids = bench.ids(bench.rows)
    rows_E = ids.admit(ids_E, clock=1).rows_N
    places = [bench.drawn(bench.batch, bench.rows, rng) for _ in range(BATCHES)]
    batches = [ids_E[place_N] for place_N in places]
    managed = bench.managed(bench.rows).eval()
    order_E = ids_E.argsort()
    managed._mch_sorted_raw_ids[:-1] = ids_E[order_E]
    managed._mch_remapped_ids_mapping[:-1] = order_E
    exact = ids.size == ids.top == len(ids_E.unique()) == bench.rows
    clock = count(2)

    def admit(ids_N: Tensor) -> Tensor:
        return ids.admit(ids_N, clock=next(clock)).rows_N

    def row(name: str, rows_of: Callable[[Tensor], Tensor]) -> Row:
        ours, theirs = cycle(batches), cycle(batches)
        runs = bench.turns(lambda: rows_of(next(ours)), lambda: _remap(managed, next(theirs)), pairs=PAIRS)
        same = all(
            torch.equal(rows_of(ids_N), rows_E[place_N]) and torch.equal(_remap(managed, ids_N), place_N)
            for place_N, ids_N in zip(places, batches, strict=True)
        )
        correct = exact and same
        return rate_row(name, runs, count=bench.batch, unit="ids/s", baseline_name=MANAGED, correct=correct)

    return [row("find", ids.find), row("admit, known ids", admit)]


def new_ids(bench: Bench, rng: torch.Generator) -> Row:
    ids_N = bench.drawn(bench.batch, 1 << 62, rng)
    assert len(ids_N.unique()) == bench.batch
    rows: list[Tensor] = [ids_N, ids_N]

    def ours() -> None:
        rows[0] = bench.ids(bench.batch).admit(ids_N, clock=1).rows_N

    def theirs() -> None:
        module = bench.managed(bench.batch).train()
        module.profile({"f": JaggedTensor(values=ids_N, lengths=torch.ones_like(ids_N))})
        rows[1] = _remap(module, ids_N)

    runs = bench.turns(ours, theirs, pairs=3)
    correct = all(len(rows_N.unique()) == bench.batch for rows_N in rows)
    return rate_row("admit, new ids", runs, count=bench.batch, unit="ids/s", baseline_name=MANAGED, correct=correct)


def waiting_ids(bench: Bench, rng: torch.Generator) -> Row:
    batches = [_power_law(bench, rng) for _ in range(PAIRS + 1)]
    ids = bench.ids(bench.rows, admit_after=AFTER)
    ours, theirs, clock = iter(batches), iter(batches), count(1)
    runs = bench.turns(
        lambda: ids.admit(next(ours), clock=next(clock)),
        lambda: next(theirs).unique(return_counts=True),
        pairs=PAIRS,
    )
    seen_K, times_K = torch.cat(batches).unique(return_counts=True)
    admitted_K = ids.find(seen_K) > 0  # no id too late; how many too early is the filter's error
    correct = bool(admitted_K[times_K >= AFTER].all() and (admitted_K & (times_K < AFTER)).float().mean() < 1e-3)
    name, baseline = f"admit after {AFTER}", "torch.unique of the batch"
    return rate_row(name, runs, count=bench.batch, unit="ids/s", baseline_name=baseline, correct=correct)


def _power_law(bench: Bench, rng: torch.Generator) -> Tensor:
    """Number k of the universe has a share proportional to about k ** -ZIPF (inverse of the continuous law)."""
    top = 1 - bench.universe ** (1 - ZIPF)
    uniform_N = torch.rand(bench.batch, generator=rng, dtype=torch.float64)
    return ((1 - uniform_N * top).pow(1 / (1 - ZIPF)).long() * 0x9E3779B97F4A7C1).to(bench.device)


def _remap(module: MCHManagedCollisionModule, ids_N: Tensor) -> Tensor:
    return module.remap({"f": JaggedTensor(values=ids_N, lengths=torch.ones_like(ids_N))})["f"].values()
