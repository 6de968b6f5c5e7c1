"""What single kinds promise: ids told apart, sizes under a budget, the rule of mixed dims, errors with a way out."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import registry
from kernels.errors import UserError
from kernels.hashing import LARGEST, bucket, bucket_of, seed_of
from sharding.embeddings import lower
from sharding.initial_weights import full_table
from sharding.tables import compositional, mixed_dim, unified
from sharding.tables.base import Table

ids_to_63_bits = st.lists(st.integers(0, LARGEST), min_size=1, max_size=20)


def table(kind: str = "standard", *, name: str = "t", rows: int = 1000, dim: int = 16, **options) -> Table:
    return Table(name=name, rows=rows, dim=dim, features=(f"{name}_f",), kind=kind, options=options)


def size_of(tables) -> int:
    return sum(part.bytes for whole in tables for part in lower(whole).tables)


def rows_of(whole: Table, ids: list[int]) -> list[tuple[int, ...]]:
    """Of each id its row in every physical table."""
    lowered = lower(whole)
    columns = [source.ids(torch.tensor(ids, dtype=torch.int64)).tolist() for source in lowered.sources.values()]
    for column, part in zip(columns, lowered.tables, strict=True):
        assert all(0 <= row < part.rows for row in column)
    return list(zip(*columns, strict=True))


@given(ids_to_63_bits, st.integers(0, 2**64 - 1), st.integers(1, LARGEST))
def test_the_hash_on_tensors_is_the_hash_on_integers(ids, seed, rows):
    found = bucket(torch.tensor(ids), seed=seed, rows=rows).tolist()
    assert found == [bucket_of(i, seed=seed, rows=rows) for i in ids]


def test_the_hash_spreads_neighbours_evenly_and_its_seeds_disagree():
    rows = [bucket(torch.arange(100_000), seed=seed_of("t", j), rows=50) for j in range(2)]
    for found in rows:
        assert found.bincount(minlength=50).min() / 2000 > 0.9 and found.bincount(minlength=50).max() / 2000 < 1.1
    assert 0.01 < (rows[0] == rows[1]).float().mean() < 0.03  # 1 in 50


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 3000),
    st.sampled_from(["quotient_remainder", "chinese"]),
    st.integers(2, 4),
    st.one_of(st.none(), st.integers(0, 3000)),
)
def test_no_two_ids_have_all_their_rows_in_common(ids, partition, parts, more):
    fewest = sum(compositional.sizes_for(ids, parts, coprime=partition == "chinese"))
    target = {} if more is None else {"rows": fewest + more}
    options = {"partition": partition, "parts": parts, **target}
    whole = replace(table("compositional", rows=ids), options=options)
    assert len(set(rows_of(whole, list(range(ids))))) == ids
    total = sum(part.rows for part in lower(whole).tables)
    assert total <= target.get("rows", fewest)


@settings(max_examples=60, deadline=None)
@given(st.integers(2**31, LARGEST), st.sampled_from(["quotient_remainder", "chinese"]), st.integers(2, 4), st.data())
def test_ids_of_63_bits_are_told_apart_by_integers_alone(ids, partition, parts, data):
    whole = table("compositional", rows=ids, partition=partition, parts=parts)
    sizes = [part.rows for part in lower(whole).tables]
    assert math.prod(sizes) >= ids and sum(sizes) < 1.01 * parts * ids ** (1 / parts) + 40 * parts
    drawn = data.draw(st.lists(st.integers(0, ids - 1), min_size=1, max_size=30, unique=True))
    near = sorted({*drawn, *(min(i + 1, ids - 1) for i in drawn), ids - 1})  # a float32 takes neighbours for one
    found = rows_of(whole, near)
    assert len(set(found)) == len(near)
    for i, rows in zip(near, found, strict=True):
        for size, row in zip(sizes, rows, strict=True):
            if partition == "chinese":
                assert row == i % size
        if partition == "quotient_remainder":
            back = sum(row * math.prod(sizes[:k]) for k, row in enumerate(rows))
            assert back == i


def test_123456789_over_4_is_exact():
    """The float32 of facebookresearch/dlrm's QR trick gives 30864198."""
    whole = table("compositional", rows=2**31, sizes=[4, 2**29])
    assert rows_of(whole, [123456789]) == [(1, 30864197)]


