"""The fit of `tablemesh bench calibrate`, on steps that the cost model made up; and the work counted of the dots."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.calibrate import CONSTANTS, RATES, as_toml, drawn_cases, fitted, small_cases
from benchmarks.planned import predicted
from kernels.interaction import Spec
from sharding import topology
from trainer.dense_work import _Counter, _Dots, dense_work
from trainer.models import dlrm
from trainer.models.base import ModelInputs

RATED = topology.CPU_HOST.sized(hosts=1, ranks_per_host=2)


def test_the_fit_finds_the_constants_that_made_the_steps(tmp_path):
    rng = np.random.default_rng(1)
    factors = np.exp(rng.uniform(-0.7, 0.7, len(CONSTANTS)))
    changed = {name: getattr(RATED, name) * factor for name, factor in zip(CONSTANTS, factors.tolist(), strict=True)}
    real = replace(RATED, **changed, inter_bandwidth=changed["intra_bandwidth"])
    cases = (*small_cases(2), *drawn_cases(2, number=6))
    steps_C = np.array([predicted(case, real).step_seconds for case in cases])
    found, off_C = fitted(RATED, cases, steps_C)
    assert np.array([predicted(case, found).step_seconds for case in cases]) == pytest.approx(steps_C, rel=0.05)
    for case in drawn_cases(2, number=4, seed=2):  # not seen by the fit
        assert predicted(case, found).step_seconds == pytest.approx(predicted(case, real).step_seconds, rel=0.15)
    assert np.median(abs(off_C)) < 0.1
    file = tmp_path / "cpu.toml"
    file.write_text(as_toml(found, 2))
    (profile,) = topology.load_profiles(file).values()
    assert [getattr(profile, name) for name in RATES] == pytest.approx(
        [getattr(found, name) for name in RATES], rel=1e-5
    )


def test_cases_are_drawn_anew_alike_and_train_on_one_rank_too():
    assert drawn_cases(2) == drawn_cases(2) != drawn_cases(2, seed=2)
    kinds = {sharding for case in (*small_cases(1), *drawn_cases(1)) for sharding in case.shardings}
    assert kinds == {"table_wise", "data_parallel"}


def test_the_dots_are_one_op_that_reads_and_multiplies():
    inputs = ModelInputs(dense=5, dims=(8,) * 3, tasks=1, features=("a", "b", "c"))
    with torch.device("meta"):
        nets = [dlrm.build(dlrm.Config(bottom=(8,), top=(1,), interaction=kind), inputs) for kind in ("dot", "cat")]
    dot, cat = (dense_work(net, inputs, state_bytes_per_parameter=8) for net in nets)
    columns, vectors = 8 + 4 * 3 // 2, 4
    products = 2 * 2 * vectors**2 * 8  # forward, and the gradient of the vectors
    top = 3 * 2 * (4 * 8 - columns)  # what the top's only layer has less to do without the dots
    assert dot.flops_per_row - cat.flops_per_row == products - top
    counter, spec = _Counter(), Spec(features=3, dim=8)
    meta = {"device": torch.device("meta")}
    dense_BD, emb_BX, grad_BY = (torch.empty(10, n, **meta) for n in (8, 3 * 8, columns))
    with counter:
        _Dots(spec, counter).forward(dense_BD, emb_BX)
        _Dots(spec, counter).backward(grad_BY, dense_BD, emb_BX)
    assert counter.bytes == 4 * 10 * (3 * (8 + 3 * 8) + 2 * columns)
