"""The cost model: formulas by hand, sums over ranks, and its bytes against the real ones of sharded tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from sharding import topology
from sharding.cost import BYTES, PARTS, Choice, Kind, allreduce_seconds, load, price
from sharding.plan import embeddings_of
from sharding.skew import Skew
from sharding.tables.base import SHARDING_TYPES, Table
from sharding.topology import parse
from sharding.work import DenseWork, TableLoad, Work
from tests.models import build_sharded
from tests.ranks import run_ranks
from trainer.config import Optim
from trainer.models import dlrm
from trainer.optim import adagrad, rowwise_adagrad, sgd

# Round numbers, nothing cached and nothing overlapped: 4 ranks on 2 hosts.
ROUND = replace(
    parse("cpu:2x2"),
    cache=1e-9, memory_bandwidth=1e9, row_seconds=1e-9, row_bandwidth=1e9, cached_row_seconds=2e-9,
    cached_row_bandwidth=2e9, update_row_seconds=3e-9, update_row_bandwidth=1e9, id_seconds=5e-9, vector_bandwidth=1e9,
    intra_bandwidth=1e9, inter_bandwidth=5e8, link_efficiency=1.0, part_seconds=1e-6, rows_seconds=1e-6,
    bucket_seconds=1e-9, bag_seconds=0.0, replica_seconds=1e-4, replica_id_seconds=7e-9, replica_row_seconds=11e-9,
    update_dense_bandwidth=1e9, intra_latency=1e-6, inter_latency=10e-6, peer_seconds=1e-6, group_seconds=1e-4,
)  # fmt: skip
# 1,000 rows of 8 columns, 400 samples a step of one bag with 2 ids: 800 ids, 25,600 -> 12,800 bytes of vectors.
TABLE = TableLoad(name="t", rows=1000, dim=8, ids=2.0)
WORK = Work(tables=(TABLE,), batch_size=400, overlapped=False)


def part_of(kind: Kind, *, work: Work = WORK, cluster=ROUND):
    prices = price(work, cluster, extra=[kind])
    (found,) = (k for k in prices.kinds if k.kind == kind)
    return found


def named(values) -> dict:
    return dict(zip(PARTS, np.asarray(values).tolist(), strict=True))


def test_table_wise_by_hand():
    found = part_of(Kind(sharding="table_wise"))
    seconds = named(found.seconds[:, 0, 0])
    distinct = 1000 * (1 - (1 - 1 / 1000) ** 800)
    remote = max(1 / 4 / 1e9, 2 / 4 / 5e8)  # seconds a byte: 1 of 4 ranks by the inner link, 2 by the outer one
    assert seconds["input"] == pytest.approx((8 * 800 + 8 * 400) * remote)
    assert seconds["lookup"] == pytest.approx(800 * (1e-9 + 32e-9) + 12_800e-9 + 1e-6, rel=1e-6)
    assert seconds["output"] == seconds["gradients"] == pytest.approx(12_800 * remote)
    assert seconds["update"] == pytest.approx(
        800 * (5e-9 + 2e-9 + 16e-9) + 12_800e-9 + distinct * (3e-9 + 2 * (32 + 4) * 1e-9)
    )
    held = dict(zip(BYTES, found.device[:, 0, 0], strict=True))
    assert held["weights"] == 32_000 and held["state"] == 4000 and held["buffers"] == 2 * 12_800
    assert held["ids"] == 8 * 800 + 8 * 400 + 16 * 800


def test_rows_of_16_bits_are_half_as_long_and_their_vectors_are_not():
    work = replace(WORK, tables=(replace(TABLE, element=2),))
    found, wide = part_of(Kind(sharding="table_wise"), work=work), part_of(Kind(sharding="table_wise"))
    distinct = 1000 * (1 - (1 - 1 / 1000) ** 800)
    saved = wide.seconds - found.seconds
    assert named(saved[:, 0, 0]) == pytest.approx(
        {"input": 0, "lookup": 800 * 16e-9, "output": 0, "gradients": 0, "update": 2 * 16e-9 * distinct}, rel=1e-6
    )
    assert found.device[:, 0, 0].tolist() == [16_000, *wide.device[1:, 0, 0].tolist()]
    assert found.volume.tolist() == wide.volume.tolist()


def test_row_wise_is_a_quarter_of_the_ids_and_all_of_the_vectors():
    found, whole = part_of(Kind(sharding="row_wise", row_parts=4)), part_of(Kind(sharding="table_wise"))
    seconds = named(found.seconds[:, 0, 0])
    assert found.seconds.shape[2] == 4
    assert seconds["output"] == pytest.approx(whole.seconds[2, 0, 0])
    assert seconds["lookup"] == pytest.approx(200 * 33e-9 + 12_800e-9 + 1e-6, rel=1e-6)
    divide = 200 * 1e-9 + 4 * 1e-6  # its own 200 ids, into four parts
    assert seconds["input"] == pytest.approx((8 * 200 + 8 * 400) * 1e-9 + divide)
    assert found.device[0, 0].tolist() == [8000] * 4


def test_column_parts_have_all_ids_and_a_share_of_the_columns():
    found = part_of(Kind(sharding="column_wise", column_parts=2))
    assert found.device[0, 0, 0] == 16_000 and found.device[1, 0, 0] == 4000  # one state a row and part
    assert found.volume[0, 0, 0] == part_of(Kind(sharding="table_wise")).volume[0, 0, 0]
    assert found.volume[1, 0, 0] == 6400 * 3 / 4
    assert not part_of(Kind(sharding="column_wise", column_parts=4)).valid[0]  # two columns are not a multiple of 4


def test_parts_on_one_host_send_to_each_other_first():
    seconds = named(part_of(Kind(sharding="table_row_wise", row_parts=2)).seconds[:, 0, 0])
    assert seconds["output"] == pytest.approx(12_800 * (1 / 2 / 1e9 + 1 / 2 / 2 / 5e8))
    grid = named(part_of(Kind(sharding="grid_shard", column_parts=2, row_parts=2)).seconds[:, 0, 0])
    assert grid["output"] == pytest.approx(seconds["output"] / 2)


def test_data_parallel_averages_the_whole_table():
    found = part_of(Kind(sharding="data_parallel"))
    update = named(found.seconds[:, 0, 0])["update"]
    averaged = allreduce_seconds(ROUND, 32_000)
    assert averaged == pytest.approx(32_000 * (2 * 1 / 2 / 1e9 + 2 * 1 / 2 / 2 / 5e8))
    ids = 200 * (7e-9 + 2e-9 + 16e-9)
    distinct = 1000 * (1 - (1 - 1 / 1000) ** 800)
    touched = distinct * (11e-9 + 8 * (32 + 4) * 1e-9)
    assert update == pytest.approx(ids + 32_000e-9 + averaged + 3.5 * 32_000e-9 + touched + 1e-4)
    assert found.copies(4).tolist() == [4]


def test_a_cache_keeps_frequent_rows_on_the_device():
    cluster = parse("h100-80gb:1x2")
    skew = Skew.of(rows=10**6, top_share={"1": 0.1, "10": 0.3, "100": 0.5, "1000": 0.7})
    work = Work(tables=(TableLoad(name="t", rows=10**6, dim=64, ids=10.0, skew=skew),), batch_size=1 << 16)
    tiers = {
        tier: part_of(Kind(sharding="table_wise", tier=tier, cache_share=0.1 if tier == "cache" else 0.0),
                      work=work, cluster=cluster)
        for tier in ("device", "cache", "host")
    }  # fmt: skip
    times = {tier: part.seconds[:, 0, 0].sum() for tier, part in tiers.items()}
    assert times["device"] < times["cache"] < times["host"]
    assert tiers["host"].host[0, 0, 0] == tiers["cache"].host[0, 0, 0] == 256e6 and tiers["device"].host.sum() == 0
    assert 25.6e6 < tiers["cache"].device[5, 0, 0] < 30e6


def test_a_plan_is_the_sum_of_its_parts_and_the_slowest_rank_counts():
    tables = (TABLE, replace(TABLE, name="u", ids=4.0), replace(TABLE, name="v", dim=16))
    dense = DenseWork(flops_per_row=1e6, bytes_per_row=1e3, bytes_fixed=1e5, ops=10, parameters=1000)
    prices = price(replace(WORK, tables=tables, dense=dense), ROUND)
    kinds = {kind.kind.label: k for k, kind in enumerate(prices.kinds)}
    choices = (Choice(kinds["table_wise"], (0,)), Choice(kinds["row_wise"], (0, 1, 2, 3)),
               Choice(kinds["column_wise in 2"], (0, 3)))  # fmt: skip
    found = load(prices, choices)
    assert found.shardings == ("table_wise", "row_wise", "column_wise")
    k = prices.kinds
    expected = k[kinds["table_wise"]].seconds[:, 0, 0] + k[kinds["row_wise"]].seconds[:, 1, 0]
    expected = expected + k[kinds["column_wise in 2"]].seconds[:, 2, 0]
    assert np.allclose(found.seconds[:, 0], expected)
    assert np.allclose(found.seconds[:, 1], k[kinds["row_wise"]].seconds[:, 1, 1])
    latency = 10e-6 + 3 * 1e-6
    assert prices.group["table_wise"][0] == pytest.approx(1e-4 + 4 * latency)
    fixed = 1e8 / ROUND.matrix_fp32 + (1e5 + 1e5) / 1e9 + 10 * ROUND.op_seconds
    assert prices.fixed["dense"] == pytest.approx(fixed)
    assert found.main[0] == pytest.approx(prices.base_seconds + 3 * (1e-4 + 4 * latency) + expected.sum())
    assert found.step_seconds == found.main.max() and (found.hidden == 0).all()


def test_where_ids_travel_beside_the_device_the_longer_path_counts():
    work = Work(tables=(TableLoad(name="t", rows=10**6, dim=4, ids=500.0),), batch_size=1 << 16)
    hidden, plain = price(work, parse("h100-80gb:8x8")), price(replace(work, overlapped=False), parse("h100-80gb:8x8"))
    k = next(i for i, kind in enumerate(hidden.kinds) if kind.kind.label == "table_wise")
    one, other = load(hidden, [Choice(k, (0,))]), load(plain, [Choice(k, (0,))])
    assert one.step_seconds == max(one.main.max(), one.hidden.max()) < other.step_seconds
    assert one.hidden[0] > one.main[0]


def test_frequent_rows_stand_in_the_first_part_of_a_vocabulary():
    ordered = Skew.of(rows=1000, top_share={"1": 0.2, "10": 0.5, "100": 0.8}, distinct=500, ordered=True)
    shares, distinct = ordered.parts(4, 10_000)
    assert shares[0] > 0.85 and shares.sum() == pytest.approx(1.0) and shares[2] == shares[3] == 0
    assert distinct.sum() == pytest.approx(ordered.distinct(10_000)) and distinct[0] <= 250
    assert ordered.covered(10) == pytest.approx(0.5) and ordered.covered(1) == pytest.approx(0.2)
    even, _ = Skew.of(rows=10).parts(4, 100)
    assert even.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.1])


def test_distinct_rows_of_a_zipf_law_are_near_a_draw():
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 20_001)
    shares /= shares.sum()
    top = {str(n): float(shares[:n].sum()) for n in (1, 10, 100, 1000)}
    skew = Skew.of(rows=20_000, top_share=top, distinct=20_000)
    drawn = len(np.unique(rng.choice(20_000, 50_000, p=shares)))
    assert skew.distinct(50_000) == pytest.approx(drawn, rel=0.05)
    assert Skew.of(rows=7).distinct(1e9) == pytest.approx(7)


FEATURES = ("a", "b", "c")
OPTIMS = {"rowwise_adagrad": rowwise_adagrad, "adagrad": adagrad, "sgd": sgd}


def real_bytes(sharding: str, optimizer: str, local: int) -> tuple[int, int]:
    """(weights, optimizer state) of the tables that this rank really holds."""
    tables = [Table(name=f"t{f}", rows=97 + 40 * i, dim=16 * (1 + i % 2), features=(f,), sharding=sharding)
              for i, f in enumerate(FEATURES)]  # fmt: skip
    optim = Optim(sparse=OPTIMS[optimizer].Config(lr=0.1), dense=sgd.Config(lr=0.1))
    model = dlrm.Config(bottom=(8, 4), top=(8, 1), interaction="cat")
    pipeline = build_sharded(tables, FEATURES, model, optim, dense=3, local_world_size=local, kernel="auto")
    weights = state = 0
    for name, value in embeddings_of(pipeline.dmp.module).ebc.state_dict().items():
        parts = [s.tensor for s in value.local_shards()] if hasattr(value, "local_shards") else [value]
        weights += sum(p.numel() * p.element_size() for p in parts)
        assert "weight" in name
    held = set()
    for name, states in pipeline.optimizer.state_dict()["state"].items():
        if "embedding_bags" not in name:
            continue
        for key, value in states.items():
            if key.endswith(("step", "momentum")) or not hasattr(value, "numel"):
                continue
            parts = [s.tensor for s in value.local_shards()] if hasattr(value, "local_shards") else [value]
            for part in parts:
                if part.numel() > 1 and part.data_ptr() not in held:
                    held.add(part.data_ptr())
                    state += part.numel() * part.element_size()
    return weights, state


def all_real_bytes(optimizer: str, local: int) -> dict:
    return {sharding: real_bytes(sharding, optimizer, local) for sharding in SHARDING_TYPES}


@pytest.mark.parametrize(
    ("world", "local", "optimizer"),
    [(1, 1, "rowwise_adagrad"), (2, 2, "adagrad"), (4, 2, "rowwise_adagrad"), (2, 2, "sgd")],
)
def test_bytes_of_tables_and_state_are_those_of_the_sharded_model(world, local, optimizer):
    """Within 5%, on every rank, for every sharding type."""
    from sharding.embeddings import build_embeddings
    from sharding.plan import rules_of, work_of
    from sharding.planner import solve

    ranks = run_ranks(all_real_bytes, world, optimizer, local, local_world_size=local)
    module, config = OPTIMS[optimizer], OPTIMS[optimizer].Config(lr=0.1)
    cluster = topology.detect(world_size=world, local_world_size=local, device="cpu")
    for sharding in SHARDING_TYPES:
        tables = [Table(name=f"t{f}", rows=97 + 40 * i, dim=16 * (1 + i % 2), features=(f,), sharding=sharding)
                  for i, f in enumerate(FEATURES)]  # fmt: skip
        embeddings = build_embeddings(tables=tables, features=FEATURES)
        work = work_of(
            embeddings, batch_size=8 * world, state_bytes_per_row=lambda d: module.state_bytes_per_row(config, d)
        )
        found = solve(work, cluster, rules=rules_of(embeddings, cluster)).load
        for rank, real in enumerate(ranks):
            assert found.device[0, rank] == pytest.approx(real[sharding][0], rel=0.05, abs=1), (sharding, rank)
            assert found.device[1, rank] == pytest.approx(real[sharding][1], rel=0.05, abs=1), (sharding, rank)
    assert not dist.is_initialized()
