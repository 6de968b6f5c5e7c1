"""The planner against the best of all plans on small cases, its bound, its rules and what it says when nothing fits."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from kernels.errors import UserError
from sharding.bound import Options, cheapest_subsets, lower_bound
from sharding.configurations import relax
from sharding.cost import load, price
from sharding.placing import Placer
from sharding.planner import Infeasible, Limits, Rule, rules_from, solve
from sharding.search import search
from sharding.skew import Skew
from sharding.topology import parse
from sharding.ways_out import ways_out
from sharding.work import DenseWork, Readers, TableLoad, Work

GIB = 2**30


def random_case(seed: int):
    """A few tables on one to four ranks; memory short in every other case, so that the best plan has to give way."""
    rng = np.random.default_rng(seed)
    cluster = parse(["h100-80gb:1x2", "h100-80gb:1x3", "a100-40gb:2x2", "cpu:1x2", "cpu:1x1"][seed % 5])
    tables = []
    for t in range(int(rng.integers(2, 5 if cluster.world_size < 4 else 4))):
        rows = int(np.exp(rng.uniform(np.log(500), np.log(5e6))))
        skew = Skew.of(rows=rows, top_share={"1": 0.1, "100": 0.4}, ordered=True) if rng.random() < 0.5 else None
        tables.append(
            TableLoad(
                name=f"t{t}",
                rows=rows,
                dim=int(rng.choice([4, 8, 16])),
                bags=int(rng.integers(1, 3)),
                ids=float(rng.uniform(1, 60)),
                skew=skew,
            )
        )
    batch = cluster.world_size * int(rng.choice([64, 4096, 65536]))
    work = Work(tables=tuple(tables), batch_size=batch, overlapped=bool(rng.random() < 0.7))
    prices = price(work, cluster)
    total = sum(t.bytes for t in tables)
    share = rng.uniform(0.9, 2.0) if seed % 2 else 40.0
    limit = prices.base_bytes + share * total / cluster.world_size + 2e6
    return work, cluster, prices, float(limit)


def placements(place: str, parts: int, cluster) -> list[tuple[int, ...]]:
    world, local, hosts = cluster.world_size, cluster.ranks_per_host, cluster.hosts
    if place == "all":
        return [tuple(range(world))]
    if place == "one":
        return [(r,) for r in range(world)]
    if place == "distinct":
        return list(combinations(range(world), parts))
    if place == "host":
        return [tuple(range(h * local, (h + 1) * local)) for h in range(hosts)]
    if place == "hosts":
        chosen = combinations(range(hosts), parts)
        return [tuple(h * local + i for h in hs for i in range(local)) for hs in chosen]
    return [c for h in range(hosts) for c in combinations(range(h * local, (h + 1) * local), parts)]


def exhaustive(prices, options) -> float:
    """The step of the best of all plans; infinite where none fits.  All plans at once: what a table adds to the
    ranks is made for each of its choices, and the sums over tables are taken over the product of their choices."""
    cluster = prices.topology
    alone = np.array([load(prices, []).main, load(prices, []).hidden])  # (2, W)
    types = {s: i for i, s in enumerate(prices.group)}
    sums, used = np.zeros((1, 4, cluster.world_size)), np.zeros((1, len(types)), bool)  # main, hidden, device, host
    for t in range(len(prices.tables)):
        adds, uses = [], []
        for k in np.flatnonzero(options.allowed[:, t]):
            kind = prices.kinds[k]
            own = [
                prices.main_seconds(k)[t],
                prices.input_seconds(k)[t],
                kind.device[:, t].sum(0),
                kind.host[:, t].sum(0),
            ]
            for ranks in placements(kind.kind.place, kind.kind.column_parts, cluster):
                add = np.zeros((4, cluster.world_size))
                for i, rank in enumerate(ranks):
                    add[:, rank] += [part[i % len(part)] for part in own]
                adds.append(add)
                uses.append(np.arange(len(types)) == types[kind.kind.sharding])
        sums = (sums[:, None] + np.array(adds)[None]).reshape(-1, 4, cluster.world_size)
        used = (used[:, None] | np.array(uses)[None]).reshape(-1, len(types))
    groups = used @ np.array([prices.group[s] for s in types])  # (plans, 2)
    steps = (sums[:, :2] + alone + groups[:, :, None]).max((1, 2))
    fits = (sums[:, 2] <= options.device_limit).all(1)
    by_host = sums[:, 3].reshape(len(sums), cluster.hosts, -1).sum(2)
    return float(np.where(fits & (by_host <= options.host_limit).all(1), steps, np.inf).min())


def thinned(prices, limit: float, seed: int) -> Options:
    """At most four kinds of each table, so that all plans can be looked at; a host's memory is short in every third."""
    rng = np.random.default_rng(seed)
    allowed = np.array([kind.valid for kind in prices.kinds])
    for t in range(allowed.shape[1]):
        there = np.flatnonzero(allowed[:, t])
        kept = rng.choice(there, size=min(4, len(there)), replace=False)
        allowed[:, t] = False
        allowed[kept, t] = True
        allowed[[k for k, kind in enumerate(prices.kinds) if kind.kind.label == "table_wise"], t] = True
    total = sum(t.bytes for t in prices.tables)
    host_limit = 1e15 if seed % 3 else total * rng.uniform(0.2, 0.9) / prices.topology.hosts
    return Options.of(prices, allowed, device_limit=limit, host_limit=float(host_limit))


