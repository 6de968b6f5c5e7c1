"""Metrics over real ranks: the figures of one process that saw all rows."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.metrics import Metrics

CUTS = {2: [0, 1, 1000], 4: [0, 0, 300, 999, 1000]}  # ranks with no row and with one row among them


def drawn(rows: int, seed: int, scale: float = 1.5, tasks: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (rows, tasks), labels drawn from them, and weights of which a fifth is 0."""
    g = torch.Generator().manual_seed(seed)
    logits_BT = scale * torch.randn(rows, tasks, generator=g) - 1
    labels_BT = (torch.rand(rows, tasks, generator=g) < torch.sigmoid(logits_BT)).float()
    weight_B = torch.rand(rows, generator=g) * 3 * (torch.rand(rows, generator=g) > 0.2)
    return logits_BT, labels_BT, weight_B


def whole_weights(rows: int, seed: int, tasks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integer weights: their float64 sums are exact in any order, so AUC must be equal to the last bit."""
    logits_BT, labels_BT, weight_B = drawn(rows, seed, tasks=tasks)
    return logits_BT, labels_BT, weight_B.round()


def reduce_on_a_rank() -> dict[str, Any]:
    rank, cuts = dist.get_rank(), CUTS[dist.get_world_size()]
    mine = slice(cuts[rank], cuts[rank + 1])
    metrics = Metrics(["a", "b"])
    metrics.update(*(part[mine] for part in whole_weights(1_000, seed=9, tasks=2)))
    before = metrics.compute()
    total = metrics.all_reduce().compute()
    assert metrics.compute() == before, "reducing changed the running state"
    assert metrics.all_reduce().compute() == total, "a second reduction gives something else"
    metrics.update(torch.full((1, 2), math.nan if rank == 0 else 0.0), torch.zeros(1, 2))
    with pytest.raises(FloatingPointError, match="task 'a': 1 rows"):
        metrics.all_reduce().compute()
    return total


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_figures_of_all_rows(world_size):
    totals = run_ranks(reduce_on_a_rank, world_size)
    alone = Metrics(["a", "b"])
    alone.update(*whole_weights(1_000, seed=9, tasks=2))
    expected = alone.compute()
    for total in totals:
        assert total == totals[0]
        for task in ("a", "b"):
            for key in ("auc", "auc_error_bound", "rows"):
                assert total["tasks"][task][key] == expected["tasks"][task][key]
            for key in ("ne", "logloss", "calibration"):
                assert total["tasks"][task][key] == pytest.approx(expected["tasks"][task][key], rel=1e-12)
