"""Work on several threads that run compiled loops without Python's lock.

The threads are torch's own OpenMP team wherever its OpenMP can be asked for it: after an operator of torch's they spin
for a while, waiting for the next one, and threads of our own would have to share the cores with them.  Elsewhere they
are Python's.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

OpenMP = Callable[..., None]  # GOMP_parallel(function, data, threads, flags)
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def shares(count: int, *, work: int, enough: int = 1 << 14) -> list[tuple[int, int]]:
    """[0, count) cut into as many equal ranges as torch has threads; one when `work` is below `enough`.

    work: what the whole is worth, about one per nanosecond; waking a thread costs some microseconds.
    """
    threads = torch.get_num_threads() if work >= enough else 1
    cuts = [count * k // threads for k in range(threads + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def run(work: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """work(*part) for each, side by side; the results in the order of the parts, or the first error."""
    if len(parts) == 1:
        return [work(*parts[0])]
    # A team belongs to the thread that starts it: another thread's would be a second one, in the way of torch's.
    team = openmp() if threading.get_ident() == threading.main_thread().ident else None
    return run_on_pool(work, parts) if team is None else run_on_team(team, work, parts)


def run_on_team(team: OpenMP, work: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`run` on OpenMP's threads.  The team may be smaller than asked for, so each thread takes what is left."""
    results, errors = [None] * len(parts), []
    left = enumerate(parts)

    def body(_: int) -> None:
        try:
            for k, part in left:  # one iterator for all: its steps are made under Python's lock
                results[k] = work(*part)
        except BaseException as error:
            errors.append(error)

    team(BODY(body), None, len(parts), 0)
    if errors:
        raise errors[0]
    return results


def run_on_pool(work: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`run` on Python's threads, the first part on this one."""
    others = [_pool(len(parts) - 1).submit(work, *part) for part in parts[1:]]
    first = work(*parts[0])
    return [first, *(other.result() for other in others)]


@cache
def openmp() -> OpenMP | None:
    """What starts torch's OpenMP team: libgomp's entry point, which LLVM's and Intel's runtimes on Linux have too.

    torch loads its OpenMP with global symbols.  None where torch has another parallel backend, or where the global
    symbols are another OpenMP's, which does not know how many threads torch has.
    """
    if not torch.backends.openmp.is_available():
        return None
    symbols = ctypes.CDLL(None)
    start, threads = getattr(symbols, "GOMP_parallel", None), getattr(symbols, "omp_get_max_threads", None)
    if start is None or threads is None or threads() != torch.get_num_threads():
        return None
    start.argtypes, start.restype = (BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return start


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tablemesh-loops")