@pytest.mark.parametrize("block", range(8))
def test_the_bound_is_never_above_the_best_plan_and_no_plan_below_it(block):
    from sharding import exact

    for seed in range(40 * block, 40 * block + 40):
        _, _, prices, limit = random_case(seed)
        options = thinned(prices, limit, seed)
        if not options.allowed.any(0).all():
            continue
        best = exhaustive(prices, options)
        bound = lower_bound(options, upper=np.inf)
        assert bound <= best * (1 + 1e-9), seed
        found = search(options, aim=bound)
        if found is not None:
            assert found.step >= best * (1 - 1e-9), seed
            assert lower_bound(options, upper=found.step) <= best * (1 + 1e-9), seed
            assert load(prices, found.choices).step_seconds == pytest.approx(found.step, rel=1e-9)
        if seed % 4 == 0:
            proved = exact.solve(options)
            assert proved.proved and proved.step == pytest.approx(best, rel=1e-5), seed
            assert proved.bound <= best * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_small_cases_are_solved_exactly_and_plans_are_deterministic(seed):
    work, cluster, prices, _ = random_case(seed)
    one, two = solve(work, cluster), solve(work, cluster)
    assert one.choices == two.choices and one.bound == two.bound
    assert one.gap <= 5e-3
    assert (one.load.rank_bytes <= Limits().of(cluster)[0]).all()
    assert one.load.step_seconds == load(prices, one.choices).step_seconds >= one.bound


def work_of(*tables: tuple[int, int], batch: int = 1 << 15, ids: float = 4.0) -> Work:
    made = tuple(TableLoad(name=f"t{i}", rows=rows, dim=dim, ids=ids) for i, (rows, dim) in enumerate(tables))
    return Work(tables=made, batch_size=batch, dense=DenseWork(flops_per_row=1e6, ops=50))


def test_memory_limits_hold_and_tiers_beyond_the_device_are_used_when_it_is_full():
    work, cluster = work_of(*[(4_000_000, 64)] * 6), parse("h100-80gb:1x2")
    roomy, tight = solve(work, cluster), solve(work, cluster, limits=Limits(device=3.5 * GIB))
    assert roomy.load.rank_bytes.max() > 3.5 * GIB >= tight.load.rank_bytes.max()
    assert {tight.prices.kinds[c.kind].kind.tier for c in tight.choices} > {"device"}
    assert tight.load.step_seconds > roomy.load.step_seconds
    assert tight.load.host_rank_bytes.sum() > 0 == roomy.load.host_rank_bytes.sum()


def test_a_plan_is_found_where_device_and_host_memory_are_both_short():
    """0.8 TiB of tables on 0.58 TiB of devices, and on hosts of which none holds all that is left."""
    rng = np.random.default_rng(1)
    tables = tuple(
        TableLoad(name=f"t{i}", rows=int(np.exp(rng.uniform(7, 19.5))), dim=int(rng.choice([32, 64, 128])), ids=4.0)
        for i in range(150)
    )
    work, cluster = Work(tables=tables, batch_size=1 << 14), parse("a100-40gb:2x8")
    beyond = sum(t.bytes for t in tables) - cluster.world_size * Limits().of(cluster)[0]
    assert beyond > 0
    solution = solve(work, cluster, limits=Limits(host=0.8 * beyond))
    on_host = solution.load.host_rank_bytes.reshape(2, 8).sum(1)
    assert (on_host <= 0.8 * beyond).all() and on_host.min() > 0
    assert (solution.load.rank_bytes <= Limits().of(cluster)[0]).all()


