"""Stopped and continued runs beside uninterrupted ones, in real ranks."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer import runs

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
