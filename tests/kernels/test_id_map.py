"""Every id map in kernels/id_maps/ does what the reference does, and the reference what a dict does."""

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kernels import registry
from kernels.errors import UserError
from kernels.hashing import mix64, mix64_of
from kernels.id_map import BACKENDS, IdMap, owner_of, part_range, reshard
from kernels.id_maps.base import MOST_USES, PARTS, Policy, part_of

CPU = torch.device("cpu")
NAMES = registry.names(BACKENDS)
# Triton's is among them where Triton interprets: tests/kernels/test_triton.py runs this file so.
KINDS = [kind for kind in NAMES if registry.load(BACKENDS, kind).supports(Policy(limit=1), CPU) is None]
FAST = [kind for kind in KINDS if kind != "reference"]
INTERPRETED = "triton" in KINDS  # a hundred times slower
SLOW = settings(max_examples=5 if INTERPRETED else 25, deadline=None, suppress_health_check=list(HealthCheck))
EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**62, 2**32]


def ids_of(*ids):
    return torch.tensor(ids, dtype=torch.int64)


@st.composite
def histories(draw):
    """A policy, and what happens to its map: ("admit", ids), ("find", ids), ("expire", age), ("save",)."""
    policy = Policy(
        limit=draw(st.integers(1, 40)),
        admit_after=draw(st.sampled_from([1, 1, 2, 3])),
        window=draw(st.sampled_from([None, 1, 300, 2000])),
        evict=draw(st.sampled_from(["off", "lru", "lfu"])),
        seed=draw(st.sampled_from([0, 7, 2**63, 2**64 - 1])),
    )
    some = st.lists(st.one_of(st.integers(-30, 30), st.sampled_from(EXTREMES)), max_size=40)
    event = st.one_of(
        *[st.tuples(st.just("admit"), some)] * 4,
        st.tuples(st.just("find"), some),
        st.tuples(st.just("expire"), st.integers(0, 4)),
        st.tuples(st.just("save")),
    )
    return policy, draw(st.lists(event, min_size=1, max_size=20))


def happen(ids, clock, kind, *given_):
    """The result of one event as plain values, an error as its text."""
    if kind == "find":
        return ids.find(ids_of(*given_[0])).tolist()
    if kind == "expire":
        return ids.expire(before=clock - given_[0]).tolist()
    if kind == "save":
        return {name: tensor.tolist() for name, tensor in ids.state_dict().items()}
    try:
        found = ids.admit(ids_of(*given_[0]), clock=clock)
    except UserError as error:
        return str(error)
    return [found.rows_N.tolist(), found.new_ids_K.tolist(), found.new_rows_K.tolist()]


@pytest.mark.parametrize("kind", FAST)
@SLOW
@given(history=histories())
def test_equal_to_the_reference(kind, history):
    policy, events = history
    ours, reference = IdMap(policy, backend=kind, name="t"), IdMap(policy, backend="reference", name="t")
    for clock, event in enumerate(events, 1):
        assert happen(ours, clock, *event) == happen(reference, clock, *event)
        if event[0] == "save":  # each goes on from the other's state
            states = ours.state_dict(), reference.state_dict()
            ours, reference = IdMap(policy, backend=kind, name="t"), IdMap(policy, backend="reference", name="t")
            reference.load_state_dict(states[0])
            ours.load_state_dict(states[1])
    assert happen(ours, 0, "save") == happen(reference, 0, "save")
    assert (ours.size, ours.top, ours.counts) == (reference.size, reference.top, reference.counts)


