"""`tablemesh ckpt`: list, verify, compare, look into, export, rewrite."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kernels.errors import UserError
from launch import ckpt, cli
from tests.ranks import run_ranks
from tests.trainer import runs
from trainer.checkpoint import tools
from trainer.checkpoint.manifest import Damaged


def stop_at(run_dir, step):
    return runs.run(run_dir, stop_after=step)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """step_4 full, step_8 and step_10 deltas to it."""
    data = runs.write_data(tmp_path_factory.mktemp("data"))
    run_dir = runs.write_config(
        data, tmp_path_factory.mktemp("runs") / "t", checkpoint={"every_steps": 4, "deltas": 9, "keep": 9}
    )
    run_ranks(stop_at, 2, run_dir, 9)
    return run_dir


def command(*words):
    done = CliRunner().invoke(cli.app, ["ckpt", *map(str, words)])
    return done.exit_code, done.stdout


def test_ls(run_dir):
    found = tools.ls(str(run_dir))["checkpoints"]
    assert [(row["name"], row["kind"], row["parent"]) for row in found] == [
        ("step_4", "full", None),
        ("step_8", "delta", "step_4"),
        ("step_10", "delta", "step_8"),
    ]
    code, text = command("ls", run_dir)
    assert code == 0 and "delta to step_4" in text and "3 in " in text


def test_verify_names_file_and_table(run_dir, tmp_path):
    assert tools.verify(str(run_dir))["ok"]
    shutil.copytree(run_dir, tmp_path / "run")
    path = max((tmp_path / "run/checkpoints/step_4").glob("*.bin"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4  # tables come last
    path.write_bytes(data)
    code, text = command("verify", tmp_path / "run", "--json")
    found = json.loads(text)
    assert code == 1 and not found["ok"]
    assert [(d["checkpoint"], d["file"]) for d in found["damaged"]] == [("step_4", path.name)]
    assert found["damaged"][0]["table"] in runs.FEATURES
    code, text = command("verify", tmp_path / "run/checkpoints/step_8")
    assert code == 1 and "step_4" in text and f"table '{found['damaged'][0]['table']}'" in text.replace("\n", " ")
    assert command("verify", run_dir)[0] == 0


def test_diff(run_dir, tmp_path):
    newest = run_dir / "checkpoints/step_10"
    code, text = command("diff", run_dir, newest)
    assert code == 0 and "tensors are equal" in text
    found = tools.diff(str(run_dir / "checkpoints/step_4"), str(newest))
    by_name = {row["tensor"]: row for row in found["tensors"]}
    a, b = runs.tensors(run_dir, "step_4"), runs.tensors(run_dir, "step_10")
    for name, row in by_name.items():
        gap = (a[name].double() - b[name].double()).abs()
        assert row["largest"] == pytest.approx(gap.max().item())
        rows = (gap.reshape(max(1, gap.shape[0] if gap.dim() else 1), -1) > 0).any(dim=1).nonzero().flatten().tolist()
        assert row["first_row"] == (rows[0] if rows else None) and row["rows_that_differ"] == len(rows), name
    assert not found["same"] and command("diff", run_dir, run_dir / "checkpoints/step_4")[0] == 1


def test_inspect(run_dir):
    tensors = runs.tensors(run_dir)
    found = {t["table"]: t for t in tools.inspect(str(run_dir))["tables"]}
    assert set(found) == set(runs.FEATURES)
    for table, figures in found.items():
        weights, state = tensors[f"tables/{table}/weight"], tensors[f"tables/{table}/sum:0-8"]
        assert figures["rows"] == runs.FEATURES[table]
        assert figures["norm"]["mean"] == pytest.approx(weights.norm(dim=1).mean().item(), rel=1e-5)
        assert figures["never_updated"] == int((state == 0).sum())
    (row,) = tools.inspect(str(run_dir), table="a", rows=(3,))["rows"]
    assert row["weight"] == tensors["tables/a/weight"][3].tolist()
    code, text = command("inspect", run_dir, "--table", "a", "--rows", "0,3-4")
    assert code == 0 and "row 4  weight:" in text
    for words, message in (({"table": "z"}, "no table 'z'"), ({"table": "a", "rows": (99,)}, "has the rows 0 to 39")):
        with pytest.raises(UserError, match=message):
            tools.inspect(str(run_dir), **words)


def test_export(run_dir, tmp_path):
    code, text = command("export", run_dir, tmp_path / "out", "--json")
    assert code == 0 and len(json.loads(text)["files"]) == 5
    tensors = runs.tensors(run_dir)
    table = pq.read_table(tmp_path / "out/b.parquet")
    assert table["row"].to_pylist() == list(range(64))
    values = torch.tensor([table[f"v{c}"].to_pylist() for c in range(8)]).T
    assert torch.equal(values, tensors["tables/b/weight"])
    dense = load_file(tmp_path / "out/dense.safetensors")
    assert {f"dense/{name}" for name in dense} == {name for name in tensors if name.startswith("dense/")}
    assert all(torch.equal(dense[name], tensors[f"dense/{name}"]) for name in dense)
    with pytest.raises(UserError, match="something already"):
        tools.export(str(run_dir), tmp_path / "out")
    with pytest.raises(UserError, match="/proc/x/y: cannot be written"):
        tools.export(str(run_dir), Path("/proc/x/y"))
    with pytest.raises(UserError, match="/proc/x/step_3: cannot be written"):
        tools.reshard(str(run_dir), "/proc/x/step_3", parts=1)


def test_a_damaged_one_exports_nothing(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    path = max((copy / "checkpoints/step_4").glob("*.bin"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged):
        tools.export(str(copy), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_to_print():
    assert ckpt._rows("0, 5,10-12") == (0, 5, 10, 11, 12) and ckpt._rows("-7,-2--1,-1-1") == (-7, -2, -1, -1, 0, 1)
    for text in ("a", "5-2", "1-", "", "0-99999999999"):
        with pytest.raises(UserError, match=f"--rows '{text}'"):
            ckpt._rows(text)


def test_reshard_merges_and_cuts(run_dir, tmp_path):
    out = tmp_path / "elsewhere/step_10"
    code, _ = command("reshard", run_dir, out, "--parts", 3)
    assert code == 0 and tools.verify(str(out))["ok"] and tools.diff(str(run_dir), str(out))["same"]
    assert {p.name.split(".")[0] for p in out.glob("rank_*")} == {"rank_0", "rank_1", "rank_2"}
    with pytest.raises(UserError, match="is there already"):
        tools.reshard(str(run_dir), str(out), parts=2)


def test_what_is_no_checkpoint(run_dir, tmp_path):
    with pytest.raises(UserError, match="neither a run, nor a checkpoint"):
        tools.ls(str(tmp_path))
    for look in (tools.inspect, tools.verify):
        with pytest.raises(UserError, match="no such checkpoint"):
            look(str(tmp_path / "step_3"))
    shutil.copy(run_dir / "config.toml", tmp_path)
    with pytest.raises(UserError, match="no such checkpoint; there are none in"):
        tools.verify(str(tmp_path))