@pytest.mark.parametrize("partition", ["quotient_remainder", "chinese"])
def test_a_target_of_rows_is_used_up(partition):
    for ids, rows in ((20_000, 5000), (20_000, 19_000), (10**9, 10**6), (997, 70)):
        coprime = partition == "chinese"
        sizes = compositional.sizes_for(ids, 2, coprime=coprime, rows=rows)
        assert math.prod(sizes) >= ids and 0.98 * rows <= sum(sizes) <= rows


def test_sizes_by_the_paper():
    assert compositional.sizes_for(20_000, 2, coprime=False) == (142, 141)
    assert compositional.sizes_for(20_000, 2, coprime=False, rows=5000) == (4995, 5)
    assert sum(compositional.sizes_for(10**6, 3, coprime=False)) == 300


def test_a_product_starts_with_factors_around_one():
    tables = lower(table("compositional", rows=20_000)).tables
    small, large = (full_table(tables[1], seed=1), full_table(tables[0], seed=1))
    assert abs(small.mean() - 1.0) < 0.05 and abs(small.std() - compositional.FACTOR_STD) < 0.05
    assert large.abs().max() <= 20_000**-0.5


def features_by(popularity, **options):
    """Tables of the given rows and look-ups per sample."""
    return [
        Table(name=f"t{i}", rows=rows, dim=16, features=(f"f{i}",), kind="mixed_dim", options=options, lookups=lookups)
        for i, (rows, lookups) in enumerate(popularity)
    ]


def test_the_rule_by_a_base_dimension():
    tables = features_by([(100, 1.0), (3000, 1.0), (10**6, 1.0), (100, 0.02)], base_dim=16, alpha=0.3)
    # 16 * 30 ** -0.3 = 5.8, 16 * 10 ** (4 * -0.3) = 1.0, 16 * 50 ** -0.3 = 4.9
    assert [t.options["dims"] for t in mixed_dim.together(tables)] == [[16], [4], [4], [4]]
    tables = features_by([(100, 1.0), (200, 1.0)], base_dim=16, alpha=0.3)  # 16 * 2 ** -0.3 = 13.0
    assert [t.options["dims"] for t in mixed_dim.together(tables)] == [[16], [12]]


def test_the_rule_under_a_budget_gives_popular_rows_more():
    tables = features_by([(100, 1.0), (3000, 1.0), (10_000, 1.0)], budget=0.5)
    settled = mixed_dim.together(tables)
    dims = [t.options["dims"][0] for t in settled]
    assert dims == sorted(dims, reverse=True) and dims[0] == 16
    full = sum(t.bytes for t in tables)
    assert 0.3 * full < size_of(settled) <= 0.5 * full


def test_blocks_by_the_frequencies_of_the_dataset():
    whole = Table(
        name="t",
        rows=20_000,
        dim=32,
        features=("f",),
        kind="mixed_dim",
        options={"base_dim": 32, "blocks": "auto"},
        lookups=1.0,
        head=((1, 0.1), (10, 0.3), (100, 0.5), (1000, 0.75)),
        by_popularity=True,
    )
    (settled,) = mixed_dim.together([whole])
    assert settled.options["blocks"] == [10, 100, 1000]
    dims = settled.options["dims"]
    # look-ups per row .03, .2/90, .25/900, .25/19000: 32 * (p / .03) ** .3 = 32, 14.6, 7.8, 2.4
    assert dims == [32, 12, 4, 4]
    assert [part.rows for part in lower(settled).tables] == [10, 90, 900, 19_000]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hashed", {}),
        ("hashed", {"seeds": 2, "combine": "concat"}),
        ("compositional", {}),
        ("compositional", {"op": "concat"}),
        ("compositional", {"partition": "chinese", "parts": 3}),
        ("mixed_dim", {}),
        ("unified", {"lookups": 2}),
    ],
)
@pytest.mark.parametrize("share", [0.6, 0.25])
def test_fit_takes_what_the_budget_allows_and_no_more(kind, options, share):
    tables = [table(kind, name=f"t{i}", rows=rows, **options) for i, rows in enumerate((1000, 400, 5000))]
    budget = int(share * sum(t.bytes for t in tables))
    found = registry.load("sharding.tables", kind).fit(tables, budget)
    assert 0.8 * budget <= size_of(found) <= budget
    features = [feature for t in found for feature in t.features]
    assert features == [feature for t in tables for feature in t.features]


