"""How often every row was updated: exact for every table kind, kernel, plan and number of ranks, kept and shown."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kernels.errors import UserError
from launch import cli
from launch.chaos_compare import compare
from sharding import update_counts
from sharding.table_state import tables_of
from tests.ranks import run_ranks
from tests.trainer import runs
from tests.trainer.test_checkpoint_bits import MIXES
from trainer.checkpoint import counts, tools
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.place import Place

COUNTED = {"count_updates": True, "every_steps": 4, "deltas": 2, "keep": 9}
KINDS = [{"match": name, "kind": kind, "options": options} for name, (kind, options) in MIXES[0].items()]

BY_ID = {"match": "c", "kind": "collisionless", "options": {"rows": 256, "admit_after": 2}, "sharding": "row_wise"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def count_by_hand(run_dir):
    """Train with all tables in one rank's hands; the counts, by torch's unique, of what each kernel was called with."""
    found, attach = {}, update_counts._counter

    def attach_both(kernel):
        def after(kernel, inputs, output):
            if not torch.is_grad_enabled():
                return
            ids, ends, parts = inputs[0].values(), inputs[0].offset_per_key(), tables_of(kernel)
            seen = {}
            for t, first, end in zip(kernel.emb_module.feature_table_map, ends, ends[1:], strict=False):
                seen.setdefault(parts[t][0], []).append(ids[first:end].long())
            for name, rows in seen.items():
                rows_N = found.setdefault(name, torch.zeros(200, dtype=torch.int64))
                rows_N[torch.cat(rows).unique()] += 1

        kernel.register_forward_hook(after)
        return attach(kernel)

    update_counts._counter = attach_both
    try:
        runs.run(run_dir)
    finally:
        update_counts._counter = attach
    return found


def table_counts(run_dir, name=None):
    return {n: t for n, t in runs.tensors(run_dir, name).items() if n.endswith("/updates")}


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The run of one rank and the counts that were made by hand beside it."""
    folder = tmp_path_factory.mktemp("one")
    whole = {"override": []}
    run_dir = runs.write_config(data, folder / "t", checkpoint=COUNTED, tables=whole)
    (found,) = run_ranks(count_by_hand, 1, run_dir)
    return run_dir, found


def test_they_are_what_a_count_by_hand_gives(one):
    run_dir, by_hand = one
    found = table_counts(run_dir)
    assert set(found) == {f"tables/{t}/updates" for t in runs.FEATURES}
    for table, rows in runs.FEATURES.items():
        assert torch.equal(found[f"tables/{table}/updates"].long(), by_hand[table][:rows]), table
        assert found[f"tables/{table}/updates"].max() > 10


WAYS = {  # number of ranks -> how the tables lie
    2: (
        {},  # row_wise, data_parallel, the planner's choice
        {"tables": {"override": [], "sharding": "column_wise"}},
        {"tables": {"override": [], "sharding": "data_parallel"}, "kernels": {"embedding_bag": "fbgemm"}},
    ),
    4: ({"tables": {"override": [], "sharding": "row_wise"}, "kernels": {"embedding_bag": "fbgemm"}},),
}


def run_all(*run_dirs):
    """One after the other in the ranks that are up: starting ranks takes longer than these runs."""
    return [runs.run(run_dir) for run_dir in run_dirs]


@pytest.mark.parametrize("world_size", WAYS)
def test_they_are_the_same_for_every_plan_kernel_and_number_of_ranks(one, data, tmp_path, world_size):
    ways = WAYS[world_size]
    folders = [runs.write_config(data, tmp_path / str(n), checkpoint=COUNTED, **way) for n, way in enumerate(ways)]
    for way, run_dir, report in zip(ways, folders, run_ranks(run_all, world_size, *folders)[0], strict=True):
        (tables,) = [row for row in report["foretold"] if row["name"].startswith("tables")]
        if "column_wise" not in str(way):  # of whose parts only the first has counts
            assert tables["predicted"] == tables["measured"] and tables["unit"] == "bytes"
        expected, place = one[0], Place(run_dir / "checkpoints")
        for name in ("step_8", "step_28"):  # a delta, and a full one
            assert open_chain(place, name).manifest.kind == ("delta" if name == "step_8" else "full")
            ours, theirs = table_counts(run_dir, name), table_counts(expected, name)
            assert ours.keys() == theirs.keys()
            assert not [t for t in ours if not torch.equal(ours[t], theirs[t])], (way, name)


