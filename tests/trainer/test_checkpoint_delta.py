"""Deltas: base and deltas together are what a full checkpoint of the same step is, bit for bit."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer import runs
from trainer.checkpoint import chain
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.files import verify
from trainer.checkpoint.manifest import Damaged
from trainer.checkpoint.place import Place

STEPS = ("step_4", "step_8", "step_12", "step_16", "step_20", "step_24", "step_28")
SPLIT = {"override": [{"match": ["b", "d"], "sharding": "column_wise"}, {"match": "c", "sharding": "data_parallel"}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def kinds(run_dir):
    place = Place(run_dir / "checkpoints")
    return [manifests.read(place, name).kind for name in place.names()]


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (2, {"tables": SPLIT}),
        (2, {"kernels": {"embedding_bag": "fbgemm"}}),
        (1, {"optim": {"sparse": {"kind": "adam", "lr": 0.02}, "dense": {"kind": "adam", "lr": 0.01}}}),
    ],
)
def test_base_and_deltas_are_the_whole(data, tmp_path, world_size, sections):
    often = {"every_steps": 4, "keep": 100}
    full = runs.write_config(data, tmp_path / "full", checkpoint=often, **sections)
    delta = runs.write_config(data, tmp_path / "delta", checkpoint=often | {"deltas": 3}, **sections)
    run_ranks(runs.run, world_size, full)
    run_ranks(runs.run, world_size, delta)
    assert kinds(full) == ["full"] * 7
    # The third delta is merged with what it is one to; the last checkpoint is written full.
    assert kinds(delta) == ["full", "delta", "delta", "full", "delta", "delta", "full"]
    place = Place(delta / "checkpoints")
    for name in STEPS:
        assert verify(place, name, manifests.read(place, name)) == []
        expected, found = runs.tensors(full, name), runs.tensors(delta, name)
        assert expected.keys() == found.keys()
        assert not [tensor for tensor in expected if not torch.equal(expected[tensor], found[tensor])], name


def stop_at(run_dir, step, resume=None):
    return runs.run(run_dir, resume=resume, stop_after=step)


def finish(run_dir):
    return runs.run(run_dir, resume="auto")


def test_a_run_goes_on_from_a_delta_on_its_own_and_on_more_ranks(data, tmp_path):
    sections = {"checkpoint": {"every_steps": 4, "deltas": 10}}
    whole = runs.write_config(data, tmp_path / "whole", **sections)
    cut = runs.write_config(data, tmp_path / "cut", **sections)
    run_ranks(runs.run, 2, whole)
    run_ranks(stop_at, 2, cut, 13)
    # Two stay, and the full one that they belong to.
    assert kinds(cut) == ["full", "delta", "delta", "delta"] and (cut / "checkpoints" / "step_14").exists()
    shutil.copytree(cut, tmp_path / "four")
    shutil.copytree(cut, tmp_path / "damaged")
    run_ranks(finish, 2, cut)
    assert runs.losses(whole) == runs.losses(cut)
    expected, found = runs.tensors(whole), runs.tensors(cut)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    run_ranks(finish, 4, tmp_path / "four")
    assert runs.losses(tmp_path / "four") == pytest.approx(runs.losses(whole), abs=1e-5)

    base = tmp_path / "damaged" / "checkpoints" / "step_4"
    path = max(base.glob("rank_*.bin"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))  # tables come last
    message = run_ranks(refused, 2, tmp_path / "damaged")[0]
    assert "all 4 checkpoints are damaged" in message and message.count("step_4/rank_") == 4
    shutil.rmtree(base)
    with pytest.raises(Damaged, match="a delta to step_4, which is missing"):
        open_chain(Place(tmp_path / "damaged" / "checkpoints"), "step_8")


def refused(run_dir):
    try:
        finish(run_dir)
    except Exception as error:
        return str(error)


def test_a_delta_takes_what_was_touched(data, tmp_path):
    """Of a table of 50,000 rows that 64 rows a step look up in, twice 4 steps touch about 250 each."""
    features = {"labels": ["click"], "dense": ["x0", "x1"], "categorical": runs.FEATURES | {"a": 50_000}}
    sections = {"data": {"features": features}, "checkpoint": {"every_steps": 4, "deltas": 10, "keep": 100}}
    run_dir = runs.write_config(data, tmp_path / "run", **sections)
    run_ranks(stop_at, 1, run_dir, 9)
    place = Place(run_dir / "checkpoints")
    sizes = {
        name: sum(
            c.size[0] * 36
            for n, e in manifests.read(place, name).tensors.items()
            if e.table == "a" and n.endswith("/weight")
            for c in e.chunks
        )
        for name in place.names()
    }
    assert sizes["step_4"] == 50_000 * 36 and sizes["step_8"] <= 40 * 36
    events = [json.loads(line) for line in runs.run_as_text(run_dir).splitlines()]
    assert [e["delta"] for e in events if e["event"] == "checkpoint"] == [False, True, True]


def remove_fails(run_dir):
    """Train where every removal of an old checkpoint fails, on the one rank that removes."""
    remove = Place.remove

    def refuses(self, name):
        raise PermissionError(errno.EPERM, "Operation not permitted", self.path(name))

    Place.remove = refuses
    try:
        return runs.run(run_dir)["checkpoints"]
    finally:
        Place.remove = remove


def test_an_old_checkpoint_that_cannot_be_removed_harms_no_new_one(data, tmp_path):
    """Only rank 0 hears of it: were its saves taken for failed, it would write full ones and the others deltas."""
    often = {"every_steps": 4, "keep": 1, "deltas": 3}
    run_dir = runs.write_config(data, tmp_path / "run", checkpoint=often, tables=SPLIT)
    for totals in run_ranks(remove_fails, 2, run_dir):
        assert (totals["saved"], totals["failed"]) == (7, 0)
    assert kinds(run_dir) == ["full", "delta", "delta", "full", "delta", "delta", "full"]
    assert "could not be removed" in runs.run_as_text(run_dir)


def killed_in_a_merge(run_dir, point):
    """SIGKILL while the delta of step 12 is made full: as it is read, or between the renames that replace it."""
    publish = Place.publish

    def kill(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_at_rename(place, name, manifest):
        merged = b'"kind":"full"' in manifest and name == "step_12"
        rename, os.rename = os.rename, lambda a, b: kill() if merged and str(a).endswith(".partial") else rename(a, b)
        publish(place, name, manifest)
        os.rename = rename

    if point == "read":
        chain.Chain.read = kill  # nothing reads a checkpoint of this run but the merge
    else:
        Place.publish = kill_at_rename
    runs.run(run_dir)


def run_and_finish(whole, cut):
    runs.run(whole)
    return [finish(run_dir) for run_dir in cut]


def test_a_kill_in_a_merge_of_deltas_loses_nothing(data, tmp_path):
    """The delta is there as it was, or comes back, and the run goes on from it, bit for bit."""
    often = {"every_steps": 4, "deltas": 2, "keep": 9}
    sections = {"checkpoint": often, "train": {"batch_size": 64, "max_steps": 16, "log_every": 4}}
    whole, *cut = (runs.write_config(data, tmp_path / name, **sections) for name in ("whole", "read", "renamed"))
    for run_dir in cut:
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(killed_in_a_merge, 1, run_dir, run_dir.name)
    left = [sorted(path.name for path in (run_dir / "checkpoints").iterdir()) for run_dir in cut]
    assert left[0] == ["step_12", "step_4", "step_8"] or left[0] == ["step_12", "step_12.partial", "step_4", "step_8"]
    assert left[1] == ["step_12.old", "step_12.partial", "step_4", "step_8"]
    reports = run_ranks(run_and_finish, 1, whole, cut)[0]
    assert [report["resumed"]["step"] for report in reports] == [12, 12]
    for run_dir in cut:
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
            "step_12",
            "step_16",
            "step_4",
            "step_8",
        ]
        expected, found = runs.tensors(whole), runs.tensors(run_dir)
        assert expected.keys() == found.keys()
        assert not [name for name in expected if not torch.equal(expected[name], found[name])]
        assert runs.losses(whole) == runs.losses(run_dir)