@pytest.mark.parametrize("kind", KINDS)
@SLOW
@given(history=histories())
def test_no_id_ever_shares_a_row(kind, history):
    """A dict beside it that is told only what was given and freed."""
    policy, events = history
    ids, owner, row_of = IdMap(policy, backend=kind), {}, {}
    for clock, event in enumerate(events, 1):
        result = happen(ids, clock, *event)
        if event[0] == "expire":
            for row in result:
                row_of.pop(owner.pop(row))
        elif event[0] == "admit" and isinstance(result, list):
            rows, new_ids, new_rows = result
            assert len(set(new_ids)) == len(new_ids) and len(set(new_rows)) == len(new_rows)
            assert not set(new_ids) & set(row_of)
            for i, row in zip(new_ids, new_rows, strict=True):
                row_of.pop(owner.pop(row, None), None)  # evicted
                owner[row], row_of[i] = i, row
                assert 1 <= row <= policy.limit
            for i, row in zip(event[1], rows, strict=True):
                assert row == row_of.get(i) or (row == 0 and (i in new_ids or i not in row_of))
        elif event[0] == "find":  # evicted ids whose rows are still free are found nowhere
            assert all(row == 0 or row_of[i] == row for i, row in zip(event[1], result, strict=True))
        if policy.evict == "off":
            assert ids.size == len(row_of)
    here = [i for i in row_of if ids.find(ids_of(i)).item()]
    assert ids.size == len(here) and len({row_of[i] for i in here}) == len(here)


@pytest.mark.parametrize("kind", KINDS)
@SLOW
@given(history=histories(), ranks=st.permutations([2, 3, 1]))
def test_reshard_changes_nothing_but_row_numbers(kind, history, ranks):
    """Maps of 1, 2, 3 ranks by turns admit the same ids at the same time as one map that nobody cuts."""
    policy, events = history
    policy = Policy(limit=10_000, admit_after=policy.admit_after, window=policy.window, seed=policy.seed)
    whole = IdMap(policy, backend=kind)
    cut = [IdMap(policy, backend=kind)]
    for clock, event in enumerate(events, 1):
        if event[0] == "save":
            to = ranks[clock % 3]
            old = cut
            states = [one.state_dict() for one in old]
            made = reshard(states, policy=policy, ranks=to, name="t")
            cut = [IdMap(policy, rank=r, ranks=to, backend=kind) for r in range(to)]
            for one, new in zip(cut, made, strict=True):
                one.load_state_dict(new.state)
                before = {(r, row): i for r, s in enumerate(states) for i, row in pairs_of(s)}
                came = zip(new.from_rank_K.tolist(), new.from_row_K.tolist(), strict=True)
                after = dict(reversed(pair) for pair in pairs_of(new.state))
                assert [before[pair] for pair in came] == [after[row] for row in range(1, one.size + 1)]
            continue
        if event[0] == "expire":
            gone = len(happen(whole, clock, *event))
            assert sum(len(happen(one, clock, *event)) for one in cut) == gone
            continue
        batch = ids_of(*event[1])
        owner_N = owner_of(batch, ranks=len(cut), seed=policy.seed)
        want = happen(whole, clock, *event)
        has = want if event[0] == "find" else want[0]
        for r, one in enumerate(cut):
            mine = (owner_N == r).nonzero().flatten()
            got = happen(one, clock, event[0], batch[mine].tolist())
            got = got if event[0] == "find" else got[0]
            assert [row > 0 for row in got] == [has[n] > 0 for n in mine.tolist()]
    assert sum(one.size for one in cut) == whole.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evict", ["lru", "lfu"])
