"""`tablemesh plan --what-if`: several clusters beside each other, as a user meets them."""

import json

import pytest

from kernels.errors import UserError
from launch.what_if import clusters
from tests.launch.test_plan import PLAN, small  # noqa: F401  (a fixture)


def titles(text: str) -> list[str]:
    return [cluster.title for cluster in clusters(text, {})]


def test_lists_and_ranges_of_clusters():
    assert titles("h100-80gb:1..8x4") == [f"h100-80gb:{n}x4" for n in (1, 2, 4, 8)]
    assert titles("h100-80gb:3..13, cpu:1x2,cpu:1x2") == ["h100-80gb:3x8", "h100-80gb:6x8", "h100-80gb:12x8", "cpu:1x2"]
    assert titles("h200") == ["h200:1x8"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h100-80gb:4..2x8", "4..2 hosts is not a range"),
        ("h100-80gb:1024x8", "8,192 ranks; at most 4,096"),
        ("h100:1x8", "no profile 'h100'"),
        ("h100-80gb:1x8,", "no profile ''"),
    ],
)
def test_lists_that_are_none(text, said):
    with pytest.raises(UserError, match=said):
        clusters(text, {})


def test_the_same_batch_on_more_ranks(command, small):  # noqa: F811
    sizes = "h100-80gb:1..4x8"
    code, out, err = command(*PLAN, "--what-if", sizes, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["mode"] == "strong" and [c["ranks"] for c in found["clusters"]] == [8, 16, 32]
    assert {c["batch_size"] for c in found["clusters"]} == {4096}
    first = found["clusters"][0]
    assert first["efficiency"] == 1 and first["step_ms"] == max(first["paths_ms"].values())
    assert first["bound_by"] == "host" and found["stops"] == {
        "h100-80gb": "h100-80gb:1x8"
    }  # no step is shorter than its launches
    code, out, err = command(*PLAN, "--what-if", sizes)
    assert code == 0 and "launching (host)" in out and "scaling stops at h100-80gb:1x8" in " ".join(out.split()), err


def test_more_rows_on_more_ranks_and_a_plan_says_the_same(command, small):  # noqa: F811
    code, out, err = command(*PLAN, "--what-if", "cpu:1..4x2", "--weak", "--json")
    assert code == 0, err
    found = json.loads(out)["clusters"]
    assert [c["batch_size"] for c in found if c["ranks"]] == [4096, 8192, 16384]
    first = next(c for c in found if c["feasible"])
    own = json.loads(
        command(*PLAN, "--cluster", first["cluster"], "--set", f"train.batch_size={first['batch_size']}", "--json")[1]
    )
    assert own["simulated"]["step_ms"] == pytest.approx(first["step_ms"])
    assert own["simulated"]["step_ms"] >= own["predicted"]["step_ms"]


def test_what_has_no_plan_says_why(command, small):  # noqa: F811
    code, out, err = command(*PLAN, "--what-if", "l4:1x1,l4:1x3", "--hbm", "2GiB", "--host-mem", "1GiB", "--json")
    found = json.loads(out)
    assert code == 1, err
    assert [c["feasible"] for c in found["clusters"]] == [False, False]
    assert "short by" in found["clusters"][0]["why"] and "does not divide" in found["clusters"][1]["why"]
    code, out, _ = command(*PLAN, "--what-if", "l4:1x3")
    assert code == 1 and "no plan" in out


def test_a_limit_that_the_first_of_them_does_not_have_is_its_own(command, small):  # noqa: F811
    code, out, err = command(*PLAN, "--what-if", "a100-40gb:1x8,h100-80gb:1x8", "--hbm", "60GiB", "--json")
    assert code == 0, err
    found = {c["cluster"]: c for c in json.loads(out)["clusters"]}
    assert found["h100-80gb:1x8"]["feasible"] and "39.40 GiB" in found["a100-40gb:1x8"]["why"]


def test_a_tables_own_sharding_is_asked_of_every_cluster(command, small):  # noqa: F811
    """200 rows of `country` go by rows over 8 ranks, not over 256."""
    rule = 'tables.override=[{match="country", sharding="row_wise"}]'
    code, out, err = command(*PLAN, "--set", rule, "--what-if", "h100-80gb:1x8,h100-80gb:32x8", "--json")
    assert code == 0, err
    few, many = json.loads(out)["clusters"]
    assert few["feasible"] and not many["feasible"] and "country" in many["why"]


def test_weak_needs_clusters(command, small):  # noqa: F811
    code, _, err = command(*PLAN, "--weak")
    assert code == 2 and "--what-if CLUSTERS" in err
