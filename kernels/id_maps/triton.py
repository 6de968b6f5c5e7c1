"""The id map on a GPU, in Triton and torch's sorts: kernels/id_maps/_triton_slots.py has the kernels.

All that the map knows is in tensors on the device.  What a call does there:

    find          one launch; the host waits for nothing
    admit         the same launch, which also marks ids as seen and counts their uses; then the host waits once, for the
                  occurrences of ids without rows (none, in a batch of known ids, and that is all)
                  these are sorted by id; `count` runs the filter over them; the host waits a second time, for how many
                  ids are admitted: the shape of the result, and whether rows and slots suffice
                  rows go out by a prefix sum in the order of admission; `put` writes the new ids into the slots
    expire        one pass over the slots; where it frees rows, and in an eviction, the slots are built anew

So no result depends on which thread comes first.  Atomics claim slots, whose order nothing shows, and add up integers.

The filter takes occurrences one after the other, and each may change what the next one finds.  But lines of the filter
do not touch each other, and parts of the ids only share when their halves change places: a group of occurrences that
must stay in order is one line's, or one part's where its window may end in this batch, and groups run side by side.
Occurrences of an id that come after it must have been admitted are left out before (`_needed`), so an id that is new
and everywhere makes no long group.

Memory: as the cpu map's, with 32 bytes for each slot of a moment more where slots are built anew, and in a call about
100 bytes for each occurrence of an id without a row.

Shapes: N ids of a call, M occurrences of ids without rows, K ids admitted or with rows, P parts.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.backends import triton as bags
from kernels.hashing import mix64
from kernels.id_lines import FEWEST_LINES, PLACES, WORDS, lines_for
from kernels.id_maps.base import (
    COUNTERS,
    EVICTED_AT_LEAST,
    MOST_USES,
    PARTS,
    Admitted,
    Counts,
    Policy,
    State,
    full,
)

SPEED = {"cuda": 3}  # "cpu" only in the interpreter, and when asked for
LOW = (1 << 32) - 1
BLOCK = 128  # ids of a tile, one to a thread: `put` has an atomic without a mask
GROUPS = 4  # of occurrences, that one warp counts side by side
CLEAR = 1024  # counters

available = bags.available


def supports(policy: Policy, device: torch.device) -> str | None:
    return bags.refusal(device)


class Store:
    def __init__(self, policy: Policy, *, first_part: int, parts: int, name: str, device: torch.device) -> None:
        self.policy, self.first_part, self.name, self.device = policy, first_part, name, device
        self.limit = policy.share(first_part, parts)
        self.seed = policy.seed - (1 << 64) if policy.seed >> 63 else policy.seed
        self.counting = policy.evict == "lfu"
        # The interpreter's time goes by the number of tiles.
        self.block, self.groups = (512, PARTS) if device.type == "cpu" else (BLOCK, GROUPS)
        self.size = self.top = 0
        self._lay(FEWEST_LINES)
        self.free = self._zeros(0)  # rows given before; the last one is given first
        self.uses = self._zeros(1, torch.int32)  # by row
        self.most_uses = 0  # of any row, at most
        self.filter = self._zeros(parts * 2 * policy.lines * COUNTERS, torch.uint8)
        self.newer, self.counted = self._zeros(parts), self._zeros(parts)
        self.counts = Counts()

    def find(self, ids_N: Tensor) -> Tensor:
        return self._find(ids_N, clock=0, touch=False)

    def admit(self, ids_N: Tensor, clock: int) -> Admitted:
        rows_N = self._find(ids_N, clock=clock, touch=True)
        at_M = (rows_N == 0).nonzero().flatten()  # the host waits for how many there are
        new_ids_K = new_rows_K = self._zeros(0)
        defaulted = 0
        if len(at_M):
            rows_M, new_ids_K, new_rows_K, defaulted = self._admit_missing(ids_N[at_M], clock)
            rows_N[at_M] = rows_M
        self.counts.occurrences += len(ids_N)
        self.counts.defaulted += defaulted
        self.counts.admitted += len(new_ids_K)
        return Admitted(rows_N=rows_N, new_ids_K=new_ids_K, new_rows_K=new_rows_K)

    def expire(self, before: int) -> Tensor:
        known = self._known()
        gone_K = known[(known != 0) & (known & LOW < before)].sort().values >> 32
        if len(gone_K):
            self.size -= len(gone_K)
            self._rebuild(self.size, leaves_K=gone_K)
            self.free = torch.cat([self.free, gone_K.flip(0)])
            self.counts.expired += len(gone_K)
        return gone_K

    def state(self) -> State:
        known_K, order_K = self._entries()
        rows_K = known_K >> 32
        halves = self.filter.view(len(self.newer), 2, self.policy.lines, COUNTERS)
        order = torch.stack([self.newer, self.newer ^ 1], dim=1)
        return State(
            ids_K=self.slots[:, :PLACES].flatten()[order_K],
            rows_K=rows_K,
            clocks_K=known_K & LOW,
            uses_K=self.uses[rows_K].long() if self.counting else torch.zeros_like(rows_K),
            free_J=self.free.clone(),
            top=self.top,
            filter_PHLC=halves[torch.arange(len(order), device=self.device)[:, None], order],
            counted_P=self.counted.clone(),
            counts=replace(self.counts),
        )

    def load(self, state: State) -> None:
        self.size, self.top = len(state.ids_K), state.top
        self._lay(lines_for(self.size, lines=self.lines, limit=self.limit))
        self._put(state.ids_K, (state.rows_K << 32) | state.clocks_K)
        self.free = state.free_J.clone()
        uses_K = state.uses_K.clamp(max=MOST_USES)
        self.most_uses = int(uses_K.max()) if self.size else 0
        self.uses = self._zeros(self.top + 1, torch.int32)
        self.uses[state.rows_K] = uses_K.int()
        self.filter = state.filter_PHLC.flatten().clone()
        self.newer.zero_()
        self.counted = state.counted_P.clone()
        self.counts = replace(state.counts)

    def _find(self, ids_N: Tensor, *, clock: int, touch: bool) -> Tensor:
        from kernels.id_maps import _triton_slots

        rows_N, grid = torch.empty_like(ids_N), (-(-len(ids_N) // self.block),)
        if not len(ids_N):
            return rows_N
        counting = touch and self.counting
        with bags.on(self.device):
            _triton_slots.find[grid](
                *(self.slots, ids_N, rows_N, self.uses, self.lines, self.seed, clock, len(ids_N)),
                TOUCH=touch,
                COUNTING=counting,
                BLOCK=self.block,
                num_warps=4,
            )
            if counting:
                self.most_uses += len(ids_N)
                if self.most_uses > MOST_USES:  # some row's count may be; the kernel takes it down to that
                    _triton_slots.bound_uses[grid](
                        self.uses, rows_N, MOST_USES, len(ids_N), BLOCK=self.block, num_warps=4
                    )
                    self.most_uses = MOST_USES
        return rows_N

    def _admit_missing(self, ids_M: Tensor, clock: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """(M,) rows of the occurrences of ids without rows, the ids admitted and their rows, and how many got row 0."""
        missing = len(ids_M)
        at_M = torch.arange(missing, device=self.device)
        same = _Same(ids_M, at_M)
        admitting_M = same.first_M if self.policy.admit_after == 1 else self._count(ids_M, same)
        admits_M, has_M = admitting_M == at_M, admitting_M <= at_M
        given, owned = torch.stack([admits_M.sum(), has_M.sum()]).tolist()  # the host waits
        if not given:
            return self._zeros(missing), self._zeros(0), self._zeros(0), missing
        number_M = admits_M.cumsum(0) - 1  # of the admission
        at_K = torch.empty(given + 1, dtype=torch.int64, device=self.device)  # one more, for what is none
        at_K = at_K.scatter_(0, number_M.where(admits_M, given), at_M)[:given]
        new_ids_K = ids_M[at_K]
        new_rows_K = self._give(given, clock)
        self._put(new_ids_K, (new_rows_K << 32) | clock)
        number_M = number_M[admitting_M.where(has_M, at_K[0])]
        if self.counting:
            self._reach(self.top)
            self.uses[new_rows_K] = self._zeros(given, torch.int32).index_add_(0, number_M, has_M.int())
            self.most_uses = min(MOST_USES, max(self.most_uses, missing))
        return new_rows_K[number_M] * has_M, new_ids_K, new_rows_K, missing - owned

    def _count(self, ids_M: Tensor, same: "_Same") -> Tensor:
        """(M,) the occurrence that admits each occurrence's id, M where none does; the filter has counted them."""
        from kernels.id_maps import _triton_slots

        missing, lines = len(ids_M), self.policy.lines
        h_M = mix64(ids_M ^ self.seed)
        line_M = (((h_M >> 32) & LOW) * (PARTS * lines) >> 32) - self.first_part * lines
        part_M = line_M // lines
        ends_P = self._ends(part_M)
        needed_M = same.before_M < self._needed(ends_P)[part_M]
        group_M = torch.where(ends_P[part_M] > 0, part_M * lines, line_M)
        group_M = group_M.where(needed_M, len(self.newer) * lines)
        group_M, order_M = torch.sort(group_M, stable=True)
        begins_M = _begins(group_M)
        firsts = needed_M.sum().repeat(missing + 2)  # where the last group ends; those left out are no group
        firsts.scatter_(0, (begins_M.cumsum(0) - 1).where(begins_M, missing + 1), same.at_M)
        admitted_M = torch.full_like(ids_M, missing)
        with bags.on(self.device):
            _triton_slots.count[(-(-missing // self.groups),)](
                *(h_M, same.number_M, order_M, ends_P, firsts, admitted_M, self.filter, self.newer, self.counted),
                *(missing, lines, self.first_part, self.policy.part_window, self.policy.admit_after),
                CLEAR=CLEAR,
                GROUPS=self.groups,
                num_warps=1,
            )
        return admitted_M[same.number_M]

    def _ends(self, part_M: Tensor) -> Tensor:
        """(P,) how often each part's window may end in this call, at most."""
        return self.counted.index_add(0, part_M, torch.ones_like(part_M)) // self.policy.part_window

    def _needed(self, ends_P: Tensor) -> Tensor:
        """(P,) occurrences of an id after which it must have a row: from one end of the window to the next at most
        admit_after - 1 are counted without, since each raises what the newer half says by one."""
        return (ends_P + 1) * (self.policy.admit_after - 1) + 1

    def _give(self, given: int, clock: int) -> Tensor:
        """Rows for so many new ids, and room in the slots; others are evicted if need be."""
        from_free = min(given, len(self.free))
        beyond = min(given - from_free, self.limit - self.top)
        short = given - from_free - beyond
        rows = [
            self.free[len(self.free) - from_free :].flip(0),
            torch.arange(self.top + 1, self.top + 1 + beyond, device=self.device),
        ]
        if short:
            evicted_K = self._evicted(short, given, clock)
            self.size += given - len(evicted_K)
            self._rebuild(self.size, leaves_K=evicted_K)
            self.counts.evicted += len(evicted_K)
            rows.append(evicted_K[:short])
            self.free = evicted_K[short:].flip(0)
        else:
            self.size += given
            if lines_for(self.size, lines=self.lines, limit=self.limit) != self.lines:
                self._rebuild(self.size)
            self.free = self.free[: len(self.free) - from_free]
        self.top += beyond
        return torch.cat(rows)

    def _evicted(self, short: int, given: int, clock: int) -> Tensor:
        """(K,) rows of at least `short` ids that are to lose them, ascending."""
        known_K, _ = self._entries()
        known_K = known_K[known_K & LOW < clock] if self.policy.evict != "off" else known_K[:0]
        if len(known_K) < short:
            top_up = given - short + len(known_K)
            raise full(self.name, wanted=given, limit=self.limit, top_up=top_up, evict=self.policy.evict)
        rows_K, value_K = known_K >> 32, known_K & LOW
        if self.counting:
            value_K = value_K + (self.uses[rows_K].long() << 32)
        count = min(len(rows_K), max(short, self.limit // EVICTED_AT_LEAST))
        return rows_K[torch.sort(value_K, stable=True).indices[:count]].sort().values  # of equals the lowest rows

    def _known(self) -> Tensor:
        return self.slots[:, PLACES:].flatten()

    def _entries(self) -> tuple[Tensor, Tensor]:
        """What is known of every id, by ascending row, and its place in the slots."""
        known = self._known()
        at_K = known.nonzero().flatten()
        known_K, order_K = known[at_K].sort()
        return known_K, at_K[order_K]

    def _put(self, ids_K: Tensor, known_K: Tensor) -> None:
        from kernels.id_maps import _triton_slots

        if len(ids_K):
            with bags.on(self.device):
                _triton_slots.put[(-(-len(ids_K) // self.block),)](
                    *(self.slots, ids_K, known_K, self.lines, self.seed, len(ids_K)), BLOCK=self.block, num_warps=4
                )

    def _rebuild(self, size: int, *, leaves_K: Tensor | None = None) -> None:
        """Slots for `size` ids, with all that are there now but those whose rows are in leaves_K."""
        ids, known = self.slots[:, :PLACES].flatten(), self._known()
        if leaves_K is not None:
            leaves = self._zeros(self.top + 1, torch.bool).index_fill_(0, leaves_K, True)
            known = known.masked_fill(leaves[known >> 32], 0)
        self._lay(lines_for(size, lines=self.lines, limit=self.limit))
        self._put(ids, known)

    def _lay(self, lines: int) -> None:
        self.lines = lines
        self.slots = self._zeros(lines * WORDS).view(lines, WORDS)

    def _reach(self, row: int) -> None:
        """Make room for the uses of rows up to this one."""
        if row >= len(self.uses):
            grown = self._zeros(min(self.limit, 2 * row) + 1, torch.int32)
            grown[: len(self.uses)] = self.uses
            self.uses = grown

    def _zeros(self, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)


class _Same:
    """The occurrences of each id of a batch.

    ids 7 3 7 7 3: number_M 1 0 1 1 0 (ids ascending), first_M 0 1 0 0 1 (an id's first occurrence), before_M 0 0 1 2 1
    (occurrences before).
    """

    def __init__(self, ids_M: Tensor, at_M: Tensor) -> None:
        self.at_M = at_M
        sorted_M, order_M = torch.sort(ids_M, stable=True)
        begins_M = _begins(sorted_M)
        start_M = at_M.where(begins_M, 0).cummax(0).values
        self.number_M, self.first_M, self.before_M = (
            torch.empty_like(at_M).scatter_(0, order_M, value_M)
            for value_M in (begins_M.cumsum(0) - 1, order_M[start_M], at_M - start_M)
        )


def _begins(sorted_M: Tensor) -> Tensor:
    """(M,) bool: where a run of equal values begins."""
    begins_M = torch.ones_like(sorted_M, dtype=torch.bool)
    torch.ne(sorted_M[1:], sorted_M[:-1], out=begins_M[1:])
    return begins_M