def test_a_full_map_goes_to_more_ranks_without_the_ids_that_eviction_would_take(kind, evict):
    policy = Policy(limit=100, evict=evict)
    ids, rng = IdMap(policy, backend=kind), random.Random(1)
    for clock in range(1, 5):
        ids.admit(ids_of(*rng.choices(range(-30 * clock, 0), k=70)), clock=clock)
    ids.admit(ids_of(*range(1, 101 - ids.size)), clock=5)
    state = ids.state_dict()
    value_K = state["clocks_K"] + (state["uses_K"] << 32)  # uses are 0 but for lfu
    owner_K = owner_of(state["ids_K"], ranks=3, seed=0)
    evicted = 0
    for rank, new in enumerate(reshard([state], policy=policy, ranks=3, name="t")):
        one = IdMap(policy, rank=rank, ranks=3, backend=kind)
        one.load_state_dict(new.state)
        assert one.size == len(new.from_row_K) <= one.limit
        gone_K = (owner_K == rank) & (one.find(state["ids_K"]) == 0)
        here_K = (owner_K == rank) & ~gone_K
        assert one.size == here_K.sum() and state["rows_K"][here_K].tolist() == new.from_row_K.tolist()
        assert not gone_K.any() or (one.size == one.limit and value_K[gone_K].max() <= value_K[here_K].min())
        assert one.counts.evicted == gone_K.sum() + (ids.counts.evicted if rank == 0 else 0)
        evicted += int(gone_K.sum())
    assert ids.size == 100 and evicted
    found = reshard([one.state_dict() for one in [ids]], policy=policy, ranks=1)[0]
    assert found.state["ids_K"].tolist() == state["ids_K"].tolist()


def pairs_of(state):
    return list(zip(state["ids_K"].tolist(), state["rows_K"].tolist(), strict=True))


