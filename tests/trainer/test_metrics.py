"""Metrics against scikit-learn, and over updates; step times against numpy."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from tests.trainer.test_metrics_ranks import drawn
from trainer.metrics import BITS, WINDOW_BITS, Durations, Metrics, StepTimer, bin_of, logit_of, peak_memory_bytes

ROUNDING = 1e-12


def figures(logits, labels, weight=None, bits=BITS):
    metrics = Metrics(["click"], bits=bits)
    metrics.update(
        torch.as_tensor(logits), torch.as_tensor(labels), None if weight is None else torch.as_tensor(weight)
    )
    return metrics.compute()


def check_against_sklearn(logits, labels, weight, bits=BITS):
    found = figures(logits, labels, weight, bits)
    counted = weight > 0
    x, y, w = logits[counted].astype(np.float64), labels[counted], weight[counted].astype(np.float64)
    assert found["rows"] == counted.sum()
    if len(x) == 0:
        assert found["logloss"] is None
        return found
    margin = np.where(y > 0, x, -x)
    exact_loss = np.average(np.logaddexp(0, -margin), weights=w)
    assert found["logloss"] == pytest.approx(exact_loss, rel=1e-12, abs=1e-300)
    if len(set(y)) < 2:
        assert found["auc"] is None and found["auc_error_bound"] is None and found["ne"] is None
        return found
    exact_auc = roc_auc_score(y, x, sample_weight=w)
    assert abs(found["auc"] - exact_auc) <= found["auc_error_bound"] + ROUNDING
    rate = np.average(y, weights=w)
    assert found["ne"] == pytest.approx(exact_loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)), rel=1e-9)
    predictions = np.exp(-np.logaddexp(0, -x))
    assert found["calibration"] == pytest.approx((w @ predictions) / (w @ y), rel=1e-9)
    return found


finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
logits_of_all_kinds = st.one_of(
    finite32,
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e-45, -1e-45, 65535.996, 65536.0, 1.5e-5, 1.53e-5, 3.4e38, -3.4e38]
    ),
    st.floats(-8, 8, width=32),
)
rows_of_all_kinds = st.lists(
    st.tuples(logits_of_all_kinds, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.25, 1.0, 1.0, 1.0, 3.0])),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_all_kinds, bits=st.sampled_from([7, WINDOW_BITS, BITS]))
def test_figures_match_sklearn_on_any_rows(rows, bits):
    logits, labels, weight = (np.array([row[i] for row in rows], dtype=np.float32) for i in range(3))
    check_against_sklearn(logits, labels, weight, bits)


@pytest.mark.parametrize("bits", [WINDOW_BITS, BITS])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.5, 30, 1e4])
def test_figures_match_sklearn_on_drawn_rows(scale, bits):
    logits_BT, labels_BT, weight_B = drawn(20_000, seed=3, scale=scale)
    check_against_sklearn(logits_BT[:, 0].numpy(), labels_BT[:, 0].numpy(), weight_B.numpy(), bits)


def test_logloss_matches_sklearn():
    logits_BT, labels_BT, weight_B = drawn(5_000, seed=4)
    found = figures(logits_BT, labels_BT, weight_B)
    expected = log_loss(labels_BT[:, 0], torch.sigmoid(logits_BT[:, 0].double()), sample_weight=weight_B)
    assert found["logloss"] == pytest.approx(expected, rel=1e-9)


def test_the_bound_is_small_on_click_logits_and_the_error_smaller():
    logits_BT, labels_BT, _ = drawn(200_000, seed=5)
    for bits, bound in ((BITS, 3e-5), (WINDOW_BITS, 2.5e-4)):
        found = figures(logits_BT, labels_BT, bits=bits)
        assert 0 < found["auc_error_bound"] < bound
        assert abs(found["auc"] - roc_auc_score(labels_BT[:, 0], logits_BT[:, 0])) < bound / 50


def test_ties_count_half_and_equal_scores_give_one_half():
    found = figures([0.3] * 10, [0.0, 1.0] * 5)
    assert found["auc"] == 0.5 and found["auc_error_bound"] == 0.5
    assert figures([-0.0, 0.0], [1.0, 0.0])["auc"] == 0.5


def test_perfect_and_reversed_ranking():
    assert figures([-1.0, -0.5, 0.5, 2.0], [0.0, 0.0, 1.0, 1.0])["auc"] == 1.0
    assert figures([-1.0, -0.5, 0.5, 2.0], [1.0, 1.0, 0.0, 0.0])["auc"] == 0.0


def test_soft_labels_are_split_between_positive_and_negative():
    soft = figures([0.2, 1.0, -2.0], [0.25, 1.0, 0.0])
    split = figures([0.2, 0.2, 1.0, -2.0], [1.0, 0.0, 1.0, 0.0], [0.25, 0.75, 1.0, 1.0])
    assert soft["auc"] == pytest.approx(split["auc"]) and soft["logloss"] == pytest.approx(split["logloss"])


@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0]])
def test_one_class_only_has_no_auc(labels):
    found = figures([0.1, -0.4], labels)
    assert found["auc"] is None and found["ne"] is None and found["logloss"] > 0
    assert (found["calibration"] is None) == (sum(labels) == 0)
    json.dumps(found, allow_nan=False)


def test_no_rows():
    found = Metrics(["click"]).compute()
    assert found["rows"] == 0
    assert all(found[key] is None for key in ("auc", "auc_error_bound", "ne", "logloss", "calibration"))
    assert found["calibration_bins"] == []
    json.dumps(found, allow_nan=False)
    assert figures([1.0], [1.0], [0.0])["rows"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_refused(bad):
    with pytest.raises(FloatingPointError, match="task 'click': 1 rows have a logit that is not finite"):
        figures([0.5, bad], [1.0, 0.0])


def test_labels_and_weights_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="2 rows have a label outside"):
        figures([0.5, 0.1, 0.2], [2.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="1 rows have a label outside"):
        figures([0.5, 0.1], [math.nan, 1.0])
    with pytest.raises(ValueError, match="weight that is negative"):
        figures([0.5, 0.1], [0.0, 1.0], [1.0, -2.0])
    with pytest.raises(ValueError, match="weight that is negative"):
        figures([0.5, 0.1], [0.0, 1.0], [1.0, math.nan])


def test_rows_of_weight_zero_may_hold_anything():
    padded = figures([0.5, -1.0, math.nan, math.inf], [1.0, 0.0, math.nan, 7.0], [1.0, 2.0, 0.0, 0.0])
    assert padded == figures([0.5, -1.0], [1.0, 0.0], [1.0, 2.0])


@settings(max_examples=200, deadline=None)
@given(values=st.lists(finite32, min_size=1, max_size=50), bits=st.sampled_from([7, 15, 18, 29]))
def test_bins_are_monotone_and_in_range(values, bits):
    bins = bin_of(torch.tensor(sorted(values), dtype=torch.float32), bits)
    assert (bins.diff() >= 0).all() and bins.min() >= 0 and bins.max() < 2**bits


@pytest.mark.parametrize("bits", [7, 15, 18])
def test_the_middle_of_a_bin_lies_in_it_and_near_its_logits(bits):
    middle = logit_of(bits)
    assert torch.equal(bin_of(torch.tensor(middle, dtype=torch.float32), bits), torch.arange(2**bits))
    logits = torch.tensor([s * x for x in np.geomspace(1.6e-5, 6e4, 999) for s in (1, -1)], dtype=torch.float32)
    error = np.abs(middle[bin_of(logits, bits)] - logits.double().numpy()) / logits.double().abs().numpy()
    assert error.max() <= 2.0 ** (5 - bits)


def test_calibration_bins_hold_all_the_weight_and_order_the_predictions():
    logits_BT, labels_BT, weight_B = drawn(50_000, seed=6)
    found = figures(logits_BT, labels_BT, weight_B)
    bins = found["calibration_bins"]
    weight = np.array([b["weight"] for b in bins])
    predicted, actual = np.array([b["predicted"] for b in bins]), np.array([b["actual"] for b in bins])
    assert len(bins) == 20 and weight.max() / weight.min() < 1.02
    assert weight.sum() == pytest.approx(weight_B.double().sum().item())
    assert (np.diff(predicted) > 0).all()
    assert (weight @ predicted) / (weight @ actual) == pytest.approx(found["calibration"], rel=1e-4)
    assert np.abs(predicted - actual).max() < 0.05


def test_each_task_has_its_own_figures():
    logits_BT, labels_BT, weight_B = drawn(3_000, seed=7, tasks=3)
    metrics = Metrics(["click", "like", "buy"])
    metrics.update(logits_BT, labels_BT, weight_B)
    found = metrics.compute()
    for t, task in enumerate(("click", "like", "buy")):
        alone = figures(logits_BT[:, t], labels_BT[:, t], weight_B)
        assert found["tasks"][task]["calibration_bins"] == alone["calibration_bins"]
        for key in ("auc", "auc_error_bound", "ne", "logloss", "calibration", "rows"):
            assert found["tasks"][task][key] == pytest.approx(alone[key], rel=1e-12)
    assert found["auc"] == found["tasks"]["click"]["auc"]


def test_one_bad_task_is_named():
    metrics = Metrics(["click", "buy"])
    metrics.update(torch.tensor([[0.1, math.nan]]), torch.tensor([[1.0, 0.0]]), torch.ones(1))
    with pytest.raises(FloatingPointError, match="task 'buy'"):
        metrics.compute()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=6), integer_weights=st.booleans())
def test_splitting_the_rows_over_updates_changes_nothing(cuts, integer_weights):
    logits_BT, labels_BT, weight_B = drawn(500, seed=8, tasks=2)
    if integer_weights:
        weight_B = weight_B.round()
    whole, parts = Metrics(["a", "b"]), Metrics(["a", "b"])
    whole.update(logits_BT, labels_BT, weight_B)
    edges = [0, *sorted(cuts), 500]
    for start, end in zip(edges, edges[1:], strict=False):
        parts.update(logits_BT[start:end], labels_BT[start:end], weight_B[start:end])
    expected, found = whole.compute(), parts.compute()
    if integer_weights:
        assert found["auc"] == expected["auc"] and found["auc_error_bound"] == expected["auc_error_bound"]
    for key in ("auc", "auc_error_bound", "ne", "logloss", "calibration", "rows"):
        assert found[key] == pytest.approx(expected[key], rel=1e-12)


def test_all_reduce_without_ranks_is_a_copy():
    metrics = Metrics(["a"])
    metrics.update(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.0]))
    total = metrics.all_reduce()
    metrics.reset()
    assert total.compute()["rows"] == 2 and metrics.compute()["rows"] == 0


def test_state_dict_round_trip():
    logits_BT, labels_BT, weight_B = drawn(300, seed=10)
    metrics = Metrics(["a"])
    metrics.update(logits_BT, labels_BT, weight_B)
    saved = metrics.state_dict()
    expected = metrics.compute()
    metrics.reset()
    other = Metrics(["a"])
    other.load_state_dict(saved)
    assert other.compute() == expected
    with pytest.raises(AssertionError, match="other metrics"):
        Metrics(["b"]).load_state_dict(saved)


def test_memory_does_not_grow():
    logits_BT, labels_BT, weight_B = drawn(2_000, seed=11)
    metrics, durations = Metrics(["a"]), Durations()
    tracemalloc.start()
    size = metrics.state_dict()["state"].numel()
    before = tracemalloc.get_traced_memory()[0]
    for step in range(200):
        metrics.update(logits_BT, labels_BT, weight_B)
        durations.add(0.01 + step * 1e-4)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert metrics.state_dict()["state"].numel() == size == 2 * 2**BITS + 8
    assert grown < 20_000


@settings(max_examples=50, deadline=None)
@given(seconds=st.lists(st.floats(1e-6, 86_000), min_size=1, max_size=300), q=st.sampled_from([0, 1, 50, 90, 99, 100]))
def test_percentiles_are_within_a_thousandth(seconds, q):
    durations = Durations()
    for value in seconds:
        durations.add(value)
    exact = np.percentile(seconds, q, method="inverted_cdf")
    assert durations.percentile(q) == pytest.approx(exact, rel=1e-3)


def test_durations_outside_the_range_do_not_break():
    durations = Durations()
    assert durations.percentile(50) is None
    for value in (0.0, 1e-12, 1e9):
        durations.add(value)
    assert durations.percentile(0) == 0.0 and durations.percentile(100) == 1e9
    assert durations.percentile(50) == pytest.approx(1e-6, rel=2e-3)


def test_step_timer_sums_up():
    timer = StepTimer()
    assert timer.summary() == {
        "seconds": 0,
        "samples_per_second": None,
        "step_ms": {"p50": None, "p90": None, "p99": None},
        "phases_ms": {},
    }
    for _ in range(9):
        timer.add(seconds=0.05, samples=100, phases={"data_wait": 0.01, "forward": 0.03})
    timer.add(seconds=0.1, samples=100, phases={"data_wait": 0.06, "forward": 0.05})
    found = timer.summary()
    assert found["samples_per_second"] == pytest.approx(1000 / 0.55)
    assert found["step_ms"] == pytest.approx({"p50": 50, "p90": 50, "p99": 100}, rel=1e-3)
    assert found["phases_ms"] == pytest.approx({"data_wait": 10, "forward": 30, "other": 10}, rel=1e-3)
    timer.reset()
    assert timer.summary()["seconds"] == 0


def test_peak_memory_is_this_process():
    peak = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(30_000_000)  # 120 MB
    assert peak_memory_bytes(torch.device("cpu")) >= 120_000_000 <= peak + held.numel() * 4
