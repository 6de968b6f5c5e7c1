"""The history that survives restarts, and how a row that is lost or seen twice is told."""

import numpy as np
import pytest
import torch

from kernels.errors import UserError
from trainer import rowlog
from trainer.restarts import ATTEMPT


def write(folder, monkeypatch, attempt, records):
    """records: {rank: {step: rows}}"""
    monkeypatch.setenv(ATTEMPT, str(attempt))
    for rank, steps in records.items():
        log = rowlog.RowLog(folder, rank)
        for step, rows in steps.items():
            log.add(step, torch.tensor([*rows, -1]))


def as_lists(history):
    return {step: rows.tolist() for step, rows in history.items()}


def test_later_attempts_replace_what_they_train_again(tmp_path, monkeypatch):
    write(tmp_path / "0", monkeypatch, 0, {0: {1: [4], 2: [2], 3: [0]}, 1: {1: [5], 2: [3]}})  # killed in step 3
    write(tmp_path / "0", monkeypatch, 1, {0: {}, 1: {}})  # killed before its first step
    write(tmp_path / "0", monkeypatch, 2, {0: {2: [3], 3: [0]}, 1: {2: [2], 3: [1]}})
    write(tmp_path / "1", monkeypatch, 0, {0: {4: [7, 6]}})  # by hand, on one rank
    history = rowlog.read(tmp_path)
    assert as_lists(history) == {1: [4, 5], 2: [2, 3], 3: [0, 1], 4: [6, 7]}
    assert rowlog.first_fault(history, history, rows=8, steps_per_epoch=4) is None


def test_a_record_cut_short_is_no_record(tmp_path, monkeypatch):
    write(tmp_path / "0", monkeypatch, 0, {0: {1: [0, 1], 2: [2, 3]}})
    path = tmp_path / "0/attempt_0/rank_0.bin"
    for cut in (1, 8, 17, 25):
        path.write_bytes(path.read_bytes()[: 64 - cut])
        assert as_lists(rowlog.read(tmp_path)) == {1: [0, 1]}


def test_a_step_that_a_rank_has_no_record_of(tmp_path, monkeypatch):
    write(tmp_path / "0", monkeypatch, 0, {0: {1: [0], 2: [1], 3: [2]}, 1: {1: [3], 3: [5]}})
    with pytest.raises(UserError, match="no record of step 2 by rank_1"):
        rowlog.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({2: None}, "step 2 was lost"),
        ({3: [9]}, "step 3 is more than was asked for"),
        ({2: [2, 4]}, "step 2: row 3 was lost and row 4 was trained on instead"),
        ({2: [2, 2, 3]}, "step 2: a row was seen twice"),
    ],
)
def test_first_fault_of_a_step(change, said):
    expected = {1: np.array([0, 1]), 2: np.array([2, 3])}
    found = {step: rows for step, rows in (expected | change).items() if rows is not None}
    assert rowlog.first_fault(expected, found, rows=4, steps_per_epoch=2) == said


def test_an_epoch_that_sees_a_row_twice_is_wrong_even_if_both_runs_agree():
    both = {1: np.array([0, 1]), 2: np.array([1, 3])}
    assert rowlog.first_fault(both, both, rows=4, steps_per_epoch=2) == "epoch 0: row 1 was seen 2 times"
