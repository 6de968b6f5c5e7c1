"""Initial weights depend on (seed, table, row, column) and on nothing else."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sharding.initial_weights import block_rows, fill_shard, full_table
from sharding.tables.base import Table

# 48-wide rows: blocks of 1365 rows, so 3000 rows are three blocks, the last one short.
TABLE = Table(name="t", rows=3000, dim=48, features=("f",))
WHOLE = {std: full_table(dataclasses.replace(TABLE, init_std=std), seed=5) for std in (None, 0.1)}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
    columns=st.tuples(st.integers(0, 48), st.integers(0, 48)),
    std=st.sampled_from([None, 0.1]),
)
def test_a_shard_is_a_piece_of_the_whole_table(rows, columns, std):
    (r0, r1), (c0, c1) = sorted(rows), sorted(columns)
    shard = torch.full((r1 - r0, c1 - c0), torch.nan)
    fill_shard(shard, dataclasses.replace(TABLE, init_std=std), seed=5, row=r0, column=c0)
    assert torch.equal(shard, WHOLE[std][r0:r1, c0:c1])


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_matter(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(full_table(TABLE, seed=5), WHOLE[None])
    finally:
        torch.set_num_threads(before)


def test_seed_and_name_matter():
    assert block_rows(48) < 1500
    others = [full_table(TABLE, seed=6), full_table(dataclasses.replace(TABLE, name="u"), seed=5)]
    for other in others:
        assert (other != WHOLE[None]).float().mean() > 0.99
    first, second = WHOLE[None][: block_rows(48)], WHOLE[None][block_rows(48) : 2 * block_rows(48)]
    assert (first != second).float().mean() > 0.99


def test_the_distribution_is_the_one_asked_for():
    bound = (1 / 3000) ** 0.5
    uniform, normal = WHOLE[None], WHOLE[0.1]
    assert uniform.min() >= -bound and uniform.max() <= bound
    assert abs(uniform.mean()) < 0.01 * bound and abs(uniform.std() / (bound / 3**0.5) - 1) < 0.01
    assert abs(normal.mean()) < 0.001 and abs(normal.std() / 0.1 - 1) < 0.01


def test_columns_beyond_the_dim_are_zero():
    table = Table(name="t", rows=10, dim=6, features=("f",))
    shard = torch.full((10, 4), torch.nan)
    fill_shard(shard, table, seed=1, row=0, column=4)
    assert torch.equal(shard[:, :2], full_table(table, seed=1)[:, 4:]) and (shard[:, 2:] == 0).all()
    fill_shard(shard, table, seed=1, row=0, column=8)
    assert (shard == 0).all()


def test_the_numbers_stay_what_they_were():
    """A run from an old seed can be repeated: these values are part of what tablemesh promises."""
    weights_ED = full_table(Table(name="golden", rows=4, dim=2, features=("f",)), seed=1)
    torch.testing.assert_close(weights_ED, GOLDEN, rtol=0, atol=0)


GOLDEN = torch.tensor(
    [
        [0.116371453, -0.248327494],
        [0.111020148, 0.162270606],
        [0.168637574, -0.362618506],
        [-0.0923944712, -0.343170941],
    ]
)