def go_on(run_dir, *changes):
    if not torch.distributed.get_rank():
        path = run_dir / "config.toml"
        for old, new in changes:
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new))
    torch.distributed.barrier()
    return runs.run(run_dir, resume="auto")["status"]


def go_on_all(*pairs):
    return [go_on(run_dir, *changes) for run_dir, *changes in pairs]


def run_and_stop(whole, cut, step):
    """Run these through, and the others up to a step."""
    return run_all(*whole), [runs.run(run_dir, stop_after=step) for run_dir in cut]


def test_every_kind_goes_on_counting_on_other_ranks(data, tmp_path):
    """One rank counts 7 steps, two go on with the other kernel: as one rank that did all of it."""
    mix = [*KINDS[:2], {"match": "c", "sharding": "data_parallel"}, KINDS[3]]
    kernels = {"auto": "fbgemm", "fbgemm": "auto"}
    whole, cut = (
        {
            kernel: runs.write_config(
                data,
                tmp_path / f"{name}-{kernel}",
                checkpoint=COUNTED,
                tables={"override": mix},
                kernels={"embedding_bag": kernel},
                train={"batch_size": 64, "max_steps": 16, "log_every": 4},
            )
            for kernel in kernels
        }
        for name in ("whole", "cut")
    )
    run_ranks(run_and_stop, 1, list(whole.values()), list(cut.values()), 7)
    changes = [(cut[k], (f'embedding_bag = "{k}"', f'embedding_bag = "{other}"')) for k, other in kernels.items()]
    assert run_ranks(go_on_all, 2, *changes) == [["finished"] * 2] * 2
    for kernel in kernels:
        expected, found = table_counts(whole[kernel]), table_counts(cut[kernel])
        assert expected.keys() == found.keys() and len(found) >= 4
        assert not [t for t in found if not torch.equal(expected[t], found[t])]
        assert min(int(t.max()) for t in found.values()) > 10
    parts = [t["table"] for t in tools.inspect(str(cut["auto"]), table="d")["tables"]]
    assert parts == ["d#0", "d#1"]
    assert tools.inspect(str(cut["auto"]), table="b", rows=(12,))["tables"][0]["table"] == "b#hashed"
    with pytest.raises(UserError, match="'d' is stored as d#0, d#1; name one of them"):
        tools.inspect(str(cut["auto"]), table="d", rows=(3,))


def by_id(run_dir):
    """{id: updates} of table c, over all parts; None is the default row."""
    chain = tools.open_at(str(run_dir))
    found = {}
    for base in tools.by_id.stored(chain, "c"):
        live_K = tools.by_id.live_rows(chain, base)
        ids, updates = chain.read(f"{base}/id"), chain.read(f"{base}/updates")
        found |= {int(ids[row]): int(updates[row]) for row in live_K}
        found[None] = int(updates[0])
    return found


def run_and_go_on(whole, cut):
    runs.run(whole)
    return go_on(cut)


