"""The TensorBoard mirror: what is written can be read back."""

import sys

import pytest

from kernels.errors import UserError
from trainer.tensorboard import Mirror


def test_events_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    mirror = Mirror(tmp_path)
    mirror.event({"event": "start", "time": 1.0, "steps_total": 9})
    for step in (20, 40):
        mirror.event({"event": "train", "time": 10.0 + step, "step": step, "loss": 1 / step, "auc": None, "samples": 5})
    mirror.event({"event": "eval", "time": 60.0, "step": 40, "split": "test", "auc": 0.75, "final": True, "rows": 9})
    mirror.event({"event": "message", "time": 61.0, "step": 40, "level": "info", "text": "x"})
    mirror.close()

    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["eval_test/auc", "train/loss"]
    losses = found.Scalars("train/loss")
    assert [(e.step, e.wall_time) for e in losses] == [(20, 30.0), (40, 50.0)]
    assert [e.value for e in losses] == pytest.approx([1 / 20, 1 / 40])


def test_without_the_package_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"run\.tensorboard = false"):
        Mirror(tmp_path)
