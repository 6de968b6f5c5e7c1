"""Stopped and continued runs are the uninterrupted ones, bit for bit: every table kind, row type and optimizer.

Each model has several kinds of tables beside each other, dropout and batch norm.
"""

import pytest
import torch

from kernels import registry
from sharding.tables.base import ROW_TYPES
from tests.ranks import run_ranks
from tests.trainer import runs

# Feature -> (kind, its options); between them every kind there is.
MIXES = (
    {
        "a": ("standard", {}),
        "b": ("hashed", {"rows": 13, "seeds": 2}),
        "c": ("compositional", {}),
        "d": ("mixed_dim", {"dims": [8, 4], "blocks": [7], "ordered": True}),
    },
    {
        "a": ("unified", {"rows": 23, "lookups": 2}),
        "b": ("mixed_dim", {"dims": [4]}),
        "c": ("collisionless", {"rows": 256, "admit_after": 2, "expire_steps": 4}),
        "d": ("compositional", {"op": "add", "partition": "chinese"}),
    },
)
OPTIMS = {"sgd": 0.3, "adagrad": 0.1, "rowwise_adagrad": 0.2, "adam": 0.02}  # kind -> learning rate
STEPS, STOP = 9, 5  # in the middle of a log window, a step after a save


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def write(data, folder, *, mix, row_type, optim):
    """Two run folders with one config: (to run through, to stop)."""
    override = [{"match": name, "kind": kind, "options": options} for name, (kind, options) in mix.items()]
    sections = {
        "tables": {"dim": 8, "row_type": row_type, "override": override},
        "model": {"kind": "dlrm", "bottom": [16, 8], "top": [16, 16, 1], "dropout": 0.2, "batch_norm": True},
        "optim": {"sparse": {"kind": optim, "lr": OPTIMS[optim]}, "dense": {"kind": "adam", "lr": 0.01}},
        "train": {"batch_size": 32, "max_steps": STEPS, "log_every": 2},
        "checkpoint": {"every_steps": 2, "deltas": 1},
        "data": {"streams": 4, "threads": 1},
    }
    return tuple(runs.write_config(data, folder / name, **sections) for name in ("whole", "cut"))


def run_pairs(pairs):
    """Each config run through in one go and in two, all in the ranks that are up."""
    for whole, cut in pairs:
        runs.run(whole)
        assert isinstance(runs.run(cut, stop_after=STOP), str)
        report = runs.run(cut, resume="auto")
        assert report["status"] == "finished" and report["steps"] == STEPS


def differences(whole, cut):
    """Names of what differs: losses, tensors."""
    expected, found = runs.tensors(whole), runs.tensors(cut)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    return different + (["losses"] if runs.losses(whole) != runs.losses(cut) else [])


def test_every_kind_is_in_a_mix():
    tried = {kind for mix in MIXES for kind, _ in mix.values()}
    assert tried == set(registry.names("sharding.tables")) and set(OPTIMS) == set(registry.names("trainer.optim"))


@pytest.mark.parametrize("optim", OPTIMS)
def test_one_rank(data, tmp_path, optim):
    """Both mixes with every optimizer, each time with other row types, so that each mix meets all of these."""
    first, types = list(OPTIMS).index(optim), list(ROW_TYPES)
    pairs = []
    for n, mix in enumerate(MIXES):
        row_type = types[(first + n) % len(types)]
        pairs.append(write(data, tmp_path / row_type, mix=mix, row_type=row_type, optim=optim))
    run_ranks(run_pairs, 1, pairs)
    assert [differences(*pair) for pair in pairs] == [[], []]


@pytest.mark.parametrize("n", range(len(MIXES)))
def test_two_ranks(data, tmp_path, n):
    """Both mixes with every optimizer again, with row types that one rank has not had with them."""
    types, pairs = list(ROW_TYPES), []
    for first, optim in enumerate(OPTIMS):
        row_type = types[(first + n + 2) % len(types)]
        pairs.append(write(data, tmp_path / optim, mix=MIXES[n], row_type=row_type, optim=optim))
    run_ranks(run_pairs, 2, pairs)
    assert [differences(*pair) for pair in pairs] == [[]] * len(OPTIMS)