def refusals():
    too_few = {"sizes": [10, 20]}
    yield lambda: lower(table("compositional", **too_few)), ["'t'", "[10, 20]", "200", "1,000", "100 in place of 20"]
    yield lambda: lower(table("compositional", rows=50, rows_target=1)), ["'t'", "rows_target"]
    yield (
        lambda: lower(table("compositional", partition="chinese", sizes=[40, 50])),
        ["'t'", "common divisor 10", "1,000", "coprime"],
    )
    yield (
        lambda: lower(Table(name="t", rows=1000, dim=16, features=("f",), kind="compositional", options={"rows": 9})),
        [
            "'t'",
            "rows = 9",
            "1,000",
            "at least rows = 64",
        ],
    )
    yield lambda: lower(table("compositional", dim=15, op="concat")), ["'t'", "15", "2 parts", "mult"]
    yield lambda: lower(table("compositional", op="sum")), ["'t'", "op", "'mult', 'add' or 'concat'"]
    yield lambda: lower(table("hashed")), ["'t'", "'rows'", "missing"]
    yield lambda: lower(table("hashed", rows_=3, seed=1)), ["'t'", "rows_", "'rows'"]
    yield (
        lambda: lower(
            Table(
                name="t",
                rows=9,
                dim=16,
                features=("f",),
                kind="hashed",
                options={"rows": 3, "hash": "modulo", "seeds": 2},
            )
        ),
        ["'t'", "modulo", "mix"],
    )
    yield (
        lambda: lower(
            Table(name="t", rows=9, dim=16, features=("f",), kind="unified", options={"rows": 3, "lookups": 3})
        ),
        ["'t'", "16", "lookups = 3"],
    )
    yield lambda: lower(table("mixed_dim")), ["'t'", "dims, base_dim and budget"]
    yield lambda: lower(table("mixed_dim", dims=[32])), ["'t'", "32", "16"]
    yield lambda: lower(table("mixed_dim", dims=[8, 4])), ["'t'", "2 values for 1 block"]
    yield lambda: lower(table("mixed_dim", base_dim=8, blocks="auto")), ["'t'", "popularity", "ordered = true", "vocab"]
    yield lambda: lower(table("mixed_dim", dims=[8, 4], blocks=[1000], ordered=True)), ["'t'", "[1000]", "1000 rows"]
    yield lambda: lower(table("mixed_dim", budget=0.2)), ["'t'", "12,800", "16,000", "0.25"]
    for kind, smallest in (("hashed", 64), ("compositional", 64 * 64), ("mixed_dim", 16_000), ("standard", 64_000)):
        fit = registry.load("sharding.tables", kind).fit
        yield lambda fit=fit, kind=kind: fit([table(kind)], 60), ["'t'", " 60 bytes", f"{smallest:,}", f"'{kind}'"]
    yield lambda: unified.fit([table("unified", lookups=2)], 16), ["'t'", " 16 bytes", "32 bytes"]
    yield (
        lambda: unified.fit([table("unified"), table("unified", name="u", dim=8)], 10_000),
        ["'t'", "'u'", "dim", "16", "8"],
    )


