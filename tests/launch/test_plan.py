"""`tablemesh plan` as a user meets it, and `train --plan`."""

import json

import pytest

from trainer.data.dataset import Categorical, Dataset, Dense, File, Split, Stats

CONFIG = """
name = "small"
[data]
path = "nowhere"
[tables]
dim = 16
[model]
kind = "dlrm"
bottom = [32, 16]
top = [32, 1]
[optim]
sparse = { kind = "rowwise_adagrad", lr = 0.1 }
dense = { kind = "adam", lr = 0.01 }
[train]
batch_size = 4096
nproc = 2
"""
ROWS = {"user": 50_000_000, "item": 2_000_000, "country": 200, "tags": 100_000}


@pytest.fixture
def small(tmp_path):
    """A config whose data is elsewhere, and the dataset.json of that data."""
    features = [
        Categorical(
            name=name,
            cardinality=rows,
            ids="vocab",
            stats=Stats(
                rows=1000, ids=9000 if name == "tags" else 1000, distinct=rows // 2, top_share={"1": 0.05, "100": 0.3}
            ),
        )
        for name, rows in ROWS.items()
    ]
    split = Split(files=(File(path="x.parquet", row_groups=(1000,)),))
    dataset = Dataset(
        name="small", source="made up", labels=("click",), dense=(Dense(name="age"),), categorical=tuple(features),
        splits={"train": split}, fingerprint="0",
    )  # fmt: skip
    (tmp_path / "dataset.json").write_text(dataset.model_dump_json())
    (tmp_path / "small.toml").write_text(CONFIG)
    return tmp_path


PLAN = ("plan", "small.toml", "--dataset", "dataset.json")


def test_a_plan_for_a_cluster_that_is_not_here(command, small):
    code, out, err = command(*PLAN, "--cluster", "h100-80gb:2x8")
    assert code == 0, err
    for word in ("h100-80gb:2x8", "16 ranks", "bottleneck", "samples/s", "user", "runner-up", "all ranks send"):
        assert word in out
    code, out, _ = command(*PLAN, "--cluster", "h100-80gb:2x8", "--json")
    found = json.loads(out)
    assert code == 0 and found["feasible"] and found["gap"] <= 0.05
    assert {"fp32_efficiency", "op_seconds"} <= set(found["estimates"])
    assert found["bound"]["step_ms"] <= found["predicted"]["step_ms"]
    assert len(found["ranks"]) == 16 and {"hbm_bytes", "host_bytes", "step_ms"} <= set(found["ranks"][0])
    assert {t["name"] for t in found["tables"]} == set(ROWS)
    assert {"name", "sharding", "tier", "ranks", "bytes", "runner_up"} <= set(found["tables"][0])
    assert max(r["step_ms"] for r in found["ranks"]) == pytest.approx(found["predicted"]["step_ms"])
    assert json.loads(command(*PLAN, "--cluster", "h100-80gb:2x8", "--json")[1]) == found


def test_this_machine_and_a_file(command, small):
    code, out, err = command(*PLAN, "--json", "--out", "plan.json", "--host-mem", "64GiB")
    assert code == 0, err
    found, written = json.loads(out), json.loads((small / "plan.json").read_text())
    assert written == found["plan"] and written["world_size"] == 2 and "tablemesh" in written["planner"]
    assert all(r["hbm_bytes"] == 0 and r["host_bytes"] > 0 for r in found["ranks"])
    code, out, _ = command(*PLAN, "--compare", "auto", "plan.json", "--json", "--host-mem", "64GiB")
    sides = json.loads(out)
    assert code == 0 and sides["differ"] == [] and sides["a"]["step_ms"] == pytest.approx(sides["b"]["step_ms"])
    code, out, _ = command(*PLAN, "--compare", "auto", "row_wise", "--cluster", "h100-80gb")
    assert code == 0 and "country" in out and "row-wise" in out and "b / a" in out


def test_two_plans_beside_each_other(command, small):
    """The planner's own is never slower than all tables by rows, and another cluster has a plan of its own."""
    cluster = ("--cluster", "h100-80gb:2x4", "--json")
    code, out, err = command(*PLAN, *cluster, "--compare", "auto", "row_wise")
    found = json.loads(out)
    assert code == 0, err
    assert (
        found["a"]["step_ms"] <= found["b"]["step_ms"] == pytest.approx(sum(found["b"]["parts_ms"].values()), rel=0.3)
    )
    assert found["differ"] and all(d["b"] == "row_wise" != d["a"] for d in found["differ"])
    own = json.loads(command(*PLAN, *cluster)[1])
    assert found["a"]["step_ms"] == own["predicted"]["step_ms"]
    found = json.loads(command(*PLAN, *cluster, "--compare", "h100-80gb:2x4", "h100-80gb:1x8")[1])
    assert [found[side]["cluster"] for side in "ab"] == ["h100-80gb:2x4", "h100-80gb:1x8"]
    assert found["a"]["step_ms"] == own["predicted"]["step_ms"]


