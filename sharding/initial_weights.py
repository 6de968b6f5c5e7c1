"""Initial embedding weights as a pure function of (seed, table, row, column).

The same numbers come out whatever the sharding, the world size and the device, so a run may be compared with any other
one.  A table is drawn in blocks of whole rows, each from its own counter-based generator (Philox, key = seed and table
name, counter = block); a shard draws the blocks its rows lie in and keeps its rows and columns of them.

A row that is given to an id while training runs (sharding/by_id.py) begins with numbers that are a function of (seed,
table, id, column): `fresh_rows`.

Shapes: E rows, D columns of the whole table; a shard has rows [r0, r1) and columns [c0, c1) of it.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from kernels.hashing import mix64, seed_of
from kernels.int8 import quantise
from sharding.tables.base import Table

BLOCK_VALUES = 1 << 16  # 256 KiB of float32: small beside any table, large beside the cost of a generator


def block_rows(dim: int) -> int:
    """Rows of one block: a function of D alone."""
    return max(1, BLOCK_VALUES // dim)


@torch.no_grad()
def fill_shard(
    shard: Tensor, table: Table, *, seed: int, row: int = 0, column: int = 0, scales: Tensor | None = None
) -> None:
    """Fill the shard of `table` that begins at (row, column), in place.

    shard: (rows, columns) on any device.  Columns from D on are padding and become zero.
    scales: (rows,) of a shard of int8, filled too: the values are then rounded to the nearest that such a row has.
    """
    rows, columns = shard.shape
    if columns > max(0, table.dim - column):
        shard[:, max(0, table.dim - column) :] = 0
        columns = max(0, table.dim - column)
    if not rows or not columns:
        return
    per_block = block_rows(table.dim)
    first, last = row // per_block, (row + rows - 1) // per_block
    key = hashlib.blake2b(f"{seed}/{table.name}".encode(), digest_size=16).digest()

    def fill(block: int) -> None:
        start = block * per_block
        values = _block(table, np.frombuffer(key, dtype=np.uint64), block, min(per_block, table.rows - start))
        low, high = max(row, start), min(row + rows, start + len(values))
        part = torch.from_numpy(values[low - start : high - start, column : column + columns])
        if scales is not None:
            part, scale = quantise(part)
            scales[low - row : high - row].copy_(scale)
        shard[low - row : high - row, :columns].copy_(part)

    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        for _ in pool.map(fill, range(first, last + 1)):
            pass


def full_table(table: Table, *, seed: int) -> Tensor:
    """The whole table's initial weights, (E, D) float32 on the CPU."""
    weights_ED = torch.empty(table.rows, table.dim)
    fill_shard(weights_ED, table, seed=seed)
    return weights_ED


def fresh_rows(table: Table, ids_K: Tensor, *, seed: int) -> Tensor:
    """(K, D) float32 for (K,) int64 ids: element d of an id is drawn from the bits of mix64(mix64(id ^ key) + d * G),
    24 of them uniform in [0, 1), or two times 24 for a normal number (Box and Muller, 1958): on another device that one
    may differ in the last bit, as logarithm and cosine do."""
    return _drawn(table, ids_K, seed_of(seed, table.name, "rows"))


def default_row(table: Table, *, seed: int) -> Tensor:
    """(D,) float32: the row that all ids share which have none of their own."""
    return _drawn(table, torch.zeros(1, dtype=torch.int64), seed_of(seed, table.name, "default row"))[0]


def _drawn(table: Table, ids_K: Tensor, key: int) -> Tensor:
    key_K1 = mix64(ids_K ^ _as_signed(key))[:, None]
    bits_KD = mix64(key_K1 + torch.arange(table.dim, device=ids_K.device) * _as_signed(0x9E3779B97F4A7C15))
    high_KD, low_KD = (bits_KD >> 40) & 0xFFFFFF, (bits_KD >> 8) & 0xFFFFFF
    if table.init_std is not None:
        radius_KD = (-2 * ((high_KD + 1).float() / (1 << 24)).log()).sqrt()
        return table.init_mean + table.init_std * radius_KD * (low_KD.float() * (2 * math.pi / (1 << 24))).cos()
    bound = math.sqrt(1.0 / table.rows) if table.init_bound is None else table.init_bound
    return (table.init_mean - bound) + 2 * bound * (high_KD.float() / (1 << 24))


def _as_signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _block(table: Table, key: np.ndarray, block: int, rows: int) -> np.ndarray:
    """(rows, D) float32 of one block."""
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, block, 0]))
    if table.init_std is not None:
        values = generator.standard_normal((rows, table.dim), dtype=np.float32)
        values *= np.float32(table.init_std)
        values += np.float32(table.init_mean)
        return values
    bound = np.float32(math.sqrt(1.0 / table.rows) if table.init_bound is None else table.init_bound)
    values = generator.random((rows, table.dim), dtype=np.float32)
    values *= 2 * bound
    values += np.float32(table.init_mean) - bound
    return values