@pytest.mark.parametrize(("call", "words"), [pytest.param(*r, id=str(i)) for i, r in enumerate(refusals())])
def test_what_cannot_be_is_refused_with_the_numbers_and_a_way_out(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("kind", ["standard", "hashed", "compositional", "mixed_dim", "unified", "collisionless"])
def test_the_share_that_a_refused_budget_names_will_do(kind):
    fit, admits = registry.load("sharding.tables", kind).fit, {"admit_after": 3} if kind == "collisionless" else {}
    for rows in (1000, 20_000, 33_333):
        one = table(kind, rows=rows, **admits)
        with pytest.raises(UserError) as error:
            fit([one], 1)
        share = float(re.search(r"give at least ([\d.]+) of that", str(error.value))[1])
        fit([one], round(share * one.bytes))


def test_sizes_for_the_fewest_rows_are_found_at_once_for_ids_of_62_bits():
    """A search from the largest first size down would take 2**31 steps."""
    for coprime in (False, True):
        fewest = sum(compositional.sizes_for(2**62, 2, coprime=coprime))
        for more in (0, 3, 1000):
            sizes = compositional.sizes_for(2**62, 2, coprime=coprime, rows=fewest + more)
            assert math.prod(sizes) >= 2**62 and sum(sizes) <= fewest + more
            assert not coprime or math.gcd(*sizes) == 1
        with pytest.raises(ValueError, match="no 2 sizes"):
            compositional.sizes_for(2**62, 2, coprime=coprime, rows=fewest - 1)


@pytest.mark.parametrize("blocks", [{}, {"blocks": [10], "ordered": True}])
def test_projections_are_in_the_budget_of_mixed_dim(blocks):
    """Where tables are small beside D * D: 200 rows of 16 columns are 12,800 bytes, a projection to 8 of them 512."""
    tables = [table("mixed_dim", name=f"t{i}", rows=200, **blocks) for i in range(2)]
    whole = []
    for budget in range(8000, 25_600, 800):
        fitted = mixed_dim.fit(tables, budget)
        dense = sum(p.numel() * 4 for t in fitted for p in (lower(t).combine or torch.nn.Module()).parameters())
        assert size_of(fitted) <= budget and size_of(fitted) + dense <= 1.05 * budget
        whole.append(size_of(fitted) + dense)
    assert whole[-1] > 0.8 * 25_600
    with pytest.raises(UserError, match=r"6,4\d\d bytes is below .* and projections"):
        mixed_dim.fit(tables, 6450)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hashed", {"rows": 1, "seeds": 3}),
        ("hashed", {"rows": 1, "seeds": 4, "combine": "concat"}),
        ("compositional", {}),
        ("compositional", {"op": "add", "partition": "chinese", "parts": 3}),
        ("mixed_dim", {"budget": 1.0}),
        ("mixed_dim", {"base_dim": 1}),
        ("unified", {"rows": 1, "lookups": 2}),
        ("standard", {}),
    ],
)
@pytest.mark.parametrize(("rows", "dim"), [(1, 4), (1, 1), (2, 6), (3, 8)])
def test_the_smallest_tables(kind, options, rows, dim):
    """Of one id, of one column; what does not divide is refused by name."""
    small = Table(name="t", rows=rows, dim=dim, features=("f",), kind=kind, options=options)
    parts = options.get("seeds") if options.get("combine") else options.get("lookups", 1)
    if dim % parts:
        with pytest.raises(UserError, match=rf"'t'.*dim {dim} does not divide"):
            lower(small)
        return
    lowered = lower(small)
    largest = max(part.rows for part in lowered.tables)
    for source in lowered.sources.values():
        ids_N = torch.arange(rows)
        kept_N = ids_N if source.keep is None else ids_N[source.keep(ids_N)]
        rows_N = kept_N if source.ids is None else source.ids(kept_N)
        assert (rows_N >= 0).all() and (rows_N < largest).all()
    module = registry.load("sharding.tables", kind)
    weights = {t.name: full_table(t, seed=1) for t in lowered.tables}
    weights |= {name: torch.ones_like(p) for name, p in (lowered.combine or torch.nn.Module()).named_parameters()}
    for id in range(rows):
        assert module.reference(small, "f", id, weights).shape == (dim,)
