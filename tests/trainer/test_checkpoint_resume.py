"""Stopped and continued runs beside uninterrupted ones, in real ranks."""

import json
import os
import shutil

import pytest
import torch

from kernels.errors import UserError
from tests.ranks import run_ranks
from tests.trainer import runs
from trainer import config as configs
from trainer.checkpoint import lock, restore
from trainer.checkpoint.chain import open_chain
from trainer.checkpoint.place import Place

OPTIMS = {
    "sgd": ({"kind": "sgd", "lr": 0.3}, {"kind": "sgd", "lr": 0.05, "momentum": 0.9}),
    "adagrad": ({"kind": "adagrad", "lr": 0.1}, {"kind": "adagrad", "lr": 0.05}),
    "rowwise_adagrad": ({"kind": "rowwise_adagrad", "lr": 0.2}, {"kind": "adam", "lr": 0.01}),
    "adam": ({"kind": "adam", "lr": 0.02}, {"kind": "rowwise_adagrad", "lr": 0.02}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_stopped_run_goes_on_bit_for_bit(data, tmp_path, optim):
    sparse, dense = OPTIMS[optim]
    sections = {"optim": {"sparse": sparse, "dense": dense}}
    whole = runs.write_config(data, tmp_path / "whole", **sections)
    cut = runs.write_config(data, tmp_path / "cut", **sections)
    run_ranks(runs.run, 2, whole)
    stopped = run_ranks(stop_twice_and_finish, 2, cut)
    assert all("SIGTERM" in text or "signal" in text for text in stopped[0][:2])
    assert stopped[0][2]["status"] == "finished" and stopped[0][2]["samples_seen"] == stopped[1][2]["samples_seen"]
    assert_equal(whole, cut)


def stop_twice_and_finish(run_dir):
    """Two stops, in the middle of a log window and of an epoch; each part of the run builds everything anew."""
    return [
        runs.run(run_dir, stop_after=5),
        runs.run(run_dir, resume="auto", stop_after=17),
        runs.run(run_dir, resume="auto"),
    ]


def assert_equal(whole, cut):
    assert runs.losses(whole) == runs.losses(cut)
    expected, found = runs.tensors(whole), runs.tensors(cut)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


def resume_and_report(run_dir, *changes):
    """Go on to the end with the config changed by text replacements."""
    path = run_dir / "config.toml"
    if int(torch.distributed.get_rank()) == 0:
        text = path.read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path.write_text(text)
    torch.distributed.barrier()
    return runs.run(run_dir, resume="auto")


def stop_at(run_dir, step):
    return runs.run(run_dir, stop_after=step)


COLUMNS = ('sharding = "row_wise"', 'sharding = "column_wise"')
REPLICATED = ('sharding = "data_parallel"', 'sharding = "table_wise"')


@pytest.mark.parametrize(
    ("optim", "before", "after", "changes"),
    [
        ("rowwise_adagrad", 2, 1, ()),
        ("rowwise_adagrad", 1, 4, ()),
        ("rowwise_adagrad", 2, 2, (REPLICATED, ('embedding_bag = "auto"', 'embedding_bag = "fbgemm"'))),
        ("adam", 4, 2, (REPLICATED, COLUMNS)),
        ("adagrad", 2, 1, (('sharding = "data_parallel"', 'sharding = "row_wise"'),)),
    ],
)
def test_another_world_size_plan_and_kernel(data, tmp_path, optim, before, after, changes):
    """The same samples in the same order: every loss and weight is that of the uninterrupted run, to 1e-5."""
    sparse, dense = OPTIMS[optim]
    sections = {
        "optim": {"sparse": sparse, "dense": dense},
        "train": {"batch_size": 64, "max_steps": 60, "log_every": 1},
    }
    whole = runs.write_config(data, tmp_path / "whole", **sections)
    cut = runs.write_config(data, tmp_path / "cut", **sections)
    run_ranks(runs.run, before, whole)
    run_ranks(stop_at, before, cut, 8)
    reports = run_ranks(resume_and_report, after, cut, *changes)
    assert reports[0]["samples_seen"] == 4 * runs.ROWS
    assert reports[0]["resumed"]["world_size"] == before
    expected, found = runs.losses(whole), runs.losses(cut)
    assert len(found) == 60 and found == pytest.approx(expected, abs=1e-5)
    ours, theirs = runs.tensors(cut), runs.tensors(whole)
    for name in theirs:
        if name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4, msg=name)
    assert {n for n in theirs if n.endswith("weight")} <= set(ours)


def test_row_states_follow_other_column_parts(data, tmp_path):
    """One number per row and column part: two of a table that is cut become their mean, which becomes two again."""
    run_dir = runs.write_config(data, tmp_path / "a", tables={"override": [{"match": "b", "sharding": "column_wise"}]})
    run_ranks(stop_at, 2, run_dir, 6)
    halves = runs.tensors(run_dir)
    a, b = halves["tables/b/sum:0-4"], halves["tables/b/sum:4-8"]
    assert not torch.equal(a, b)
    run_ranks(resume_and_stop, 1, run_dir, COLUMNS[::-1])
    one = runs.tensors(run_dir)["tables/b/sum:0-8"]
    torch.testing.assert_close(one, (a + b) / 2, rtol=1e-6, atol=0)
    run_ranks(resume_and_stop, 2, run_dir, COLUMNS)
    again = runs.tensors(run_dir)
    assert torch.equal(again["tables/b/sum:0-4"], one) and torch.equal(again["tables/b/sum:4-8"], one)


def there_and_back(run_dirs):
    """Train 3 steps with FBGEMM's kernels, load and save that with ours, and that with FBGEMM's again; the tensors."""
    found = []
    for run_dir in run_dirs:
        runs.run(run_dir, stop_after=3)
        found.append([runs.tensors(run_dir)])
        for change in (('"fbgemm"', '"cpu"'), ('"cpu"', '"fbgemm"')):
            resume_and_stop(run_dir, ("embedding_bag = " + change[0], "embedding_bag = " + change[1]))
            found[-1].append(runs.tensors(run_dir))
        assert runs.run(run_dir, resume="auto")["status"] == "finished"
    return found


def test_weights_and_states_go_from_fbgemms_kernels_to_ours_and_back(data, tmp_path):
    """Bit for bit, for every optimizer that FBGEMM has on a CPU."""
    folders = []
    for optim in ("sgd", "adagrad", "rowwise_adagrad"):
        sparse, dense = OPTIMS[optim]
        sections = {"optim": {"sparse": sparse, "dense": dense}, "kernels": {"embedding_bag": "fbgemm"}}
        train = {"batch_size": 64, "max_steps": 5, "log_every": 4}
        folders.append(runs.write_config(data, tmp_path / optim, train=train, **sections))
    (of_each,) = run_ranks(there_and_back, 1, folders)
    for (theirs, ours, again), states in zip(of_each, (0, 4, 4), strict=True):
        found = [name for name in theirs if name.startswith("tables/") and "/sum" in name]
        assert len(found) == states, "of each table, data_parallel ones too"
        for tensors in (ours, again):
            assert tensors.keys() == theirs.keys()
            assert not [name for name in theirs if not torch.equal(tensors[name], theirs[name])]


def resume_and_stop(run_dir, *changes):
    """Load, and save what was loaded under the same step."""
    from trainer.checkpoint.session import Session

    resume = Session.resume

    def and_save(self, where, **given):
        progress = resume(self, where, **given)
        self._last_saved = None
        self.finish(progress)
        raise StopIteration

    Session.resume = and_save
    try:
        resume_and_report(run_dir, *changes)
    except StopIteration:
        pass
    finally:
        Session.resume = resume


def from_earlier(run_dir):
    """Names of the checkpoints: of a run, after a resume from step_4 that fails before its first step, after one that
    does not."""
    from trainer import trainer

    def names():
        return sorted(path.name for path in (run_dir / "checkpoints").iterdir())

    runs.run(run_dir, stop_after=7)
    found, build = [names()], trainer.build_pipeline

    def refuse(*args, **options):
        raise UserError("not yet")

    trainer.build_pipeline = refuse
    try:
        runs.run(run_dir, resume=str(run_dir / "checkpoints/step_4"))
    except UserError:
        found.append(names())
    finally:
        trainer.build_pipeline = build
    runs.run(run_dir, resume=str(run_dir / "checkpoints/step_4"), stop_after=5)
    return [*found, names()]


def test_later_checkpoints_are_set_aside_at_the_first_step_and_not_before(data, tmp_path):
    run_dir = runs.write_config(data, tmp_path / "run", checkpoint={"every_steps": 2, "keep": 99})
    (was, refused, left), *_ = run_ranks(from_earlier, 1, run_dir)
    assert was == refused == ["step_2", "step_4", "step_6", "step_7"]
    assert left == ["step_2", "step_4", "step_5", "step_6.superseded", "step_7.superseded"]


def refused(run_dir, *changes):
    try:
        resume_and_report(run_dir, *changes)
    except UserError as error:
        return str(error)


CHANGES = (
    (("seed = 1", "seed = 2"), ["seed: 1 -> 2"]),
    (("batch_size = 64", "batch_size = 32"), ["train.batch_size: 64 -> 32"]),
    (("top = [\n    16,", "top = [\n    12,"), ["model.top: [16, 1] -> [12, 1]"]),
    (("d = 120", "d = 130"), ["data.features.categorical.d: 120 -> 130"]),
    (('kind = "rowwise_adagrad"', 'kind = "adagrad"'), ["optim.sparse.kind: 'rowwise_adagrad' -> 'adagrad'"]),
)


def refuse_all(run_dir):
    text, found = (run_dir / "config.toml").read_text(), []
    for change, _ in CHANGES:
        (run_dir / "config.toml").write_text(text)
        found.append(refused(run_dir, change))
    return found


def test_a_config_that_means_something_else_is_refused(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (messages,) = run_ranks(refuse_all, 1, tmp_path / "run")
    for message, (_, words) in zip(messages, CHANGES, strict=True):
        for word in [*words, "step_3 cannot be continued with this config"]:
            assert word in message


def test_other_data_is_refused(stopped):
    manifest = open_chain(Place(stopped / "checkpoints"), "step_3").manifest
    config = configs.load(stopped / "config.toml")
    now = manifest.position.data_fingerprint
    assert restore.check_same(manifest, config, config, now, where="step_3") == []
    with pytest.raises(UserError, match=f"the data's fingerprint: {now} -> another"):
        restore.check_same(manifest, config, config, "another", where="step_3")


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    run_dir = runs.write_config(data, tmp_path_factory.mktemp("stopped") / "run")
    run_ranks(stop_at, 2, run_dir, 2)  # two ranks agree a step later
    return run_dir


def test_what_may_differ_is_reported(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    change = ("max_steps = 28", "max_steps = 5")
    (report,) = run_ranks(resume_and_report, 1, tmp_path / "run", change)
    assert report["resumed"]["changed"] == ["train.max_steps: 28 -> 5"] and report["steps"] == 5
    assert runs.run_as_text(tmp_path / "run").count("changed since: train.max_steps: 28 -> 5") == 1


def test_a_run_on_a_locked_folder_is_refused(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    holder = lock._self() | {"pid": os.getppid(), "start": lock._start_of(os.getppid())}
    (tmp_path / "run" / "LOCK").write_text(json.dumps(holder))
    (message,) = run_ranks(refused, 1, tmp_path / "run")
    assert f"process {os.getppid()}" in message and "another run is writing here" in message
    (tmp_path / "run" / "LOCK").write_text(json.dumps(holder | {"start": "1"}))
    (report,) = run_ranks(resume_and_report, 1, tmp_path / "run", ("max_steps = 28", "max_steps = 4"))
    assert report["status"] == "finished" and not (tmp_path / "run" / "LOCK").exists()
    assert "that process has ended" in runs.run_as_text(tmp_path / "run")


def stopped_by_its_data(run_dir, part):
    """Stop after step 5, go on with a file whose pages are damaged, then with the file as it was."""
    runs.run(run_dir, stop_after=5)
    before = runs.tensors(run_dir)
    good = part.read_bytes()
    part.write_bytes(good[:4] + bytes(len(good) // 2) + good[4 + len(good) // 2 :])
    try:
        runs.run(run_dir, resume="auto")
    except UserError as error:
        message = str(error)
    after = runs.tensors(run_dir)
    part.write_bytes(good)
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return message, same, runs.run(run_dir, resume="auto")["status"]


def test_a_reader_that_fails_loses_nothing(data, tmp_path):
    """The file is named; the last checkpoint stays as it was; with the file mended the run is the uninterrupted one."""
    own = shutil.copytree(data, tmp_path / "data")
    whole, cut = (runs.write_config(own, tmp_path / name) for name in ("whole", "cut"))
    run_ranks(runs.run, 1, whole)
    ((message, same, status),) = run_ranks(stopped_by_its_data, 1, cut, own / "train/part.parquet")
    assert "part.parquet" in message and "row group" in message
    assert same and status == "finished"
    assert_equal(whole, cut)
