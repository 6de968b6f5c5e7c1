"""Planted data: Bayes figures against brute force and scikit-learn, determinism, what the rows look like."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from kernels.errors import UserError
from trainer.data import synthetic
from trainer.data.synthetic import CHUNK_ROWS, Criteo, CriteoOptions, Zipf4, Zipf4Options, bayes_of, share_out
from trainer.prepare import prepare


def brute_force(p: np.ndarray) -> float:
    """Expected AUC by all ordered pairs of different rows."""
    weight = p[:, None] * (1.0 - p[None, :])
    np.fill_diagonal(weight, 0.0)
    wins = (p[:, None] > p[None, :]) + 0.5 * (p[:, None] == p[None, :])
    return float((weight * wins).sum() / weight.sum())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.9]) | st.floats(0.001, 0.999), min_size=2, max_size=60))
def test_expected_auc_is_the_sum_over_all_pairs(values):
    p = np.array(values)
    found = bayes_of(p, np.arange(len(p)) % 2 == 0)
    assert found.auc == pytest.approx(brute_force(p), abs=1e-12)
    assert found.logloss == pytest.approx(-np.mean(p * np.log(p) + (1 - p) * np.log(1 - p)), abs=1e-12)


def test_the_docstring_s_example():
    assert bayes_of(np.array([0.2, 0.8]), np.array([False, True])).auc == pytest.approx(0.64 / 0.68)


def test_sample_figures_are_those_of_scikit_learn_and_near_the_expected_ones():
    rng = np.random.default_rng(0)
    p = np.round(rng.beta(1, 3, 50_000), 3).clip(0.001, 0.999)  # rounded: many ties
    y = rng.random(50_000) < p
    found = bayes_of(p, y)
    assert found.sample_auc == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert found.sample_logloss == pytest.approx(log_loss(y, p), abs=1e-12)
    assert found.auc == pytest.approx(found.sample_auc, abs=0.01)
    assert found.logloss == pytest.approx(found.sample_logloss, abs=0.01)


@pytest.mark.parametrize("kind", ["zipf4", "criteo"])
def test_output_depends_on_the_seed_alone(tmp_path, kind):
    rows = 3 * CHUNK_ROWS + 17
    made = {
        (threads, seed): prepare(
            f"synthetic:{kind}",
            tmp_path / f"{threads}-{seed}",
            options={"rows": rows, "threads": threads, "seed": seed},
        )
        for threads, seed in ((1, 1), (4, 1), (2, 2))
    }
    assert made[1, 1].fingerprint == made[4, 1].fingerprint != made[2, 2].fingerprint
    assert made[1, 1].bayes == made[4, 1].bayes
    assert sum(s.rows for s in made[1, 1].splits.values()) == rows
    for split, figures in made[1, 1].bayes.items():
        assert figures.auc == pytest.approx(figures.sample_auc, abs=0.02), split
    labels = pq.read_table(tmp_path / "1-1" / "train", columns=["label"])["label"].to_numpy()
    assert labels.mean() == pytest.approx(made[1, 1].positive_rate["label"])


def test_splits_are_stretches_of_one_sequence(tmp_path):
    prepare("synthetic:zipf4", tmp_path / "o", options={"rows": 50_000, "seed": 3})
    parts = [pq.read_table(tmp_path / "o" / split) for split in ("train", "test")]
    assert [len(p) for p in parts] == [40_000, 10_000]
    planted = Zipf4(Zipf4Options(seed=3))
    chunks = [planted.chunk(c, CHUNK_ROWS).columns for c in range(2)]
    for name in ("label", "f0", "f3"):
        whole = np.concatenate([chunk[name].to_numpy() for chunk in chunks])[:50_000]
        assert (np.concatenate([part[name].to_numpy() for part in parts]) == whole).all()


def test_zipf4_is_the_model_it_says():
    planted = Zipf4(Zipf4Options())
    chunk = planted.chunk(0, CHUNK_ROWS)
    ids = [chunk.columns[f"f{f}"].to_numpy() for f in range(4)]
    for row in range(20):
        i = [int(column[row]) for column in ids]
        v = [planted._vector[f][i[f]] for f in range(4)]
        logit = 0.8 * sum(planted._bias[f][i[f]] for f in range(4)) + 1.5 * (v[0] @ v[1] + v[2] @ v[3]) - 0.5
        assert chunk.probability_N[row] == pytest.approx(1.0 / (1.0 + np.exp(-logit)))
    mass = np.arange(1, 20_001) ** -1.05
    top = planted._id_of_rank[0][:3]
    shares = [(ids[0] == i).mean() for i in top]
    assert shares == pytest.approx((mass / mass.sum())[:3], abs=0.01)
    assert planted._bias.std() == pytest.approx(1.0, abs=0.02) and planted._vector.std() == pytest.approx(0.5, abs=0.01)
    assert bayes_of(chunk.probability_N, chunk.label_N).auc == pytest.approx(0.8425, abs=0.01)


def test_criteo_looks_like_criteo(tmp_path):
    dataset = prepare("synthetic:criteo", tmp_path / "o", options={"rows": 60_000, "seed": 1})
    assert len(dataset.dense) == 13 and len(dataset.categorical) == 26
    assert 0.2 < dataset.positive_rate["label"] < 0.3
    assert 0.79 < dataset.bayes["test"].auc < 0.84
    multi_hot = [c for c in dataset.categorical if c.multi_hot]
    assert [c.name for c in multi_hot] == list(Criteo.MULTI_HOT)
    table = pq.read_table(tmp_path / "o" / "train")
    for feature in dataset.categorical:
        ids = table[feature.name].combine_chunks()
        ids = ids.flatten() if feature.multi_hot else ids.drop_null()
        found = np.bincount(ids.to_numpy(), minlength=feature.cardinality)
        assert len(found) == feature.cardinality and feature.stats.distinct == np.count_nonzero(found)
        assert feature.stats.top_share["1"] == pytest.approx(found.max() / found.sum())
        assert feature.stats.missing == table[feature.name].null_count
        share = Criteo.MISSING.get(feature.name, 0.0)
        assert feature.stats.missing / feature.stats.rows == pytest.approx(share, abs=0.02)
    for i, dense in enumerate(dataset.dense):
        x = table[dense.name].to_numpy()
        assert dense.missing == (x == 0).sum() and np.isfinite(x).all()
        assert dense.missing / len(x) == pytest.approx(Criteo.DENSE_MISSING[i], abs=0.02)
        assert dense.mean == pytest.approx(x.mean(dtype=np.float64)) and dense.std == pytest.approx(
            x.std(dtype=np.float64)
        )


def test_scale_sets_the_cardinalities():
    small, large = (Criteo(CriteoOptions(scale=scale)).features for scale in (0.0001, 0.01))
    assert small["C3"] == 1013 and large["C3"] == 101312
    assert small["C9"] == large["C9"] == 3


def test_shares_keep_every_row_and_refuse_an_empty_split():
    assert share_out(11, (("train", 0.8), ("valid", 0.1), ("test", 0.1))) == {"train": 9, "valid": 1, "test": 1}
    with pytest.raises(UserError, match="rows = 3 leaves no row for the split"):
        share_out(3, (("train", 0.8), ("valid", 0.1), ("test", 0.1)))


def test_a_chunk_has_the_columns_in_the_order_of_the_schema():
    chunk = Criteo(CriteoOptions(scale=0.0001)).chunk(0, 100)
    assert list(chunk.columns) == ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    assert all(len(column) == 100 for column in chunk.columns.values())
    assert chunk.columns["C3"].type == pa.list_(pa.field("item", pa.int32(), nullable=False))
    assert set(synthetic.KINDS) == {"criteo", "zipf4"}