def test_what_does_not_fit_has_ways_out(command, small):
    words = (*PLAN, "--cluster", "h100-80gb:1x2", "--hbm", "1.7GiB", "--host-mem", "1GiB")
    code, out, _ = command(*words)
    assert code == 1 and "no plan fits" in out and "short by" in out and "ways out" in out
    code, out, _ = command(*words, "--json")
    found = json.loads(out)
    assert code == 1 and found["feasible"] is False and found["short_by_bytes"] > 0 and found["ways_out"]


def test_row_types_and_table_kinds_are_ways_out_that_work(command, small):
    """3.2 GiB of tables and states in 3 GiB of host memory; with the overrides of a kind the config has a plan."""
    words = (*PLAN, "--cluster", "cpu:1x2", "--host-mem", "3GiB")
    code, out, _ = command(*words, "--json")
    changes = [way["change"] for way in json.loads(out)["ways_out"]]
    kinds = {change["kind"]: change for change in changes if "kind" in change}
    assert code == 1 and {c["row_type"] for c in changes if "row_type" in c} == {"bf16", "int8"}
    assert set(kinds) == {"compositional", "mixed_dim", "unified", "hashed", "collisionless"}
    assert all(change["tables"] == ["user", "item"] and 0.3 < change["share"] < 1 for change in kinds.values())
    for kind, row_type in (("unified", None), ("collisionless", None), (None, "int8")):
        text = 'tables.row_type="int8"' if row_type else f"tables.override={toml(kinds[kind]['overrides'])}"
        code, out, err = command(*words, "--json", "--set", text)
        found = json.loads(out)
        assert code == 0 and found["feasible"], err
        assert kind in (None, *(t["kind"] for t in found["plan"]["tables"]))
    assert [t["physical"] for t in found["plan"]["logical"]] == [[name] for name in ROWS]


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def test_ways_out_on_a_gpu(command, small):
    """No rows of int8; and the rows that an id map gives are in the device's memory, whatever room the host has."""
    words = (*PLAN, "--cluster", "h100-80gb:1x2", "--hbm", "1.9GiB", "--host-mem", "2GiB", "--json")
    code, out, _ = command(*words)
    changes = [way["change"] for way in json.loads(out)["ways_out"]]
    assert code == 1 and {c["row_type"] for c in changes if "row_type" in c} <= {"bf16"}
    (given,) = (c for c in changes if c.get("kind") == "collisionless")
    code, out, err = command(*words, "--set", f"tables.override={toml(given['overrides'])}")
    tables = json.loads(out)["plan"]["tables"]
    assert code == 0 and {t["tier"] for t in tables if t["name"] in given["tables"]} == {"device"}, err


COLLISIONLESS = 'tables.override=[{match="user", kind="collisionless", options={rows=40_000_000}}]'


def test_no_way_out_leads_where_a_kind_cannot_go(command, small):
    """An id map's rows by columns, in host memory or in copies."""
    words = (*PLAN, "--cluster", "h100-80gb:1x2", "--hbm", "1.7GiB", "--host-mem", "64GiB", "--set", COLLISIONLESS)
    code, out, err = command(*words, "--json")
    changes = [way["change"] for way in json.loads(out)["ways_out"]]
    assert code == 1 and changes and not any({"column_split", "tier", "rules"} & set(c) for c in changes), changes
    words = (*PLAN, "--cluster", "h100-80gb:1x8", "--set", COLLISIONLESS, "--compare", "auto", "grid_shard")
    found = json.loads(command(*words, "--json")[1])
    assert found["b"]["left"] == ["user"]
    code, out, err = command(*words)
    assert code == 0 and "not grid_shard, as they cannot be, but where the planner put them: user" in out, err


def test_tables_are_only_where_their_kernels_can_have_them(command, small):
    words = (*PLAN, "--cluster", "h100-80gb:1x2", "--hbm", "1.7GiB", "--host-mem", "64GiB")
    cases = (("auto", "", {"cache", "device", "host"}), ("auto", "l2", {"device", "host"}), ("triton", "", {"device"}))
    for kernel, l2, can in cases:
        more = ("--set", 'optim.sparse={kind="adagrad", lr=0.1, l2=0.001}') if l2 else ()
        code, out, err = command(*words, "--json", "--set", f"kernels.embedding_bag={kernel}", *more)
        found = json.loads(out)
        if can == {"device"}:
            changes = [way["change"] for way in found["ways_out"]]
            assert code == 1 and changes[0] == {"embedding_bag": "fbgemm"} and not any("tier" in c for c in changes)
        else:
            (small / "plan.json").write_text(json.dumps(found["plan"]))
            tiers = {t["tier"] for t in found["plan"]["tables"]}
            assert code == 0 and "host" in can and {"device"} < tiers <= can, (tiers, err)
    triton = ("--set", "kernels.embedding_bag=triton")
    for given, said in (
        (("--set", 'plan.constraints=[{match="user", tier="host"}]'), "allows tier device, plan.constraints[0] host"),
        (("--compare", "plan.json", "auto"), "plan.json: table 'user' has tier"),
    ):
        code, _, err = command(*words, *triton, *given)
        assert code == 2 and said in " ".join(err.split()) and "kernels.embedding_bag = 'triton'" in err, err