def test_rules_are_kept():
    work, cluster = work_of((100_000, 64), (50_000, 32), (1000, 16)), parse("h100-80gb:2x4")
    rules = {
        "t0": Rule(shardings=frozenset(["grid_shard"]), column_parts=2, said="a"),
        "t1": Rule(tiers=frozenset(["host"]), said="b"),
        "t2": Rule(shardings=frozenset(["table_row_wise", "row_wise"]), said="c"),
    }
    solution = solve(work, cluster, rules=rules)
    kinds = [solution.prices.kinds[c.kind].kind for c in solution.choices]
    assert (kinds[0].sharding, kinds[0].column_parts, kinds[0].row_parts) == ("grid_shard", 2, 4)
    assert kinds[1].tier == "host" and kinds[2].sharding in ("table_row_wise", "row_wise")
    assert len(set(solution.choices[0].ranks)) == 8
    best, free = solution.load.step_seconds, solve(work, cluster)
    assert free.load.step_seconds <= best


def test_rules_by_pattern_are_joined_and_contradictions_are_named():
    one, two = (
        Rule(shardings=frozenset(["row_wise", "table_wise"]), said="first"),
        Rule(tiers=frozenset(["host"]), said="x"),
    )
    joined = rules_from(["a1", "a2", "b"], [(["a*"], one), (["a2"], two)], {"b": one})
    assert joined["a2"].shardings == one.shardings and joined["a2"].tiers == two.tiers and joined["a1"] == one
    against = Rule(shardings=frozenset(["column_wise"]), said="second")
    with pytest.raises(UserError, match=r"'b': first allows sharding row_wise, table_wise, second column_wise"):
        rules_from(["b"], [(["b"], against)], {"b": one})
    with pytest.raises(UserError, match=r"match = 'C9' matches no table; there are: C1"):
        rules_from(["C1"], [(["C9"], one)], {})


@pytest.mark.parametrize(
    ("work", "cluster", "words"),
    [
        (work_of((0, 16)), "h100-80gb", ["'t0'", "0 rows"]),
        (work_of((10, 6)), "h100-80gb", ["'t0'", "6 columns", "multiple of 4"]),
        (work_of(), "h100-80gb", ["no table"]),
        (work_of((10, 8), batch=100), "h100-80gb", ["100", "8 ranks", "96"]),
    ],
)
def test_what_makes_no_sense_is_refused(work, cluster, words):
    with pytest.raises(UserError) as error:
        solve(work, parse(cluster))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_rule_that_no_placement_meets_is_named():
    with pytest.raises(UserError, match=r"'t0'.*here asks for row_wise, which h100-80gb:1x8 cannot give it"):
        solve(
            work_of((3, 16)), parse("h100-80gb:1x8"), rules={"t0": Rule(shardings=frozenset(["row_wise"]), said="here")}
        )


def test_a_table_wider_than_memory_is_named_with_its_bytes():
    work = work_of((10**9, 1024), (1000, 16))
    rules = {"t0": Rule(shardings=frozenset(["table_wise"]), tiers=frozenset(["device"]), said="x")}
    with pytest.raises(Infeasible) as error:
        solve(work, parse("a100-40gb:1x8"), rules=rules)
    short = error.value
    limit, _ = Limits().of(parse("a100-40gb:1x8"))
    assert short.table == "t0" and short.short_by > 10**9 * 1024 * 4 - limit
    assert all(w in str(short) for w in ("'t0'", "1,000,000,000 rows", "short by", "bytes"))


