"""The exchange of pooled vectors: TorchRec's values and gradients, bit for bit, the columns in the wanted order."""

from dataclasses import replace
from itertools import accumulate

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist

from sharding.plan import embeddings_of
from sharding.pooled_exchange import PooledExchange, Run, columns_of
from tests.models import build_sharded
from tests.ranks import run_ranks
from tests.sharding.test_parallelize import FEATURES, MODEL, OPTIM, tables


def test_the_docstrings_example():
    assert columns_of([[4, 4], [8]], [0, 2, 1]) == [[Run(0, 4, 0), Run(4, 4, 12)], [Run(0, 8, 4)]]


def test_neighbours_stay_together():
    assert columns_of([[4, 8], [4]], [0, 1, 2]) == [[Run(0, 12, 0)], [Run(0, 4, 12)]]


@st.composite
def layouts(draw):
    widths = draw(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4).filter(any))
    return widths, draw(st.permutations(range(sum(map(len, widths)))))


@given(layouts())
def test_every_column_goes_where_the_order_says(layout):
    widths, order = layout
    flat = [width for of_rank in widths for width in of_rank]
    starts = list(accumulate(flat, initial=0))
    expected = torch.cat([torch.arange(starts[part], starts[part + 1]) for part in order])
    found, at = torch.full((starts[-1],), -1), 0
    for of_rank, runs in zip(widths, columns_of(widths, order), strict=True):
        block = torch.arange(at, at + sum(of_rank))
        for run in runs:
            found[run.to : run.to + run.width] = block[run.at : run.at + run.width]
        at += sum(of_rank)
    assert torch.equal(found, expected)


LAYOUTS = [
    ([[4, 8, 4], [8, 4], [4], [16]], (3, 1, 0, 6, 2, 5, 4)),  # scattered
    ([[], [4, 8], [], [4]], (0, 1, 2)),  # ranks without tables
    ([[4], [4], [4], [4]], (0, 1, 2, 3)),  # in place already
]


ROWS = [(5, 5, 5, 5), (1, 7, 0, 3)]


def _unlike(ranks):
    """The cases in which ours and TorchRec's differ in a vector or a gradient."""
    cases = [
        (c, rows, d) for c in LAYOUTS for rows in ROWS for d in (torch.float32, torch.bfloat16) if any(c[0][:ranks])
    ]
    assert len(cases) >= 8
    return [case for case in cases if not _alike(ranks, *case)]


def _alike(ranks, layout, rows, dtype):
    widths, rows = layout[0][:ranks], rows[:ranks]
    flat = [width for of_rank in widths for width in of_rank]
    order = [part for part in layout[1] if part < len(flat)]
    starts = list(accumulate(flat, initial=0))
    permuted = torch.cat([torch.arange(starts[part], starts[part + 1]) for part in order])
    rank = dist.get_rank()
    rng = torch.Generator().manual_seed(rank)
    given_BX = torch.randn(sum(rows), sum(widths[rank]), generator=rng).to(dtype)
    grad_BX = torch.randn(rows[rank], starts[-1], generator=rng).to(dtype)
    context = EmbeddingShardingContext(batch_size_per_rank=list(rows))
    found = []
    for exchange, places in (
        (PooledExchange(dist.group.WORLD, widths=widths, order=order), slice(None)),
        (TwPooledEmbeddingDist(dist.group.WORLD, [sum(w) for w in widths], widths), permuted),
    ):
        vectors = given_BX.clone().requires_grad_()
        out_BX = exchange(vectors, context).wait()[:, places]
        out_BX.backward(grad_BX)
        found.append((out_BX.detach(), vectors.grad))
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_torchrecs_values_and_gradients(ranks):
    assert run_ranks(_unlike, ranks, ranks) == [[]] * ranks


def _keys(shardings):
    mixed = tuple(replace(t, sharding=s) for t, s in zip(tables("auto"), shardings, strict=True))
    built = build_sharded(mixed, FEATURES, MODEL, OPTIM, dense=4, tasks=2, pipeline="plain", kernel="cpu")
    ebc = embeddings_of(built.dmp.module).ebc
    exchanges = [type(exchange).__name__ for exchange in ebc._output_dists]
    return list(ebc._embedding_names), exchanges, [name for t in mixed for name in t.features]


def test_columns_stand_in_the_order_of_the_tables():
    for shardings in (["table_wise"] * 4, ["column_wise"] * 4):
        for names, exchanges, wanted in run_ranks(_keys, 2, shardings):
            assert exchanges == ["PooledExchange"]
            assert names == wanted
    for _, exchanges, _ in run_ranks(_keys, 2, ["row_wise", "table_wise", "column_wise", "table_wise"]):
        assert exchanges.count("PooledExchange") == 2
        assert len(exchanges) == 3
