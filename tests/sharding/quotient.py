"""A table kind for tests: row(x) is E_q[x // m] and E_r[x mod m], side by side."""

import torch
from torch import Tensor, nn

from sharding.tables.base import Lowered, Source, Table

M = 8


def lower(table: Table) -> Lowered:
    half = table.dim // 2
    sources = {}
    for feature in table.features:
        sources[f"{feature}#q"] = Source(feature=feature, ids=quotient)
        sources[f"{feature}#r"] = Source(feature=feature, ids=remainder)
    parts = (("q", -(-table.rows // M)), ("r", M))
    return Lowered(
        tables=tuple(
            Table(
                name=f"{table.name}#{part}",
                rows=rows,
                dim=half,
                features=tuple(f"{f}#{part}" for f in table.features),
                sharding=table.sharding,
            )
            for part, rows in parts
        ),
        sources=sources,
        combine=SideBySide(),
    )


def quotient(ids_N: Tensor) -> Tensor:
    return ids_N // M


def remainder(ids_N: Tensor) -> Tensor:
    return ids_N % M


class SideBySide(nn.Module):
    def forward(self, vectors: list[Tensor]) -> Tensor:
        return torch.cat(vectors, dim=1)
