"""Arrays in recycled memory.

Fresh memory is not free: the kernel clears every page when it is first touched, and the allocators hand large blocks
back to it at once.  A loader that allocated its blocks and batches anew spent more time there than in decoding Parquet.
Here memory goes back to its pool when the last array, view or tensor on it is gone, and the next array gets it warm.
"""

import math
from collections import deque

import numpy as np

KEPT = 64  # free buffers of one size that are kept; more than are ever in use at once in a usual run
ALIGNMENT = 64  # bytes: a line of the CPU's cache


class Pool:
    """`array(shape, dtype)` is np.empty, aligned, in memory that comes back.  Safe to use from several threads.

    It keeps what was in use at the same time, no more, and frees it when the pool and the arrays are gone.
    """

    def __init__(self) -> None:
        # deque's append and pop are atomic: no lock, which a garbage collection inside it could take a second time.
        self._free: dict[int, deque[np.ndarray]] = {}

    def array(self, shape: int | tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
        return self.arrays((shape, dtype))[0]

    def arrays(self, *wanted: tuple[int | tuple[int, ...], type | np.dtype]) -> list[np.ndarray]:
        """Several at once in one piece of memory, for those that are used and dropped together."""
        starts, end = [], 0
        for shape, dtype in wanted:
            starts.append(end)
            size = (shape if isinstance(shape, int) else math.prod(shape)) * np.dtype(dtype).itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        size = _size_class(end)
        free = self._free.get(size)
        if free is None:
            free = self._free.setdefault(size, deque(maxlen=KEPT))
        try:
            raw = free.pop()
        except IndexError:
            raw = np.empty(size + ALIGNMENT, np.uint8)
            start = -raw.__array_interface__["data"][0] % ALIGNMENT
            raw = raw[start : start + size]
        whole = np.asarray(_Lease(raw, free))
        return [np.ndarray(shape, dtype, whole, start) for (shape, dtype), start in zip(wanted, starts, strict=True)]

    def copy(self, array: np.ndarray) -> np.ndarray:
        out = self.array(array.shape, array.dtype)
        out[...] = array
        return out


def _size_class(size: int) -> int:
    """The next of eight sizes per power of two, so that arrays of nearly the same size share: at most 1/8 is wasted."""
    step = 1 << max(6, (max(size, 1) - 1).bit_length() - 3)
    return -(-max(size, 1) // step) * step


class _Lease:
    """Owner of the memory under an array and all its views: numpy keeps it alive as their `base`."""

    def __init__(self, raw: np.ndarray, free: deque[np.ndarray]):
        self.__array_interface__ = raw.__array_interface__
        self._raw, self._free = raw, free

    def __del__(self) -> None:
        self._free.append(self._raw)
