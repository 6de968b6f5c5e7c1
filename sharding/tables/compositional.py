"""Every id has vectors of its own, put together from rows of k small tables (Shi et al., KDD 2020).

    row(x) = E_1[p_1(x)] op ... op E_k[p_k(x)]        op: element by element, or side by side

The p_i are partitions of the ids that together tell any two ids apart, so no two ids have all their rows in common:

    quotient_remainder   mixed radix: p_1 = x mod m_1, p_2 = (x // m_1) mod m_2, p_3 = (x // (m_1 m_2)) mod m_3, ...
                         unique when m_1 * ... * m_k >= ids.  k = 2 is the paper's quotient-remainder trick.
    chinese              p_i = x mod m_i, the m_i coprime in pairs: unique by the Chinese remainder theorem, likewise

    19 with sizes (8, 3): quotient_remainder 19 mod 8 = 3 and 19 // 8 = 2; chinese 19 mod 8 = 3 and 19 mod 3 = 1

A product does not commute with the sum over a bag: it is taken per id, then the bag is summed.

Options:
    op          "mult", "add" or "concat" (k parts of D/k columns).
    partition   as above.
    sizes       (m_1, ..., m_k), rows of the k tables; or
    rows        a target for their sum: m_1 is as large as it can be, the others as small as they can be; or neither:
                the fewest rows there can be, about k * ids^(1/k).
    parts       k, where no sizes are given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.errors import UserError
from kernels.hashing import LARGEST
from sharding.tables.base import Lowered, Options, Source, Table, shares, too_small
from sharding.tables.hashed import Concat, Sum

FITTED = ("rows", "sizes")
VARIANTS = (
    {},
    {"op": "mult", "parts": 3},
    {"op": "add", "partition": "chinese"},
    {"op": "concat", "rows": 20},
    {"op": "mult", "partition": "chinese", "sizes": [11, 4]},
)
FACTOR_STD = 0.3  # of the factors of a product, around 1


class Compositional(Options):
    op: Literal["mult", "add", "concat"] = "mult"
    partition: Literal["quotient_remainder", "chinese"] = "quotient_remainder"
    sizes: tuple[Annotated[int, Field(ge=1, le=LARGEST)], ...] | None = Field(default=None, min_length=2)
    rows: int | None = Field(default=None, ge=1)
    parts: int = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _check(self) -> "Compositional":
        if self.sizes is not None and self.rows is not None:
            raise ValueError(f"sizes = {list(self.sizes)} and rows = {self.rows} both say how large it is; give one")
        return self


def lower(table: Table) -> Lowered:
    options = table.read(Compositional)
    sizes = _sizes(table, options)
    dim = _dim(table, options, len(sizes))
    spread = table.rows**-0.5
    largest = sizes.index(max(sizes))
    tables, sources = [], {}
    for i, size in enumerate(sizes):
        names = {feature: f"{feature}#{i}" for feature in table.features}
        init = {"init_bound": spread * (len(sizes) ** -0.5 if options.op == "add" else 1.0)}
        if options.op == "mult" and i != largest:
            init = {"init_mean": 1.0, "init_std": FACTOR_STD}
        elif table.init_std is not None and options.op == "add":
            init = {"init_std": table.init_std * len(sizes) ** -0.5}
        tables.append(table.part(str(i), features=names.values(), rows=size, dim=dim, **init))
        for feature, name in names.items():
            sources[name] = Source(feature=feature, ids=_index(options, sizes, i))
    combine = {"mult": Product, "add": Sum, "concat": Concat}[options.op]()
    return Lowered(tables=tuple(tables), sources=sources, combine=combine, per_id=options.op == "mult")


def reference(table: Table, feature: str, id: int, weights: Mapping[str, Tensor]) -> Tensor:
    options = table.read(Compositional)
    rows = []
    rest = id
    for i, size in enumerate(_sizes(table, options)):
        rows.append(weights[f"{table.name}#{i}"][(id if options.partition == "chinese" else rest) % size])
        rest //= size
    if options.op == "concat":
        return torch.cat(rows)
    return torch.stack(rows).prod(0) if options.op == "mult" else torch.stack(rows).sum(0)


def fit(tables: Sequence[Table], budget: int) -> tuple[Table, ...]:
    found = []
    for table, share in zip(tables, shares(tables, budget), strict=True):
        kept = {k: v for k, v in table.options.items() if k not in ("rows", "sizes")}
        options = table.read(Compositional, of=kept)
        row = table.row_bytes(_dim(table, options, options.parts))
        smallest = sum(sizes_for(table.rows, options.parts, coprime=options.partition == "chinese"))
        if share < smallest * row:
            raise too_small([table], share, smallest * row, f"{smallest} rows in {options.parts} parts")
        found.append(replace(table, options={**kept, "rows": share // row}))
    return tuple(found)


def sizes_for(ids: int, parts: int, *, coprime: bool, rows: int | None = None) -> tuple[int, ...]:
    """Rows of each part, the largest first, whose product is at least `ids`.

    rows: the most they may be together, of which they use as many as they can; None: about as few as there can be.
    coprime: in pairs.  Raises ValueError when `rows` is too few.
    """
    fewest = _coprime(_balanced(ids, parts), ids) if coprime else _balanced(ids, parts)
    if rows is None:
        return fewest
    if rows < sum(fewest):  # not found out by trying: below it there may be 2**31 first sizes
        raise ValueError(f"no {parts} sizes of {rows} rows together have a product of {ids}")
    first = min(rows - parts + 1, max(ids - 1, 1))
    while first > fewest[0]:
        plain = (first, *_balanced(-(-ids // first), parts - 1))
        sizes = _coprime(plain, ids) if coprime else plain
        if sum(sizes) <= rows:
            return sizes
        first -= max(1, sum(plain) - rows)
    return fewest


def _balanced(ids: int, parts: int) -> tuple[int, ...]:
    """The sizes of about ids ** (1/parts) with the smallest sum: 20000 in 2 parts -> (142, 141)."""
    root = max(1, round(ids ** (1 / parts)))  # a float's error is a few units at most, and mended here
    while root**parts >= ids and root > 1:
        root -= 1
    while root**parts < ids:
        root += 1
    sizes = [root] * parts
    for i in reversed(range(parts)):
        while sizes[i] > 1 and math.prod(sizes) // sizes[i] * (sizes[i] - 1) >= ids:
            sizes[i] -= 1
    return tuple(sizes)


def _coprime(sizes: Sequence[int], ids: int) -> tuple[int, ...]:
    """The first size as it is and for each other the next one from it up that is coprime to those before."""
    found = [sizes[0]]
    for size in sizes[1:]:
        while any(math.gcd(size, other) > 1 for other in found):
            size += 1
        found.append(size)
    return tuple(found)


def _sizes(table: Table, options: Compositional) -> tuple[int, ...]:
    coprime = options.partition == "chinese"
    if options.sizes is None:
        try:
            return sizes_for(table.rows, options.parts, coprime=coprime, rows=options.rows)
        except ValueError:
            fewest = sum(sizes_for(table.rows, options.parts, coprime=coprime))
            raise UserError(
                f"table {table.name!r}: rows = {options.rows} in {options.parts} parts cannot tell its "
                f"{table.rows:,} ids apart; give at least rows = {fewest}, or more parts"
            ) from None
    sizes = options.sizes
    together = math.prod(sizes)
    if together < table.rows:
        largest = sizes.index(max(sizes))
        enough = -(-table.rows // (together // sizes[largest]))
        raise UserError(
            f"table {table.name!r}: sizes = {list(sizes)} make {together:,} combinations, too few to tell its "
            f"{table.rows:,} ids apart; with {enough:,} in place of {sizes[largest]:,} they would be enough, or give "
            f"rows, a target for their sum"
        )
    for i, size in enumerate(sizes) if coprime else ():
        for other in sizes[:i]:
            if math.gcd(size, other) > 1:
                raise UserError(
                    f"table {table.name!r}: sizes {other} and {size} have the common divisor {math.gcd(size, other)}, "
                    f'so that some of its {table.rows:,} ids could not be told apart; partition = "chinese" needs '
                    f"sizes that are coprime, such as {list(_coprime(sizes, table.rows))}"
                )
    return sizes


def _dim(table: Table, options: Compositional, parts: int) -> int:
    if options.op != "concat":
        return table.dim
    if table.dim % parts:
        raise UserError(
            f'table {table.name!r}: op = "concat" puts {parts} parts of D/{parts} columns side by side, but its dim is '
            f'{table.dim}; use another dim or number of parts, or op = "mult" or "add"'
        )
    return table.dim // parts


def _index(options: Compositional, sizes: Sequence[int], i: int):
    """(N,) int64 ids -> (N,) int64 rows of part i."""
    if options.partition == "chinese":
        return partial(digit, stride=1, size=sizes[i])
    return partial(digit, stride=min(math.prod(sizes[:i]), LARGEST), size=sizes[i])


def digit(ids_N: Tensor, *, stride: int, size: int) -> Tensor:
    """(x // stride) mod size, on integers throughout: 19, stride 8, size 3 -> 2."""
    return ids_N // stride % size if stride > 1 else ids_N % size


class Product(nn.Module):
    def forward(self, vectors: list[Tensor]) -> Tensor:
        product = vectors[0]
        for vector in vectors[1:]:
            product = product * vector
        return product