def test_rows_given_to_ids_count_from_when_an_id_gets_them(data, tmp_path):
    sections = {
        "tables": {"override": [BY_ID]},
        "checkpoint": COUNTED,
        "kernels": {"embedding_bag": "auto"},
    }
    one, two, three = (runs.write_config(data, tmp_path / name, **sections) for name in ("one", "two", "three"))
    run_ranks(run_and_stop, 2, [three], [two], 7)
    assert run_ranks(run_and_go_on, 1, one, two) == ["finished"]
    expected = by_id(one)
    assert by_id(two) == expected and by_id(three) == expected
    assert max(expected.values()) > 10 and len(expected) > 20
    figures = {t["table"]: t["updates"] for t in tools.inspect(str(two))["tables"]}
    (of_c,) = [figures for table, figures in figures.items() if table.startswith("c")]
    best = max((n, -id) for id, n in expected.items() if id is not None)
    assert (of_c["most"], of_c["most_updated"][0]["updates"]) == (best[0], best[0])
    (row,) = tools.inspect(str(two), table="c", rows=(-best[1],))["rows"]
    assert row["updates"] == best[0]
    # What `chaos --world` compares: the tensors of two ranks have other names and rows, the ids are the same.
    apart = compare(tools.open_at(str(one)), tools.open_at(str(three)), tolerance=1e-3)
    assert apart.difference is None and not apart.identical and 0 < apart.largest < 1e-3
    assert compare(tools.open_at(str(one)), tools.open_at(str(one)), tolerance=1e-3).identical
    said = compare(tools.open_at(str(one)), tools.open_at(str(three)), tolerance=0).difference
    assert said == "only one of the final checkpoints has the tensor ranks/1/metrics/window"


def test_inspect_shows_them(one):
    run_dir, by_hand = one
    (figures,) = tools.inspect(str(run_dir), table="d")["tables"]
    updates, counts_E = figures["updates"], by_hand["d"][:120].sort().values
    assert updates["since"] == 0 and updates["total"] == int(counts_E.sum())
    assert [updates[f"p{q}"] for q in counts.QUANTILES] == [int(counts_E[-(-q * 120 // 100) - 1]) for q in (50, 90, 99)]
    for bin in updates["histogram"]:
        assert bin["rows"] == int(((counts_E >= bin["from"]) & (counts_E <= bin["to"])).sum())
    assert sum(bin["rows"] for bin in updates["histogram"]) == 120
    order = sorted(range(120), key=lambda row: (-int(by_hand["d"][row]), row))[: counts.TOP]
    assert updates["most_updated"] == [{"row": row, "updates": int(by_hand["d"][row])} for row in order]
    done = CliRunner().invoke(cli.app, ["ckpt", "inspect", str(run_dir), "--table", "d", "--rows", "3"])
    assert done.exit_code == 0 and f"updates: {int(by_hand['d'][3])}" in done.stdout
    assert f"most updated, row (updates): {order[0]} ({int(by_hand['d'][order[0]])})" in done.stdout


def test_a_run_that_begins_to_count_says_since_when(one, data, tmp_path):
    run_dir = runs.write_config(data, tmp_path / "run", checkpoint={"every_steps": 10})
    run_ranks(run_and_stop, 2, [], [run_dir], 7)
    off = CliRunner().invoke(cli.app, ["ckpt", "inspect", str(run_dir)])
    assert "was not counted: set checkpoint.count_updates = true" in off.stdout.replace("\n", " ")
    assert tools.inspect(str(run_dir))["tables"][0]["updates"] is None
    stopped = int(tools.open_at(str(run_dir)).manifest.position.step)
    assert run_ranks(go_on, 1, run_dir, ("count_updates = false", "count_updates = true")) == ["finished"]
    updates = tools.inspect(str(run_dir), table="a")["tables"][0]["updates"]
    since = [int(table_counts(one[0], name)["tables/a/updates"].sum()) for name in (f"step_{stopped}", "step_28")]
    assert updates["since"] == stopped and updates["total"] == since[1] - since[0] > 0
    texts = [json.loads(line).get("text", "") for line in runs.run_as_text(run_dir).splitlines()]
    assert f"updates of rows are counted from step {stopped} on" in texts
    shown = CliRunner().invoke(cli.app, ["ckpt", "inspect", str(run_dir), "--table", "a"])
    assert f"updates counted since step {stopped}" in shown.stdout.replace("\n", " ")
