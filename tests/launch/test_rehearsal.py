"""`train --preflight`: what a run on many ranks would fail on, found in one process."""

import json

import pytest

from kernels.errors import UserError
from launch.rehearsal import cluster_for
from sharding.ways_out import WayOut
from tests.launch.test_plan import small  # noqa: F401  (a fixture)

TRY = ("train", "small.toml", "--dataset", "dataset.json", "--preflight")


def test_which_cluster_is_meant():
    assert cluster_for(1024, None, {}) == "h100-80gb:128x8"
    assert cluster_for(16, "a100-40gb", {}) == "a100-40gb:2x8" and cluster_for(4, None, {}) == "h100-80gb:1x4"
    assert cluster_for(None, "l4:2x4", {}) == "l4:2x4" == cluster_for(8, "l4:2x4", {})
    for wrong, said in (((12, None), "multiple"), ((9, "l4:2x4"), "has 8 ranks"), ((None, None), "needs --world-size")):
        with pytest.raises(UserError, match=said):
            cluster_for(*wrong, {})


@pytest.mark.parametrize(
    "shardings",
    [
        {"user": "grid_shard", "item": "row_wise", "country": "data_parallel", "tags": "table_column_wise"},
        {"user": "table_row_wise", "item": "column_wise", "country": "table_wise", "tags": "auto"},
    ],
)
def test_a_run_that_would_work(command, small, shardings):  # noqa: F811
    """TorchRec, as rank 5 of 8, allocates what the plan says, under every sharding type."""
    rules = ", ".join(f'{{match="{name}", sharding="{kind}"}}' for name, kind in shardings.items())
    code, out, err = command(
        *(*TRY, "--cluster", "h100-80gb:2x4", "--rank", "5", "--json", "--set", "train.batch_size=256"),
        *("--set", "data.streams=64", "--set", f"tables.override=[{rules}]"),
    )
    assert code == 0, out + err
    found = json.loads(out)
    assert found["ok"] and found["world_size"] == 8 and found["rank"] == 5
    assert [c["name"] for c in found["checks"]] == ["model", "data", "plan", "memory", "sharding"]
    assert "as planned" in found["checks"][-1]["said"]


def test_ways_out_are_told_once(command, small, monkeypatch):  # noqa: F811
    monkeypatch.setattr("launch.plan.ways_out", lambda *args, **rules: [])  # which others test
    monkeypatch.setattr("launch.plan.ways_by_kind", lambda asked: [WayOut(how="another kind", step=1.0)])
    limits = ("--set", "plan.hbm=1.7GiB", "--set", "plan.host_mem=1GiB")
    code, out, _ = command(*TRY, "--cluster", "h100-80gb:1x2", *limits, "--json")
    (said,) = (c["said"] for c in json.loads(out)["checks"] if c["name"] == "plan")
    assert code == 1 and said.count("ways out") == 1 and said.endswith(":\n  - another kind") and "short by" in said


def test_everything_that_would_fail_is_said(command, small):  # noqa: F811
    code, out, err = command(*TRY, "--world-size", "24")
    said = " ".join(out.split())
    assert code == 1, out + err
    assert "24 ranks do not divide data.streams" in said and "4096 does not divide over the 24 ranks" in said
    code, _, err = command("train", "small.toml", "--world-size", "8")
    assert code == 2 and "belongs to --preflight" in err
