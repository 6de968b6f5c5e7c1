"""Initial embedding weights as a pure function of (seed, table, row, column).

The same numbers come out whatever the sharding, the world size and the device, so a run may be compared with any other
one.  A table is drawn in blocks of whole rows, each from its own counter-based generator (Philox, key = seed and table
name, counter = block); a shard draws the blocks its rows lie in and keeps its rows and columns of them.

Shapes: E rows, D columns of the whole table; a shard has rows [r0, r1) and columns [c0, c1) of it.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sharding.tables.base import Table

BLOCK_VALUES = 1 << 16  # 256 KiB of float32: small beside any table, large beside the cost of a generator


def block_rows(dim: int) -> int:
    """Rows of one block: a function of D alone."""
    return max(1, BLOCK_VALUES // dim)


@torch.no_grad()
def fill_shard(shard: Tensor, table: Table, *, seed: int, row: int = 0, column: int = 0) -> None:
    """Fill the shard of `table` that begins at (row, column), in place.

    shard: (rows, columns) on any device.  Columns from D on are padding and become zero.
    """
    rows, columns = shard.shape
    if columns > max(0, table.dim - column):
        shard[:, max(0, table.dim - column) :] = 0.0
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
        part = values[low - start : high - start, column : column + columns]
        shard[low - row : high - row, :columns].copy_(torch.from_numpy(part))

    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        for _ in pool.map(fill, range(first, last + 1)):
            pass


def full_table(table: Table, *, seed: int) -> Tensor:
    """The whole table's initial weights, (E, D) float32 on the CPU."""
    weights_ED = torch.empty(table.rows, table.dim)
    fill_shard(weights_ED, table, seed=seed)
    return weights_ED


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
