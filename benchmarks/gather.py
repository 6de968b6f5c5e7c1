"""The gather loop: how fast this machine reads rows at random when nothing is done with them but adding them up."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, uint64
from torch import Tensor

from kernels.backends._vectors import add, load, prefetch, store, zeros

AHEAD = 16  # rows
DIM = 64


@njit(nogil=True, error_model="numpy")
def _read(weights, ids, first, end, out):
    total = zeros(DIM)
    for i in range(uint64(first), uint64(end)):
        if i + uint64(AHEAD) < uint64(end):
            prefetch(weights, uint64(ids[i + uint64(AHEAD)]) * uint64(DIM), DIM)
        total = add(total, load(weights, uint64(ids[i]) * uint64(DIM), DIM))
    store(out, uint64(0), total)


def gather_loop(weights_ED: Tensor, ids_N: Tensor) -> tuple[Callable[[], None], Callable[[], float]]:
    """A function that reads and adds all the rows of ids_N on torch's threads, and one that gives the sum it found."""
    weights, ids = weights_ED.view(-1).numpy(), ids_N.numpy()
    threads = torch.get_num_threads()
    cuts = [len(ids) * k // threads for k in range(threads + 1)]
    pool = ThreadPoolExecutor(threads)
    sums = [np.zeros(DIM, np.float32) for _ in range(threads)]

    def read() -> None:
        for part in [pool.submit(_read, weights, ids, *cuts[k : k + 2], sums[k]) for k in range(threads)]:
            part.result()

    return read, lambda: float(sum(part.astype(np.float64).sum() for part in sums))