def test_a_page_of_the_plan(command, small):
    rule = 'plan.constraints=[{match="*", tier="host"}]'
    code, out, err = command(*PLAN, "--cluster", "h100-80gb:2x4", "--html", "plan.html", "--set", rule)
    page = (small / "plan.html").read_text()
    assert code == 0 and "written: plan.html" in out, err
    assert page.count("<svg") == 3 and "http:" not in page and "https:" not in page and "<script" not in page
    for word in (
        *ROWS,
        "h100-80gb:1x4",
        "this plan",
        "h100-80gb:4x4",
        "samples/s",
        "runner-up",
        "fainter",
        "whatever the plan: libraries 1.5 GiB",
    ):
        assert word.lower() in page.lower(), word
    code, out, _ = command(*PLAN, "--cluster", "h100-80gb:1x2", "--hbm", "1.7GiB", "--host-mem", "1GiB", "--json",
                           "--html", "short.html")  # fmt: skip
    page = (small / "short.html").read_text()
    assert code == 1 and not json.loads(out)["feasible"]
    assert "No plan fits" in page and all(way["how"].split(":")[0] in page for way in json.loads(out)["ways_out"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cluster", "h100:1x8"], "no profile 'h100'"),
        (["--cluster", "h100-80gb:1x8", "--hbm", "60"], "without a unit"),
        (["--cluster", "h100-80gb:1x8", "--hbm=-6GiB"], "above zero"),
        (["--cluster", "h100-80gb:1x8", "--hbm", "600GiB"], "has 79.10 GiB of device memory"),
        (["--cluster", "h100-80gb:1000x8"], "8,000 ranks; at most 4,096"),
        (["--cluster", "h100-80gb:1x8", "--compare", "h100-80gb:1024x8", "auto"], "8,192 ranks; at most 4,096"),
        (["--what-if", "a100-40gb:1x8,l4:1x8", "--hbm", "60GiB"], "a100-40gb:1x8 has 39.40 GiB of device memory"),
        (["--cluster", "h100-80gb:1x8", "--compare", "auto", "small.toml"], "not a plan.json"),
        (["--dataset", "small.toml"], "not a tablemesh dataset"),
        (["--set", 'plan.constraints=[{match=[], sharding="row_wise"}]'], "match = [] names no table"),
        (["--hbm", "60GiB"], "no device memory"),
        (["--cluster", "h100-80gb:1x3"], "4096 does not divide over the 3 ranks"),
        (["--compare", "auto", "nothing"], "neither a file nor a plan"),
        (["--set", 'plan.constraints=[{match="usr", sharding="row_wise"}]'], "match = 'usr' matches no table"),
        (["--set", 'plan.constraints=[{match="user"}]'], "constrains nothing"),
        (
            [
                "--set",
                'plan.constraints=[{match="u*", sharding="row_wise"}, {match="user", sharding=["table_wise"]}]',
            ],
            "no choice meets both",
        ),
        (["--out", "no/where.json"], "does not exist"),
        (["--html", "no/where.html"], "does not exist"),
    ],
)
def test_bad_input(command, small, words, said):
    code, _, err = command(*PLAN, *words)
    assert code == 2 and said in " ".join(err.split()), err


def test_data_that_is_not_there(command, small):
    code, _, err = command("plan", "small.toml")
    assert code == 2 and "--dataset FILE" in err
    code, _, err = command("train", "small.toml", "--plan", "none.json")
    assert code == 2 and "--plan none.json: no such file" in err


def test_a_table_of_no_rows(command, small):
    text = (small / "dataset.json").read_text()
    (small / "dataset.json").write_text(text.replace(f'"cardinality":{ROWS["item"]}', '"cardinality":0'))
    code, _, err = command(*PLAN, "--cluster", "h100-80gb:1x8")
    assert code == 2 and "table 'item' has 0 rows" in err


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_longer_than_the_terminal(command, small, columns, monkeypatch):
    """With a long name, tiers, and many ranks; every table's runner-up has its price."""
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ("--set", 'tables.override=[{match="tags", table="tags_of_all_the_items_that_a_user_has_looked_at"}]')
    for words in (("--cluster", "h100-80gb:4x8"), ("--cluster", "h100-80gb:1x8", "--hbm", "3GiB")):
        code, out, err = command(*PLAN, *words, *names)
        assert code == 0 and max(map(len, out.splitlines())) <= columns, err
        assert "runner-up" in out and ("tags_of_all_the_items_that_a_user_has_looked_at" in out or columns == 80)


def test_constraints_hold(command, small):
    rule = 'plan.constraints=[{match=["user", "i*"], sharding=["row_wise"], tier="host"}]'
    code, out, err = command(*PLAN, "--cluster", "h100-80gb:1x8", "--json", "--set", rule)
    assert code == 0, err
    tables = {t["name"]: t for t in json.loads(out)["tables"]}
    for name in ("user", "item"):
        assert (tables[name]["sharding"], tables[name]["tier"]) == ("row_wise", "host")
