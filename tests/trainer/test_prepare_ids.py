"""Keys, vocabulary, hash and quantile samples against slow twins in plain Python."""

from collections import Counter as PlainCounter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.prepare import ids as module
from trainer.prepare.ids import Counter, Sample, Vocabulary, hash_keys, keys_of, mix64

MASK = 2**64 - 1


def plain_mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_hash(text: bytes) -> int:
    h = plain_mix(len(text))
    for i in range(0, len(text), 8):
        h = plain_mix(h ^ int.from_bytes(text[i : i + 8], "little"))
    return h


def test_mix_is_splitmix64():
    assert int(mix64(0)) == 0xE220A8397B1DCDAF == plain_mix(0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.binary(max_size=30)), st.integers(0, 3))
def test_text_keys_are_the_documented_hash(values, start):
    array = pa.array(values, pa.binary())[start:]
    keys, present, bad = keys_of(array)
    assert bad is None
    assert keys.tolist() == [plain_hash(v) if v is not None else 0 for v in values[start:]]
    expected = [v is not None for v in values[start:]]
    assert (present.tolist() if present is not None else [True] * len(expected)) == expected
    large, _, _ = keys_of(array.cast(pa.large_binary()))
    assert large.tolist() == keys.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.none() | st.text("0123456789abcdefABCDEF", max_size=18) | st.sampled_from(["zz", "12 4", "0123456g"]))
)
def test_hex_keys_are_the_numbers_written(values):
    keys, present, bad = keys_of(pa.array(values, pa.string()), hex=True)
    for i, value in enumerate(values):
        good = value is not None and 1 <= len(value) <= 16 and all(c in "0123456789abcdefABCDEF" for c in value)
        assert int(keys[i]) == (int(value, 16) if good else 0)
        assert bool(bad is not None and bad[i]) == (value is not None and not good)
        assert present is None or present[i] == (value is not None)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers_are_their_own_keys(values):
    assert keys_of(pa.array(values, pa.int64()))[0].tolist() == [v & MASK for v in values]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30) | st.integers(0, MASK), max_size=200),
    st.lists(st.integers(0, MASK), max_size=20),
    st.integers(1, 4),
    st.none() | st.integers(2, 20),
)
def test_vocabulary_orders_by_count_then_key(values, others, min_count, limit):
    counter = Counter()
    for start in range(0, len(values), 7):
        counter.add(np.array(values[start : start + 7], np.uint64))
    vocabulary = Vocabulary(*counter.result(), min_count=min_count, limit=limit)
    ranked = sorted(((-n, v) for v, n in PlainCounter(values).items() if n >= min_count))
    ranked = ranked[: limit - 1] if limit is not None else ranked
    expected = {v: i + 1 for i, (_, v) in enumerate(ranked)}
    asked = [*values, *others, 0, MASK]
    assert vocabulary.look_up(np.array(asked, np.uint64)).tolist() == [expected.get(v, 0) for v in asked]
    assert vocabulary.cardinality == len(expected) + 1
    assert vocabulary.counts.tolist() == [-n for n, _ in ranked]
    assert vocabulary.unseen == len(values) - sum(-n for n, _ in ranked)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, MASK), min_size=1), st.integers(2, 2**40), st.integers(0, 2**63 - 1))
def test_hash_stays_in_range_and_is_the_documented_one(values, rows, seed):
    ids = hash_keys(np.array(values, np.uint64), rows=rows, seed=seed)
    assert ids.tolist() == [1 + plain_mix(v ^ plain_mix(seed)) % (rows - 1) for v in values]
    assert (ids >= 1).all() and (ids < rows).all()


def test_hash_is_even_and_depends_on_the_seed():
    values = np.arange(100_000, dtype=np.uint64)
    first, second = (hash_keys(values, rows=101, seed=seed) for seed in (0, 1))
    counts = np.bincount(first, minlength=101)[1:]
    assert counts.min() > 800 and counts.max() < 1200  # 1000 each, standard deviation 31
    assert abs((first == second).mean() - 0.01) < 0.005


def test_counter_merges_alike_from_many_threads(monkeypatch):
    monkeypatch.setattr(Counter, "_PENDING", 500)
    values = np.random.default_rng(0).zipf(1.2, 50_000).astype(np.uint64)
    counter = Counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(counter.add, np.array_split(values, 97)))
    keys, counts = counter.result()
    expected_keys, expected_counts = np.unique(values, return_counts=True)
    assert keys.tolist() == expected_keys.tolist() and counts.tolist() == expected_counts.tolist()


def test_sample_does_not_depend_on_order_and_is_exact_while_small():
    rng = np.random.default_rng(0)
    keys, numbers = rng.integers(0, 2**64, 5000, dtype=np.uint64), rng.normal(size=5000)
    forwards, backwards, small = Sample(limit=1000), Sample(limit=1000), Sample()
    for part in np.array_split(np.arange(5000), 13):
        forwards.add(keys[part], numbers[part])
        small.add(keys[part], numbers[part])
    for part in reversed(np.array_split(np.arange(5000), 7)):
        backwards.add(keys[part], numbers[part])
    shares = [0.1, 0.5, 0.9]
    assert forwards.quantiles(shares).tolist() == backwards.quantiles(shares).tolist()
    assert 500 < forwards.size <= 1000
    ordered = np.sort(numbers)
    assert small.quantiles(shares).tolist() == [ordered[500], ordered[2500], ordered[4500]]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_vocabulary_of_any_size_finds_its_keys(size):
    keys = np.arange(size, dtype=np.uint64) * np.uint64(module._GOLDEN)
    vocabulary = Vocabulary(np.sort(keys), np.ones(size, np.int64))
    assert sorted(vocabulary.look_up(keys).tolist()) == list(range(1, size + 1))
    assert vocabulary.look_up(keys + np.uint64(1)).tolist() == [0] * size