def unmixed(h):
    """The id whose mix64_of is h: each step of the hash undone."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x = h
        for _ in range(64 // shift + 1):
            x = h ^ x >> shift
        h = x * pow(factor, -1, 2**64) % 2**64
    return h


def awkward_ids(rng):
    """Ids of one line of slots, of one line of the filter, of one counter, around 0 and at the ends of 64 bits."""
    line, counters = rng.getrandbits(32), rng.getrandbits(24)
    hashes = [k << 32 | line for k in range(30)]  # the low half is the home line
    hashes += [2**64 - 1 << 32 & 2**64 - 1 | k for k in range(20)]  # the last line of the last part, the high half
    hashes += [line << 32 | k << 24 | counters for k in range(20)]  # and the low bits are the counters
    hashes += [2**32 - 1 | k << 32 for k in range(12)]  # the last line of slots, which overflows into the first
    ids = [x - 2**64 if x >> 63 else x for x in map(unmixed, hashes)]
    return ids + EXTREMES + list(range(-20, 20))


def fuzz(kind, seed, steps):
    """Everything at random on a small map, beside the reference; what differs fails at once."""
    rng = random.Random(seed)
    ids, clock = awkward_ids(rng), 0
    policy = Policy(
        limit=rng.choice([1, 3, 20, 64, 300]),
        admit_after=rng.choice([1, 2, 3, 9, 255]),
        window=rng.choice([1, 256, 512, 3000]),
        evict=rng.choice(["off", "lru", "lfu"]),
    )
    rank, ranks = rng.choice([(0, 1), (0, 1), (1, 2), (199, 256)])
    owned = owner_of(ids_of(*ids), ranks=ranks, seed=0) == rank
    ids = [i for i, mine in zip(ids, owned.tolist(), strict=True) if mine] or [next_owned(rank, ranks)]

    def made(backend):
        return IdMap(policy, rank=rank, ranks=ranks, backend=backend, name="t")

    both = made(kind), made("reference")
    for _ in range(steps):
        clock += rng.choice([0, 1, 1, 2, 1 << 20])
        some = rng.sample(ids, rng.randint(1, len(ids)))
        batch = [rng.choice(some) for _ in range(rng.choice([0, 1, 2, 30, 60 if INTERPRETED else 200]))]
        what = rng.choices(["admit", "find", "expire", "save"], [12, 3, 2, 1])[0]
        age = rng.choice([0, 1, 3, 1 << 20, 1 << 22])
        event = {"expire": (what, age), "save": (what,)}.get(what, (what, batch))
        ours, expected = (happen(one, clock, *event) for one in both)
        assert ours == expected, (seed, policy, event)
        if what == "save":
            states = [one.state_dict() for one in both]
            both = made(kind), made("reference")
            for one, state in zip(both, reversed(states), strict=True):
                one.load_state_dict(state)
    assert happen(both[0], 0, "save") == happen(both[1], 0, "save")
    assert (both[0].size, both[0].top, both[0].counts) == (both[1].size, both[1].top, both[1].counts)


def next_owned(rank, ranks):
    return next(i for i in range(10**6) if owner_of(ids_of(i), ranks=ranks, seed=0).item() == rank)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("seed", range(3 if INTERPRETED else 12))
def test_awkward_ids_at_random(kind, seed):
    fuzz(kind, seed, steps=12 if INTERPRETED else 60)


def test_ids_of_a_given_hash():
    assert [mix64_of(unmixed(h)) for h in (0, 1, 2**63, 2**64 - 1, 123 << 40)] == [0, 1, 2**63, 2**64 - 1, 123 << 40]


def test_a_million_random_ids_take_a_million_rows():
    drawn = torch.randint(0, 2**62, (1_000_000,), generator=torch.Generator().manual_seed(3))
    assert len(drawn.unique()) == 1_000_000
    ids = IdMap(Policy(limit=1_000_000), backend="cpu")
    first = torch.cat([ids.admit(part, clock=1).rows_N for part in drawn.split(300_000)])
    assert torch.equal(first, torch.arange(1, 1_000_001)) and ids.size == ids.top == 1_000_000
    again = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(4))
    assert torch.equal(ids.find(drawn[again]), first[again])
    with pytest.raises(UserError, match=r"1 new ids want rows, 0 of its 1,000,000 can be had"):
        ids.admit(ids_of(-1), clock=2)
    assert ids.find(ids_of(-1)).item() == 0


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("evict", ["lru", "lfu"])
def test_threads_change_nothing(kind, evict):
    """Batches large enough to be divided, a map that grows, evicts and expires."""
    rng = torch.Generator().manual_seed(5)
    batches = [(torch.rand(30_000, generator=rng) ** 4 * 60_000).long() * 0x9E3779B97F4A7C1 for _ in range(5)]
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            ids = IdMap(Policy(limit=13_000, admit_after=2, evict=evict), backend=kind)
            rows = [ids.admit(batch, clock=clock).rows_N for clock, batch in enumerate(batches)]
            ids.expire(before=5)
            found.append([*rows, *ids.state_dict().values()])
        finally:
            torch.set_num_threads(before)
    assert ids.counts.evicted > 100 and ids.counts.expired > 100
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_eviction_frees_a_sixty_fourth_at_once(kind):
    ids = IdMap(Policy(limit=128, evict="lru"), backend=kind)
    ids.admit(torch.arange(128), clock=1)
    ids.admit(torch.arange(2, 128), clock=2)
    found = ids.admit(ids_of(500), clock=3)
    assert ids.counts.evicted == 2 and ids.size == 127  # ids 0 and 1, unseen for longest
    assert found.new_rows_K.tolist() == [1] and ids.find(ids_of(0, 1, 2, 500)).tolist() == [0, 0, 3, 1]
    assert ids.admit(ids_of(0), clock=4).new_rows_K.tolist() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_lfu_keeps_what_occurs_often(kind):
    ids = IdMap(Policy(limit=3, evict="lfu"), backend=kind)
    ids.admit(ids_of(10, 10, 20, 30, 30, 30), clock=1)
    ids.admit(ids_of(20), clock=2)
    ids.admit(ids_of(40), clock=3)  # 10 and 20 occurred twice, 20 was seen later
    assert ids.find(ids_of(10, 20, 30, 40)).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [MOST_USES - 1, MOST_USES, 2**32 - 1])
def test_lfu_keeps_an_id_that_occurs_more_often_than_can_be_counted(kind, before):
    ids = IdMap(Policy(limit=3, evict="lfu"), backend=kind)
    ids.admit(ids_of(10, 20, 30, 30), clock=1)
    state = ids.state_dict()
    state["uses_K"][0] = before
    ids.load_state_dict(state)
    ids.admit(ids_of(10, 10), clock=2)
    assert ids.state_dict()["uses_K"].tolist() == [MOST_USES, 1, 2]
    ids.admit(ids_of(40), clock=3)
    assert ids.find(ids_of(10, 20, 30, 40)).tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("kind", FAST)
def test_the_filter_errs_as_its_docstring_says(kind):
    """A filter just before its halves change places a second time, full of ids that occurred once."""
    window = 1 << 16
    ids = IdMap(Policy(limit=1000, admit_after=255, window=window), backend=kind)
    rng = torch.Generator().manual_seed(6)
    ids.admit(torch.randint(-(2**63), 2**63 - 1, (2 * window - 4096,), generator=rng), clock=1)
    filter_ = ids.state_dict()["filter_PHLC"].int()
    fresh = torch.randint(-(2**63), 2**63 - 1, (50_000,), generator=rng)
    h = mix64(fresh)
    lines = filter_.shape[2]
    line = ((h >> 32 & 0xFFFFFFFF) * (PARTS * lines)) >> 32
    places = torch.stack([h >> 6 * k & 63 for k in range(4)])
    counted = sum(filter_[line // lines, half, line % lines, places].amin(0) for half in (0, 1))
    assert 0.005 < (counted >= 1).float().mean() < 0.08
    assert (counted >= 2).float().mean() < 0.01


def test_parts_and_owners():
    drawn = torch.cat([ids_of(*EXTREMES), torch.randint(-(2**63), 2**63 - 1, (1000,))])
    assert [mix64_of(i) for i in drawn.tolist()] == [h % 2**64 for h in mix64(drawn).tolist()]
    part_N = part_of(drawn, seed=9)
    assert len(part_N.unique()) > 200 and part_N.min() >= 0 and part_N.max() < PARTS
    for ranks in (1, 2, 3, 7, 256):
        ranges = [part_range(rank=r, ranks=ranks) for r in range(ranks)]
        assert sum(count for _, count in ranges) == PARTS
        owners = [next(r for r, (first, n) in enumerate(ranges) if first <= p < first + n) for p in part_N.tolist()]
        assert owner_of(drawn, ranks=ranks, seed=9).tolist() == owners
    with pytest.raises(UserError, match="at most 256 ranks"):
        part_range(rank=0, ranks=257)


def test_what_does_not_fit_is_refused():
    for bad in (
        {"limit": 0},
        {"limit": 5, "admit_after": 256},
        {"limit": 5, "window": 0},
        {"limit": 5, "evict": "x"},
        {"limit": 5, "seed": -1},
    ):
        with pytest.raises(UserError, match="id map: "):
            Policy(**bad)
    policy = Policy(limit=100, admit_after=2)
    state = IdMap(policy, rank=0, ranks=2, backend="reference").state_dict()
    with pytest.raises(UserError, match=r"'t': the state is of parts 0 to 127, this map has 128 to 255"):
        IdMap(policy, rank=1, ranks=2, backend="reference", name="t").load_state_dict(state)
    with pytest.raises(UserError, match="counting filter"):
        IdMap(Policy(limit=100), rank=0, ranks=2, backend="reference").load_state_dict(state)
    ids = IdMap(Policy(limit=100), backend="reference")
    ids.admit(torch.arange(100), clock=1)
    with pytest.raises(UserError, match="more than the limit of 50"):
        IdMap(Policy(limit=50), backend="reference").load_state_dict(ids.state_dict())
    with pytest.raises(UserError, match=r"table 't': rank \d of 2 gets \d+ ids, its share .* evict = \"lru\" or"):
        reshard([ids.state_dict()], policy=Policy(limit=100), ranks=2, name="t")
