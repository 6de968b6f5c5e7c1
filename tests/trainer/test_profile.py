"""Where a step went."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.profile import SKIPPED, STEPS, Profile, kind_of, summary


@pytest.mark.parametrize(
    "name, kind",
    [
        ("_Lookup", "embedding"),
        ("_LookupBackward", "embedding"),
        ("fbgemm::split_embedding_codegen_forward_cpu", "embedding"),
        ("_DotsBackward", "interaction"),
        ("aten::mm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("c10d::alltoall_base_", "communication"),
        ("All2All_Pooled_Wait", "communication"),
        ("aten::cat", "copies"),
        ("aten::threshold_backward", "elementwise"),
        ("Optimizer.step#Adagrad.step", "optimizer"),
        ("phase: data_wait", "data wait"),
        ("phase: forward", "the rest"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_the_kinds_add_up_and_the_optimizer_keeps_what_is_inside():
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        x @ x
        with record_function("Optimizer.step#SGD.step"):
            x @ x
    found = summary(traced.events(), [0.5, 0.5])
    shares = {row["kind"]: row["share"] for row in found["kinds"]}
    assert found["steps"] == 2 and found["step_ms"] == 500
    assert {"matrix products", "optimizer", "the rest"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("steps, traced", [(SKIPPED + STEPS + 2, STEPS), (SKIPPED + 2, 2), (SKIPPED, 0)])
def test_runs_of_any_length(tmp_path, steps, traced):
    found = Profile(tmp_path, 0)
    for _ in range(steps):
        found.before_step()
        torch.ones(8, 8) @ torch.ones(8, 8)
        found.after_step(0.01)
    found.close()
    file = tmp_path / "profile" / "summary_0.json"
    assert file.exists() == bool(traced)
    if traced:
        written = json.loads(file.read_text())
        assert written["steps"] == traced and (tmp_path / written["trace"]).exists()
