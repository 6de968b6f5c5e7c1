"""Plans, nearly all without a process group: where explicit shardings go, what plan.json says, what is refused."""

import json

import pytest
import torch
from torch import nn

from kernels.errors import UserError
from sharding import topology
from sharding.cost import RUNTIME_BYTES
from sharding.embeddings import build_embeddings
from sharding.plan import embeddings_of, has_fused_tables, plan_task, work_of
from sharding.planner import Infeasible, Limits
from sharding.tables.base import SHARDING_TYPES, Table
from tests.ranks import run_ranks


class Task(nn.Module):
    def __init__(self, *tables: Table) -> None:
        super().__init__()
        self.embeddings = build_embeddings(tables=tables, features=[f for t in tables for f in t.features])


def plan_of(*tables: Table, world: int, local: int | None = None) -> dict:
    task = Task(*tables)
    cluster = topology.detect(world_size=world, local_world_size=local or world, device="cpu")
    work = work_of(embeddings_of(task), batch_size=64 * world, state_bytes_per_row=lambda dim: 4)
    planned = plan_task(task, work, cluster)
    described = planned.described
    assert has_fused_tables(planned.sharding) == any(t["sharding"] != "data_parallel" for t in described["tables"])
    return described


def table(sharding: str, *, rows: int = 10, dim: int = 16, name: str = "t") -> Table:
    return Table(name=name, rows=rows, dim=dim, features=(f"{name}1", f"{name}2"), sharding=sharding)


def extents(described: dict) -> list[tuple[int, list[int], list[int]]]:
    return [(s["rank"], s["rows"], s["cols"]) for s in described["tables"][0]["shards"]]


