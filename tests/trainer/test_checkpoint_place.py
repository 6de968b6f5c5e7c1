"""Where checkpoints are: replaced, recovered, pruned without losing a whole one; under file:// and memory:// URLs."""

import errno
import os
import shutil

import pytest
import torch

from kernels.errors import UserError
from tests.ranks import run_ranks
from tests.trainer import runs
from tests.trainer.test_checkpoint_damage import damages, make_saver, resume_auto, save, write_two
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.place import Place


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run_ranks(write_two, 2, folder, 1)
    return folder


def replace_in_vain(folder):
    """Write a checkpoint again where its last rename fails: what is said."""
    rename = os.rename

    def full(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(target))
        rename(source, target)

    os.rename = full
    try:
        write_two(folder, 1)
    except OSError as error:
        return str(error)
    finally:
        os.rename = rename


def test_a_rename_that_fails_leaves_the_old_one(written, tmp_path):
    shutil.copytree(written, tmp_path / "c")
    for message in run_ranks(replace_in_vain, 2, tmp_path / "c"):
        assert "rank 0: Disk quota exceeded" in message
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_1"]
    assert damages(tmp_path / "c") == []


def test_a_writer_that_died_between_two_renames_loses_nothing(written, tmp_path):
    """`resume` finds the old one, which is beside its name; so does who looks for what it may remove."""
    shutil.copytree(written / "step_1", tmp_path / "c" / "step_7.old")
    shutil.copytree(written / "step_1", tmp_path / "c" / "step_3")
    assert run_ranks(resume_auto, 2, tmp_path / "c") == [("step_7", ())] * 2
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_3", "step_7"]


def save_after_damage(folder, log_dir):
    """Two checkpoints, the second one's manifest torn; then two more, of which two are to stay."""
    saver = make_saver(folder, log_dir, keep=2)
    names = []
    for step in (1, 2, 3, 4):
        save(saver, step)
        saver.wait()
        if step == 2:
            (folder / "step_2" / MANIFEST).write_bytes(b"{")
        names.append(saver.place.names())
    return names


def test_a_damaged_one_does_not_count_among_those_that_stay(tmp_path):
    ((*_, third, fourth),) = run_ranks(save_after_damage, 1, tmp_path / "c", tmp_path)
    assert third == ["step_1", "step_2", "step_3"], "without step_1 a single whole one would be left"
    assert fourth == ["step_3", "step_4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def go_on_under(url, run_dir):
    """Stop a run after step 9 (two ranks agree on it a step later), and go on; the tensors of the last checkpoint."""
    assert "after the checkpoint of step" in runs.run(run_dir, stop_after=9)
    report = runs.run(run_dir, resume="auto")
    place = Place(f"{url}/{run_dir.name}")
    chain = open_chain(place, place.names()[-1])
    tensors = {name: chain.read(name) for name in chain.tensors if not name.startswith("ranks/")}
    return report["resumed"]["step"], place.names(), tensors


@pytest.mark.parametrize(("scheme", "world_size"), [("file", 2), ("memory", 1)])
def test_a_run_under_a_url_is_the_run_in_a_folder(data, tmp_path, scheme, world_size):
    """Every rank of memory:// has a memory of its own, so there it is one."""
    url = f"file://{tmp_path}/away" if scheme == "file" else "memory://away"
    often = {"every_steps": 4, "deltas": 2, "count_updates": True}
    whole = runs.write_config(data, tmp_path / "whole", checkpoint=often)
    away = runs.write_config(data, tmp_path / "away_run", checkpoint=often | {"dir": url})
    run_ranks(runs.run, world_size, whole)
    found = run_ranks(go_on_under, world_size, url, away)
    expected = runs.tensors(whole)
    for resumed, names, tensors in found:
        assert resumed == 8 + world_size and names[-1] == "step_28" and len(names) >= 2
        assert expected.keys() == tensors.keys()
        assert not [name for name in expected if not torch.equal(expected[name], tensors[name])]
    assert not (away / "checkpoints").exists()


def test_urls_that_are_none():
    for url, words in (("nosuch://bucket", "Protocol not known: nosuch"), ("foo://", "Protocol not known: foo")):
        with pytest.raises(UserError, match=words):
            Place(url)
    assert Place("memory://").names() == []
