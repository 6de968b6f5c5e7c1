"""Work on several threads that run compiled loops without Python's lock."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def shares(count: int, *, work: int, enough: int = 1 << 14) -> list[tuple[int, int]]:
    """[0, count) cut into as many equal ranges as torch has threads; one when `work` is below `enough`.

    work: what the whole is worth, about one per nanosecond; waking a thread costs some microseconds.
    """
    threads = torch.get_num_threads() if work >= enough else 1
    cuts = [count * k // threads for k in range(threads + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def run(work: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """work(*part) for each, the first on this thread and the others beside it."""
    if len(parts) == 1:
        return [work(*parts[0])]
    others = [_pool(len(parts) - 1).submit(work, *part) for part in parts[1:]]
    first = work(*parts[0])
    return [first, *(other.result() for other in others)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tablemesh-loops")