@pytest.mark.parametrize(
    ("sharding", "parts"),
    [
        ("data_parallel", [([0, 10], [0, 16])] * 4),
        ("table_wise", [([0, 10], [0, 16])]),
        ("row_wise", [([0, 3], [0, 16]), ([3, 6], [0, 16]), ([6, 9], [0, 16]), ([9, 10], [0, 16])]),
        ("column_wise", [([0, 10], [c, c + 4]) for c in (0, 4, 8, 12)]),
        ("table_row_wise", [([0, 5], [0, 16]), ([5, 10], [0, 16])]),
        ("table_column_wise", [([0, 10], [0, 8]), ([0, 10], [8, 16])]),
        ("grid_shard", [(r, c) for c in ([0, 8], [8, 16]) for r in ([0, 5], [5, 10])]),
    ],
)
def test_explicit_shardings_on_two_hosts_of_two_ranks(sharding, parts):
    described = plan_of(table(sharding), world=4, local=2)
    assert [(rows, cols) for _, rows, cols in extents(described)] == parts
    assert described["tables"][0]["sharding"] == sharding
    ranks = [rank for rank, _, _ in extents(described)]
    if sharding in ("data_parallel", "row_wise", "column_wise", "grid_shard"):
        assert sorted(ranks) == [0, 1, 2, 3]
    if sharding in ("table_row_wise", "table_column_wise"):
        assert len({rank // 2 for rank in ranks}) == 1 and len(set(ranks)) == 2


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("sharding", [*SHARDING_TYPES, "auto"])
def test_the_parts_cover_the_table_once_and_the_bytes_add_up(sharding, world):
    tables = [table(sharding, rows=1000 + i, dim=8 * (i + 1), name=f"t{i}") for i in range(3)]
    described = plan_of(*tables, world=world)
    assert described["world_size"] == world and [r["rank"] for r in described["ranks"]] == list(range(world))
    assert all(r["device"].startswith("cpu") for r in described["ranks"])
    for t, entry in zip(tables, described["tables"], strict=True):
        copies = world if entry["sharding"] == "data_parallel" else 1
        assert sharding in ("auto", entry["sharding"])
        cells = torch.zeros(t.rows, t.dim, dtype=torch.int64)
        for shard in entry["shards"]:
            (r0, r1), (c0, c1) = shard["rows"], shard["cols"]
            cells[r0:r1, c0:c1] += 1
            assert shard["bytes"] == 4 * (r1 - r0) * (c1 - c0)
        assert (cells == copies).all()
        assert (entry["name"], entry["rows"], entry["dim"]) == (t.name, t.rows, t.dim)
        assert entry["features"] == list(t.features) and entry["kind"] == "standard"
        assert entry["bytes"] == 4 * t.rows * t.dim * copies
        column_parts = len({tuple(s["cols"]) for s in entry["shards"]})
        assert entry["optimizer_bytes"] == 4 * t.rows * copies * column_parts
    for key, total in (("table_bytes", "bytes"), ("optimizer_bytes", "optimizer_bytes")):
        assert sum(r[key] for r in described["ranks"]) == sum(t[total] for t in described["tables"])


def test_whole_tables_are_spread_over_the_ranks():
    described = plan_of(*(table("table_wise", rows=5000, name=f"t{i}") for i in range(8)), world=4)
    assert [r["table_bytes"] for r in described["ranks"]] == [2 * 5000 * 16 * 4] * 4


def test_a_dim_that_is_no_multiple_of_four_is_stored_wider():
    (entry,) = plan_of(table("column_wise", dim=6), world=2)["tables"]
    assert entry["dim"] == 6 and [s["cols"] for s in entry["shards"]] == [[0, 4], [4, 8]]


def test_columns_that_do_not_divide_by_the_ranks_take_fewer_parts():
    assert [cols for _, _, cols in extents(plan_of(table("column_wise", dim=12), world=4))] == [[0, 4], [4, 8], [8, 12]]


@pytest.mark.parametrize(
    ("tables", "world", "local", "words"),
    [
        ([table("column_wise", dim=4)], 2, 2, ["'t'", "column_wise", "2 ranks", "dim 4", "multiple of 4"]),
        ([table("table_column_wise", dim=3)], 4, 2, ["'t'", "dim 3", "table_wise"]),
        ([table("grid_shard", dim=4)], 4, 2, ["'t'", "grid_shard", "dim 4"]),
        (
            [table("row_wise", rows=9), table("row_wise", rows=3, name="u"), table("row_wise", name="v")],
            4,
            4,
            ["2 tables", '"t", "u"', "9, 3 rows", "4 parts", "[[tables.override]]"],
        ),
        ([table("table_row_wise", rows=1)], 4, 2, ['"t"', "2 parts"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tables, world, local, words):
    with pytest.raises(UserError) as error:
        plan_of(*tables, world=world, local=local)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_tables_too_large_for_the_memory_are_refused_with_sizes(monkeypatch):
    monkeypatch.setattr(topology, "host_memory_bytes", lambda: int(1.42 * 2**30))
    with pytest.raises(UserError) as error:
        plan_of(table("table_wise", rows=20_000_000, name="huge"), table("table_wise"), world=2)
    message = str(error.value)
    assert all(w in message for w in ("1.19 GiB", "'huge'", "2 ranks", "table_wise", "short by 1.1", " bytes)")), (
        message
    )


def test_auto_does_not_cut_a_table_into_more_parts_than_it_has_rows():
    for rows in range(1, 10):
        described = plan_of(table("auto", rows=rows), world=4)
        assert all(r1 > r0 for _, (r0, r1), _ in extents(described))


def from_json(described: dict, path, *tables: Table, world: int, local: int):
    path.write_text(json.dumps(described))
    task = Task(*tables)
    cluster = topology.detect(world_size=world, local_world_size=local, device="cpu")
    work = work_of(embeddings_of(task), batch_size=64 * world, state_bytes_per_row=lambda dim: 4)
    return plan_task(task, work, cluster, file=path).described


@pytest.mark.parametrize("sharding", [*SHARDING_TYPES, "auto"])
def test_a_plan_comes_back_from_its_file(sharding, tmp_path):
    tables = [table(sharding, rows=100 + i, dim=16, name=f"t{i}") for i in range(3)]
    described = plan_of(*tables, world=4, local=2)
    again = from_json(described, tmp_path / "plan.json", *tables, world=4, local=2)
    assert again["tables"] == described["tables"] and again["ranks"] == described["ranks"]
    assert "plan.json" in again["planner"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(world_size=2), ["2 ranks", "there are 4"]),
        (lambda d: d["tables"].pop(), ["other tables", "t"]),
        (lambda d: d["tables"][0].update(rows=11), ["11 rows", "10 of 16"]),
        (lambda d: d["tables"][0]["shards"].pop(), ["do not cover"]),
        (lambda d: d["tables"][0]["shards"][0].update(rank=9), ["ranks 0 to 3"]),
        (lambda d: d["tables"][0]["shards"][0].update(rank="first"), ["broken", "'first'"]),
        (lambda d: d["tables"][0]["shards"][0].update(rows=[0, float("inf")]), ["broken", "inf is no whole number"]),
        (lambda d: d["tables"][0]["shards"][0].update(cols=[0.5, 16]), ["broken", "0.5"]),
        (lambda d: d["tables"][0].update(name=5), ["named 5", "text"]),
        (lambda d: d["tables"].append(d["tables"][0]), ["'t'", "listed 2 times"]),
        (lambda d: d["tables"][0].update(cache_share=10**400), ["broken", "plan again"]),
        (lambda d: d["tables"][0].update(cache_share="0.1"), ["broken", "'0.1' is no number"]),
        (lambda d: d["tables"][0].update(sharding="by_hand"), ["by_hand", "do not cover"]),
        (lambda d: d["tables"][0].update(sharding="table_wise"), ["do not cover"]),
        (lambda d: d["tables"][0].update(tier="tape"), ["'tape'", "device, cache, host"]),
        (lambda d: d.pop("tables"), ["not a plan.json"]),
    ],
)
def test_a_plan_file_that_does_not_fit_is_refused(change, words, tmp_path):
    described = plan_of(table("row_wise"), world=4)
    change(described)
    with pytest.raises(UserError) as error:
        from_json(described, tmp_path / "plan.json", table("row_wise"), world=4, local=4)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("cluster", "change", "words"),
    [
        ("h100-80gb:1x2", {"tier": "host"}, ["'t' has tier 'host'", "'collisionless'", "device", "tablemesh plan"]),
        ("h100-80gb:1x2", {"tier": "cache"}, ["'t' has tier 'cache'"]),
        ("cpu:1x2", {"sharding": "column_wise"}, ["'t' has sharding 'column_wise'", "row_wise, table_wise"]),
        ("cpu:1x2", {"shards": "even"}, ["'t'", "given to ids", "0 to 627", "628 to 1255"]),
        ("cpu:1x2", {"tier": "host"}, []),  # on a CPU there is one memory
    ],
)
def test_a_plan_file_cannot_have_a_table_as_its_kind_cannot_be(cluster, change, words, tmp_path):
    given = Table(name="t", rows=1000, dim=16, features=("f",), kind="collisionless", sharding="row_wise")
    described = plan_of(given, world=2)
    (entry,) = described["tables"]
    assert [s["rows"] for s in entry["shards"]] == [[0, 628], [628, 1256]]
    if change.get("shards") == "even":
        for shard, rows in zip(entry["shards"], ([0, 600], [600, 1256]), strict=True):
            shard["rows"] = rows
    else:
        entry.update(change)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(described))
    task = Task(given)
    work = work_of(embeddings_of(task), batch_size=128)
    if not words:
        assert plan_task(task, work, topology.parse(cluster), file=path).described["tables"][0]["tier"] == "device"
        return
    with pytest.raises(UserError) as error:
        plan_task(task, work, topology.parse(cluster), file=path)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_id_maps_and_filters_are_priced_and_limited(sharding):
    """1,000 rows: 314 lines of 64 bytes; a window of 65,536 in 256 parts of 32 lines, two halves each; 16 bytes an
    occurrence."""
    options = {"rows": 1000, "admit_after": 10}
    given = Table(
        name="t", rows=5000, dim=16, features=("f",), kind="collisionless", options=options, sharding=sharding
    )
    found = plan_of(given, table("table_wise", name="u"), world=2)
    assert [t["id_map_bytes"] for t in found["tables"]] == [64 * 314, 0]
    assert [t["filter_bytes"] for t in found["tables"]] == [16 * 65_536, 0]
    keys = ("table_bytes", "optimizer_bytes", "id_map_bytes", "filter_bytes")
    for rank, priced in zip(found["ranks"], found["predicted"]["table_and_state_bytes"], strict=True):
        assert priced == pytest.approx(sum(rank[key] for key in keys), rel=0.01)
    (logical, _) = found["logical"]
    assert logical["rows"] == 5000 and logical["physical_rows"] == 1256 and logical["standard_bytes"] == 5000 * 64
    assert logical["filter_bytes"] == 16 * 65_536 and logical["options"] == options
    task = Task(given)
    cluster = topology.detect(world_size=1, local_world_size=1, device="cpu")
    work = work_of(embeddings_of(task), batch_size=64)
    room = int(RUNTIME_BYTES["cpu"]) + 500_000  # for rows and map, not for the filter
    with pytest.raises(UserError, match=r"'t'.*short by"):
        plan_task(task, work, cluster, limits=Limits(device=room))


def _refusal() -> tuple[str, str, int, str | None]:
    task = Task(table("row_wise", rows=10**9))
    cluster = topology.detect(world_size=2, local_world_size=2, device="cpu")
    with pytest.raises(Infeasible) as error:
        plan_task(task, work_of(embeddings_of(task), batch_size=64), cluster, limits=Limits(device=2**30))
    short = error.value
    return str(short), short.who, short.short_by, short.table


def test_every_rank_says_which_table_is_too_large_though_only_rank_0_plans():
    (said, *facts), others = run_ranks(_refusal, 2)
    assert "'t'" in said and "short by" in said and said.endswith("`tablemesh plan` lists the ways out")
    assert others == (said, *facts) and facts[2] == "t"