def test_what_a_rank_needs_beside_tables_is_named_with_what_makes_less_of_it():
    """A reader's 300 MB of 2 streams; libraries take what they take; a GPU's readers are in its host's memory."""
    work = replace(work_of((1000, 16)), readers=Readers(streams=4, stream_bytes=3e8))
    with pytest.raises(Infeasible) as error:
        solve(work, parse("cpu:1x2"), limits=Limits(device=1e6))
    said = str(error.value)
    assert "(libraries 0.59 GiB, the data's readers 0.56 GiB)" in said and "data.threads" in said
    assert "train.batch_size" not in said and said.endswith("or more memory a rank")
    with pytest.raises(Infeasible) as error:
        solve(replace(work, batch_size=2**26), parse("h100-80gb:1x2"), limits=Limits(device=1e6))
    said = str(error.value)
    assert "readers" not in said and "activations" in said and "use a smaller train.batch_size or more" in said


def test_ways_out_are_tried_and_each_of_them_works():
    """1.9 TiB of tables on 8 devices of 39 GiB and 1 TB of host memory."""
    work, cluster = work_of((2_000_000_000, 128), (1_500_000_000, 128), (10**8, 128)), parse("a100-40gb:1x8")
    with pytest.raises(Infeasible) as error:
        solve(work, cluster)
    assert error.value.short_by > 0 and error.value.who
    ways = ways_out(work, cluster, rules={}, limits=Limits())
    changes = {key: value for way in ways for key, value in way.change.items()}
    assert {"cluster", "rows", "rows_share", "dim"} <= set(changes)
    solve(work, parse(changes["cluster"]))
    hosts = int(changes["cluster"].split(":")[1].split("x")[0])
    with pytest.raises(Infeasible):
        solve(work, parse(f"a100-40gb:{hosts // 2}x8"))  # 3 hosts, 5, 6, 7 do not divide the batch
    solve(replace(work, tables=tuple(replace(t, dim=changes["dim"]) for t in work.tables)), cluster)

    def with_rows(rows: int) -> Work:
        return replace(work, tables=(replace(work.tables[0], rows=rows), *work.tables[1:]))

    solve(with_rows(changes["rows"]), cluster)
    with pytest.raises(Infeasible):
        solve(with_rows(changes["rows"] + 2 * work.tables[0].rows // 128), cluster)


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        (Rule(shardings=frozenset(["table_wise"]), tiers=frozenset(["device"]), said="x"), "column_split"),
        (Rule(tiers=frozenset(["device"]), said="x"), "tier"),
        (Rule(tiers=frozenset(["device"]), can_tiers=frozenset(["device", "host"]), said="x"), "tier"),
    ],
)
def test_rules_that_are_in_the_way_are_named_as_a_way_out(rule, key):
    rows = 100_000_000 if key == "column_split" else 800_000_000
    work, cluster = work_of((rows, 128), (1000, 16)), parse("a100-40gb:1x8")
    with pytest.raises(Infeasible):
        solve(work, cluster, rules={"t0": rule})
    ways = ways_out(work, cluster, rules={"t0": rule}, limits=Limits())
    way = next(w for w in ways if key in w.change)
    assert way.change[key] == ["t0"] and "t0" in way.how and way.step > 0
    assert key != "tier" or ("cache" in way.how) == ("cache" in rule.can_tiers)


@pytest.mark.parametrize(
    ("limits", "keys"),
    [
        (Limits(device=4e9, host=2e10), {"device_bytes", "host_bytes"}),  # 95 GiB: either is enough
        (Limits(host=1e9), {"host_bytes"}),
    ],
)
def test_larger_limits_are_ways_out_as_small_as_they_can_be(limits, keys):
    rows = 200_000_000 if limits.device else 800_000_000
    work, cluster = work_of((rows, 128), (1000, 16)), parse("a100-40gb:1x8")
    with pytest.raises(Infeasible):
        solve(work, cluster, limits=limits)
    ways = [way.change for way in ways_out(work, cluster, rules={}, limits=limits)]
    changes = [way for way in ways if {"device_bytes", "host_bytes"} & set(way)]
    assert {key for way in changes for key in way} == keys
    for way in changes:
        larger = Limits(device=way.get("device_bytes", limits.device), host=way.get("host_bytes", limits.host))
        solve(work, cluster, limits=larger)
        smaller = Limits(
            device=way["device_bytes"] * 0.8 if "device_bytes" in way else limits.device,
            host=way["host_bytes"] * 0.8 if "host_bytes" in way else limits.host,
        )
        with pytest.raises(Infeasible):
            solve(work, cluster, limits=smaller)


