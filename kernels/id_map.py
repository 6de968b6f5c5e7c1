"""Unbounded 64-bit ids -> rows of a table, no two ids the same row.  kernels/id_maps/base.py says what a map does.

    ids = IdMap(Policy(limit=10_000_000, admit_after=10, evict="lru"), name="user")
    found = ids.admit(ids_N, clock=step)         training: found.rows_N, and in found.new_rows_K rows that begin anew
    rows_N = ids.find(ids_N)                     evaluation: 0 for ids without a row, and nothing changes
    ids.expire(before=step - 100_000)            ids unseen since then lose their rows

One rank of several holds the ids of some of the PARTS (`part_range`); `owner_of` says whose an id is.  `reshard` takes
the states of all ranks to another number of ranks.

Shapes: N ids of a call, K ids that have rows, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels.choice import choose
from kernels.errors import UserError
from kernels.id_maps.base import COUNTERS, HOST, LAST_CLOCK, PARTS, Admitted, Counts, Policy, State, part_of

BACKENDS = "kernels.id_maps"
EVICTED = torch.tensor([int(one.name == "evicted") for one in fields(Counts)])


class IdMap:
    """The map of one table, or of the parts of it that one of `ranks` ranks holds.

    limit: ids that can have rows here.  size: ids that have.  top: the highest row given so far, so that a table of
    top + 1 rows holds all that there are.  counts: a Counts.  choice: the backend and why.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        rank: int = 0,
        ranks: int = 1,
        name: str = "",
        backend: str = "auto",
        device: torch.device = HOST,
    ) -> None:
        """name: of the table, for errors.  backend: a file in kernels/id_maps/, or the fastest ("auto").
        device: of the ids that it is asked for, and of the rows that it gives."""
        self.policy, self.name, self.device = policy, name, device
        self.first_part, self.parts = part_range(rank=rank, ranks=ranks)
        self.choice = choose(policy, device, backend, package=BACKENDS)
        self._store = self.choice.module.Store(
            policy, first_part=self.first_part, parts=self.parts, name=name, device=device
        )
        self.clock = 0

    @property
    def limit(self) -> int:
        return self._store.limit

    @property
    def size(self) -> int:
        return self._store.size

    @property
    def top(self) -> int:
        return self._store.top

    @property
    def counts(self) -> Counts:
        return replace(self._store.counts)

    def find(self, ids_N: Tensor) -> Tensor:
        """(N,) int64 ids -> (N,) int64 rows, 0 for ids that have none; the map does not change."""
        return self._store.find(self._own(ids_N)).to(self.device)

    def admit(self, ids_N: Tensor, *, clock: int) -> Admitted:
        """The rows of a batch of ids seen at `clock`, of new ones too; see kernels/id_maps/base.py's Store.

        clock: steps, hours or whatever `expire` is to be told in; it never goes back.
        Raises UserError that names the table when the map is full and cannot evict.
        """
        self._tick(clock)
        found = self._store.admit(self._own(ids_N), clock)
        if self._store.device == self.device:
            return found
        return Admitted(**{one.name: getattr(found, one.name).to(self.device) for one in fields(Admitted)})

    def expire(self, *, before: int) -> Tensor:
        """Takes the rows of all ids not seen at `before` or later; (K,) int64, ascending: these rows are free."""
        return self._store.expire(before).to(self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors on the host, exact: what loads it, on any device and backend, goes on as this map would,
        row by row."""
        state = self._store.state()
        counts = [getattr(state.counts, one.name) for one in fields(Counts)]
        names = [one.name for one in fields(State) if one.name not in ("top", "counts")]
        tensors = {name: getattr(state, name).to(HOST) for name in names}
        about = torch.tensor([state.top, self.clock, self.first_part, self.parts])
        return {**tensors, "about": about, "counts": torch.tensor(counts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """UserError when it is of other parts, or of a policy with another filter or a higher limit."""
        top, clock, first_part, parts = state["about"].tolist()
        where = f"id map of table {self.name!r}" if self.name else "id map"
        if (first_part, parts) != (self.first_part, self.parts):
            raise UserError(
                f"{where}: the state is of parts {first_part} to {first_part + parts - 1}, this map has "
                f"{self.first_part} to {self.first_part + self.parts - 1}; reshard it to as many ranks first"
            )
        if top > self.limit:
            raise UserError(f"{where}: the state has {top:,} rows, more than the limit of {self.limit:,}; raise it")
        shape = (parts, 2, self.policy.lines, COUNTERS)
        if tuple(state["filter_PHLC"].shape) != shape:
            raise UserError(
                f"{where}: the state's counting filter has the shape {tuple(state['filter_PHLC'].shape)}, this "
                f"policy's {shape}; keep window, limit and whether ids wait for admission as they were"
            )
        device = self._store.device
        tensors = {name: value.to(device) for name, value in state.items() if name not in ("about", "counts")}
        self._store.load(State(**tensors, top=top, counts=Counts(*state["counts"].tolist())))
        self.clock = clock

    def seen_since(self, clock: int) -> tuple[Tensor, Tensor]:
        """((K,) ids, (K,) rows) of the ids seen at `clock` or later, by ascending row: what a delta has to hold."""
        state = self._store.state()
        recent_K = state.clocks_K >= clock
        return state.ids_K[recent_K].to(self.device), state.rows_K[recent_K].to(self.device)

    def _own(self, ids_N: Tensor) -> Tensor:
        assert ids_N.dtype == torch.int64 and ids_N.dim() == 1 and ids_N.device.type == self.device.type
        return ids_N.contiguous().to(self._store.device)

    def _tick(self, clock: int) -> None:
        assert self.clock <= clock <= LAST_CLOCK, f"clock {clock} after {self.clock}"
        self.clock = clock


def part_range(*, rank: int, ranks: int) -> tuple[int, int]:
    """(first part, number of parts) of a rank: 256 parts on 3 ranks are 0-84, 85-169, 170-255."""
    if not 1 <= ranks <= PARTS:
        raise UserError(f"id map: {ranks:,} ranks; there are {PARTS} parts of ids, so use at most {PARTS} ranks")
    assert 0 <= rank < ranks
    first = PARTS * rank // ranks
    return first, PARTS * (rank + 1) // ranks - first


def owner_of(ids_N: Tensor, *, ranks: int, seed: int) -> Tensor:
    """(N,) int64 ids -> (N,) int64 rank whose map has the id."""
    return ((part_of(ids_N, seed=seed) + 1) * ranks - 1) // PARTS


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """One new rank's state, and where the weights of its rows come from.

    from_rank_K, from_row_K: the old rank and row of row k + 1: rows are 1 .. K in the order of old rank and old row.
    """

    state: dict[str, Tensor]
    from_rank_K: Tensor
    from_row_K: Tensor


def reshard(states: Sequence[dict[str, Tensor]], *, policy: Policy, ranks: int, name: str = "") -> list[Resharded]:
    """The states of all ranks' maps, in order of rank, as those of another number of ranks.

    Ids, clocks, uses and the filter go along, so every id is admitted, expires and is found as it would have been.
    Rows are numbered anew without gaps.  The first new rank's counts are the sums of the old ones, the others' are 0.
    A new rank's share of the limit may be smaller than what it gets: then it evicts by the policy, and counts that.
    Raises UserError that names the table where that is so and eviction is off.
    """
    ids_K = torch.cat([state["ids_K"] for state in states])
    rows_K, clocks_K, uses_K = (torch.cat([s[part] for s in states]) for part in ("rows_K", "clocks_K", "uses_K"))
    ranks_K = torch.repeat_interleave(torch.arange(len(states)), torch.tensor([len(s["ids_K"]) for s in states]))
    filter_PHLC = torch.cat([state["filter_PHLC"] for state in states])
    counted_P = torch.cat([state["counted_P"] for state in states])
    assert len(counted_P) == PARTS, "the states of all ranks"
    owner_K = owner_of(ids_K, ranks=ranks, seed=policy.seed)
    counts = sum(state["counts"] for state in states)
    clock = max(state["about"][1].item() for state in states)
    found = []
    for rank in range(ranks):
        here_K = (owner_K == rank).nonzero().flatten()
        first, parts = part_range(rank=rank, ranks=ranks)
        limit = policy.share(first, parts)
        evicted = max(0, len(here_K) - limit)
        if evicted and policy.evict == "off":
            kept = f" (with window = {policy.whole_window:,}, so that the filter fits)" if policy.lines else ""
            raise UserError(
                f"id map of table {name!r}: rank {rank} of {ranks} gets {len(here_K):,} ids, its share of the limit of "
                f"{policy.limit:,} is {limit:,}, and eviction is off; raise the limit{kept}, set "
                'evict = "lru" or "lfu", or go on with as many ranks as before'
            )
        if evicted:
            value_K = clocks_K[here_K] + (uses_K[here_K] << 32 if policy.evict == "lfu" else 0)
            here_K = here_K[value_K.argsort(stable=True)[evicted:].sort().values]
        state = {
            "ids_K": ids_K[here_K],
            "rows_K": torch.arange(1, len(here_K) + 1),
            "clocks_K": clocks_K[here_K],
            "uses_K": uses_K[here_K],
            "free_J": torch.empty(0, dtype=torch.int64),
            "filter_PHLC": filter_PHLC[first : first + parts],
            "counted_P": counted_P[first : first + parts],
            "about": torch.tensor([len(here_K), clock, first, parts]),
            "counts": (counts if rank == 0 else torch.zeros_like(counts)) + evicted * EVICTED,
        }
        found.append(Resharded(state=state, from_rank_K=ranks_K[here_K], from_row_K=rows_K[here_K]))
    return found
