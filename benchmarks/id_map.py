"""`tablemesh bench idmap`: beside TorchRec's managed collision (MCHManagedCollisionModule: a sorted array).

10 million random 62-bit ids that have rows, in slots filled to 80%; batches of a million.  Each row takes turns A B A B
on the same batches and checks in the same run that ids have the rows that are theirs.  Compiling is done before the
first turn.

    find                  look-up alone, ids drawn uniformly from those that have rows
    admit, known ids      the same in training: what was looked up is also marked as seen
    admit, new ids        a million ids never seen before, into an empty map that grows as they come, or an empty module
    admit after 10        ids by a power law over 100 million, so many wait in the counting filter; the baseline counts
                          exactly what is in the batch alone (torch.unique with counts) and forgets it
"""

from collections.abc import Callable
from itertools import count, cycle

import torch
from torch import Tensor
from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from benchmarks.base import Row, paired, rate_row, report
from kernels.id_map import IdMap
from kernels.id_maps.base import Policy

ROWS, BATCH = 10_000_000, 1_000_000
BATCHES = 4  # made before, then taken in turns
PAIRS = 7
UNIVERSE, ZIPF, AFTER = 100_000_000, 1.05, 10
MANAGED = "TorchRec's MCHManagedCollisionModule"


def main(*, json: bool = False) -> int:
    """Run everything, print it; the exit code."""
    rng = torch.Generator().manual_seed(1)
    return report("idmap", [*known_ids(rng), new_ids(rng), waiting_ids(rng)], json=json)


def known_ids(rng: torch.Generator) -> list[Row]:
    ids_E = torch.randint(0, 1 << 62, (ROWS,), generator=rng)
    ids = IdMap(Policy(limit=ROWS), backend="cpu")
    rows_E = ids.admit(ids_E, clock=1).rows_N
    places = [torch.randint(0, ROWS, (BATCH,), generator=rng) for _ in range(BATCHES)]
    batches = [ids_E[place_N] for place_N in places]
    managed = _managed(ROWS).eval()
    order_E = ids_E.argsort()
    managed._mch_sorted_raw_ids[:-1] = ids_E[order_E]
    managed._mch_remapped_ids_mapping[:-1] = order_E
    exact = ids.size == ids.top == len(ids_E.unique()) == ROWS
    clock = count(2)

    def admit(ids_N: Tensor) -> Tensor:
        return ids.admit(ids_N, clock=next(clock)).rows_N

    def row(name: str, rows_of: Callable[[Tensor], Tensor]) -> Row:
        ours, theirs = cycle(batches), cycle(batches)
        runs = paired(lambda: rows_of(next(ours)), lambda: _remap(managed, next(theirs)), pairs=PAIRS)
        same = all(
            torch.equal(rows_of(ids_N), rows_E[place_N]) and torch.equal(_remap(managed, ids_N), place_N)
            for place_N, ids_N in zip(places, batches, strict=True)
        )
        return rate_row(name, runs, count=BATCH, unit="ids/s", baseline_name=MANAGED, correct=exact and same)

    return [row("find", ids.find), row("admit, known ids", admit)]


def new_ids(rng: torch.Generator) -> Row:
    ids_N = torch.randint(0, 1 << 62, (BATCH,), generator=rng)
    assert len(ids_N.unique()) == BATCH
    rows: list[Tensor] = [ids_N, ids_N]

    def ours() -> None:
        rows[0] = IdMap(Policy(limit=BATCH), backend="cpu").admit(ids_N, clock=1).rows_N

    def theirs() -> None:
        module = _managed(BATCH).train()
        module.profile({"f": JaggedTensor(values=ids_N, lengths=torch.ones_like(ids_N))})
        rows[1] = _remap(module, ids_N)

    runs = paired(ours, theirs, pairs=3)
    correct = all(len(rows_N.unique()) == BATCH for rows_N in rows)
    return rate_row("admit, new ids", runs, count=BATCH, unit="ids/s", baseline_name=MANAGED, correct=correct)


def waiting_ids(rng: torch.Generator) -> Row:
    batches = [_power_law(rng) for _ in range(PAIRS + 1)]
    ids = IdMap(Policy(limit=ROWS, admit_after=AFTER), backend="cpu")
    ours, theirs, clock = iter(batches), iter(batches), count(1)
    runs = paired(
        lambda: ids.admit(next(ours), clock=next(clock)),
        lambda: next(theirs).unique(return_counts=True),
        pairs=PAIRS,
    )
    seen_K, times_K = torch.cat(batches).unique(return_counts=True)
    admitted_K = ids.find(seen_K) > 0  # no id too late; how many too early is the filter's error
    correct = bool(admitted_K[times_K >= AFTER].all() and (admitted_K & (times_K < AFTER)).float().mean() < 1e-3)
    name = f"admit after {AFTER}"
    return rate_row(name, runs, count=BATCH, unit="ids/s", baseline_name="torch.unique of the batch", correct=correct)


def _power_law(rng: torch.Generator) -> Tensor:
    """BATCH ids; number k of UNIVERSE has a share proportional to about k ** -ZIPF (inverse of the continuous law)."""
    top = 1 - UNIVERSE ** (1 - ZIPF)
    uniform_N = torch.rand(BATCH, generator=rng, dtype=torch.float64)
    return (1 - uniform_N * top).pow(1 / (1 - ZIPF)).long() * 0x9E3779B97F4A7C1


def _managed(rows: int) -> MCHManagedCollisionModule:
    """TorchRec's module for `rows` ids; it keeps one row more, for the ids that have none."""
    return MCHManagedCollisionModule(
        zch_size=rows + 1,
        device=torch.device("cpu"),
        eviction_policy=LFU_EvictionPolicy(),
        eviction_interval=1,
        input_hash_size=1 << 62,
    )


def _remap(module: MCHManagedCollisionModule, ids_N: Tensor) -> Tensor:
    return module.remap({"f": JaggedTensor(values=ids_N, lengths=torch.ones_like(ids_N))})["f"].values()