def many_tables(count: int) -> tuple[TableLoad, ...]:
    rng = np.random.default_rng(5)
    return tuple(
        TableLoad(name=f"t{i}", rows=int(np.exp(rng.uniform(7, 17))), dim=int(rng.choice([32, 64, 128])),
                  ids=float(min(200, 1 + rng.pareto(1.2))))
        for i in range(count)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "batch_size", "cluster"),
    [
        (100, 1 << 15, "h100-80gb:4x8"),
        (200, 1 << 17, "h100-80gb:16x8"),
        (1000, 1 << 20, "h100-80gb:128x8"),
    ],
)
def test_large_cases_are_near_the_bound(tables, batch_size, cluster):
    work = Work(tables=many_tables(tables), batch_size=batch_size, dense=DenseWork(flops_per_row=1e7))
    solution = solve(work, parse(cluster))
    assert solution.bound <= solution.load.step_seconds
    assert solution.gap <= 0.05


def on_whole_hosts(prices) -> Options:
    """Only table_row_wise: every table takes all ranks of one host."""
    rows = np.array([[kind.kind.sharding == "table_row_wise" for kind in prices.kinds]]).T
    return Options.of(prices, np.tile(rows, (1, len(prices.tables))), device_limit=1e15, host_limit=1e15)


def test_hosts_are_filled_one_after_the_other():
    # Look-ups in the proportions 3 3 2 2 2 fill two hosts as 3 + 3 and 2 + 2 + 2; each on the emptier one gives 7 to 5.
    tables = tuple(TableLoad(name=f"t{i}", rows=10_000, dim=16, ids=100.0 * n) for i, n in enumerate((3, 3, 2, 2, 2)))
    cluster = replace(parse("h100-80gb:2x2"), part_seconds=1e-15, rows_seconds=1e-15, cache=1.0)
    options = on_whole_hosts(price(Work(tables=tables, batch_size=1 << 15), cluster))
    (k,) = set(np.flatnonzero(options.allowed.any(1)))
    placer, kinds = Placer(options), np.full(5, k)
    longest_first = placer.place(kinds)
    best = 0.5 * (longest_first.step + lower_bound(options, upper=longest_first.step))
    filled = placer.fill(kinds, best)
    assert filled is not None and filled.step <= best < longest_first.step
    assert load(options.prices, filled.choices).step_seconds == pytest.approx(filled.step, rel=1e-12)
    by_host = [{rank // 2 for rank in choice.ranks} for choice in filled.choices]
    assert all(len(hosts) == 1 for hosts in by_host) and by_host[0] == by_host[1]
    assert placer.fill(kinds, lower_bound(options, upper=np.inf) * 0.9) is None


def test_shares_are_rounded_in_several_ways_that_are_the_same_every_time():
    prices = price(Work(tables=many_tables(40), batch_size=1 << 16), parse("h100-80gb:2x8"))
    options = Options.of(prices, np.ones((len(prices.kinds), 40), bool), device_limit=7e10, host_limit=1e12)
    aim = lower_bound(options, upper=np.inf)
    # As near the bound as the program has an answer: there some tables are divided between kinds.
    tried = ((step, cheapest_subsets(options, step)) for step in aim * np.arange(1.0, 1.2, 0.01))
    step, shardings = next((z, s[0]) for z, s in tried if s and relax(options, s[0], z).kinds)
    one = relax(options, shardings, step).kinds
    several, again = (relax(options, shardings, step, roundings=8).kinds for _ in range(2))
    assert len(one) == 1 and (one[0] == several[0]).all()
    assert 1 < len({kinds.tobytes() for kinds in several}) == len(several) <= 8
    assert all((a == b).all() for a, b in zip(several, again, strict=True))
    assert all(options.allowed[kinds, np.arange(40)].all() for kinds in several)


def test_without_an_upper_end_the_bound_is_as_near_as_with_one():
    prices = price(Work(tables=many_tables(40), batch_size=1 << 16), parse("h100-80gb:2x8"))
    options = Options.of(prices, np.ones((len(prices.kinds), 40), bool), device_limit=7e10, host_limit=1e12)
    far = lower_bound(options, upper=1.0)
    assert lower_bound(options, upper=np.inf) == pytest.approx(far, rel=2e-3)
    cheapest = min(prices.group[s][0] for s in options.shardings())
    assert far > 1.1 * (prices.base_seconds + cheapest), "more than what every plan costs"
