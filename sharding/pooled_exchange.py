"""The all-to-all of pooled vectors between the ranks of a CPU job: one copy each way, where TorchRec makes four.

    look-up's (B_all, X_own)  --all-to-all-->  a block (B, X_r) from every rank r  --placed-->  out_BX

TorchRec copies what it sends into a buffer of its own, joins the blocks of the ranks side by side, and permutes their
columns into the order of the features; its backward does the same the other way round and divides in a pass of its
own.  On a CPU each of these is a pass through memory that costs as much as the exchange.  Here rows are sent from
where the look-up left them, and the columns of a block are copied straight to their final places; the backward copies
gradients out of their places, divided by the number of ranks (as TorchRec does: the tables' update is that of the mean
over the global batch).

It takes the place of TorchRec's TwPooledEmbeddingDist for the types whose vectors are whole on one rank, or cut by
columns: table_wise, column_wise, table_column_wise.  The values are those of TorchRec's, bit for bit.

`columns_of` for two ranks, tables a (4 columns) and c (4) on rank 0, b (8) on rank 1, wanted in the order a b c:

    rank 0's block holds [a c], rank 1's [b]; out_BX holds [a b c]
    -> [[Run(at=0, width=4, to=0), Run(at=4, width=4, to=12)], [Run(at=0, width=8, to=4)]]

Shapes: B rows of this rank, B_all of all ranks, X columns of all features, X_r of those on rank r.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.types import Awaitable


@dataclass(frozen=True)
class Run:
    """Columns that stay together: [at, at + width) of a rank's block are [to, to + width) of out_BX."""

    at: int
    width: int
    to: int


def columns_of(widths: Sequence[Sequence[int]], order: Sequence[int]) -> list[list[Run]]:
    """The runs of each rank's block.

    widths: per rank, the columns of each part of a table that it holds.  order: the parts, numbered rank by rank, in
    the order of their columns in out_BX.
    """
    flat = [width for of_rank in widths for width in of_rank]
    assert sorted(order) == list(range(len(flat))), "every part once"
    starts = dict(zip(order, accumulate((flat[part] for part in order), initial=0), strict=False))
    found, part = [], 0
    for of_rank in widths:
        runs: list[Run] = []
        at = 0
        for width in of_rank:
            to = starts[part]
            if runs and runs[-1].to + runs[-1].width == to:
                runs[-1] = Run(runs[-1].at, runs[-1].width + width, runs[-1].to)
            else:
                runs.append(Run(at, width, to))
            at += width
            part += 1
        found.append(runs)
    return found


class PooledExchange(nn.Module):
    """In the place of TorchRec's TwPooledEmbeddingDist; widths, order: see `columns_of`."""

    def __init__(self, pg: dist.ProcessGroup, *, widths: Sequence[Sequence[int]], order: Sequence[int]) -> None:
        super().__init__()
        self.pg = pg
        self.rank, self.ranks = dist.get_rank(pg), dist.get_world_size(pg)
        self.widths = [sum(of_rank) for of_rank in widths]
        self.runs = columns_of(widths, order)

    def forward(self, vectors: Tensor, context: EmbeddingShardingContext | None = None) -> "Exchanged":
        """vectors: (B_all, X_own), the rows of rank 0, of rank 1, ...  The awaitable gives out_BX."""
        rows = list(context.batch_size_per_rank) if context is not None else []
        rows = rows or [vectors.shape[0] // self.ranks] * self.ranks
        assert sum(rows) == vectors.shape[0], "the rows of all ranks, one stride for all features"
        exchange = _Exchange(self, rows)
        return Exchanged(exchange, _Start.apply(exchange, vectors))


class Exchanged(Awaitable[Tensor]):
    """out_BX, once all ranks' blocks are there."""

    def __init__(self, exchange: "_Exchange", started: Tensor) -> None:
        super().__init__()
        self._exchange, self._started = exchange, started

    def _wait_impl(self) -> Tensor:
        return _Finish.apply(self._exchange, self._started)


class _Exchange:
    """What one forward and its backward share; at most one all-to-all of it is under way."""

    def __init__(self, owner: PooledExchange, rows: list[int]) -> None:
        self.owner, self.rows = owner, rows
        self.work: Any = None
        self.received: Tensor | None = None

    def start(self, sent: Tensor, *, send: list[int], receive: list[int]) -> None:
        """sent: flat, send[r] numbers for rank r; receive[r] come from it."""
        assert self.work is None
        self.received = sent.new_empty(sum(receive))
        self.work = dist.all_to_all_single(
            self.received, sent, receive, send, group=self.owner.pg, async_op=True
        )  # holds both until it is waited for

    def finish(self) -> Tensor:
        work, received = self.work, self.received
        assert work is not None and received is not None
        self.work = self.received = None
        work.wait()
        return received

    @property
    def own(self) -> int:
        """B."""
        return self.rows[self.owner.rank]

    def of_blocks(self) -> list[int]:
        """Numbers in the blocks (B, X_r)."""
        return [self.own * width for width in self.owner.widths]

    def of_rows(self) -> list[int]:
        """Numbers in the parts (B_r, X_own) of what the look-up gives."""
        return [rows * self.owner.widths[self.owner.rank] for rows in self.rows]

    def blocks(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.of_blocks())
        return [part.view(self.own, width) for part, width in zip(parts, self.owner.widths, strict=True)]


class _Start(torch.autograd.Function):
    """Sends the vectors; its backward waits for their gradients.  The result stands for what is on its way."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, vectors: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.start(vectors.reshape(-1), send=exchange.of_rows(), receive=exchange.of_blocks())
        return vectors.new_empty(1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        exchange = ctx.exchange
        return None, exchange.finish().view(sum(exchange.rows), exchange.owner.widths[exchange.owner.rank])


class _Finish(torch.autograd.Function):
    """Waits for the blocks and puts their columns into place; its backward sends the gradients off."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, started: Tensor) -> Tensor:
        ctx.exchange = exchange
        owner = exchange.owner
        flat = exchange.finish()
        out_BX = flat.new_empty(exchange.own, sum(owner.widths))
        for block, runs in zip(exchange.blocks(flat), owner.runs, strict=True):
            for run in runs:
                out_BX[:, run.to : run.to + run.width].copy_(block[:, run.at : run.at + run.width])
        ctx.save_for_backward(started)
        return out_BX

    @staticmethod
    def backward(ctx: Any, grad_BX: Tensor) -> tuple[None, Tensor]:
        exchange = ctx.exchange
        owner = exchange.owner
        flat = grad_BX.new_empty(exchange.own * sum(owner.widths))
        divisor = owner.ranks if get_gradient_division() else 1
        for block, runs in zip(exchange.blocks(flat), owner.runs, strict=True):
            for run in runs:
                of_run = grad_BX[:, run.to : run.to + run.width]
                torch.div(of_run, divisor, out=block[:, run.at : run.at + run.width])
        exchange.start(flat, send=exchange.of_blocks(), receive=exchange.of_rows())
        return None, ctx.saved_tensors[0]
