"""Numba's njit as all compiled loops here have it: without the GIL, and kept on disk for processes that come at once.

Numba numbers the files of a function's signatures: the next number that is free in its index.  Two processes that add a
signature each at the same time take the same number, and from then on the one's calls find what was compiled for the
other: for rows of another width, say, which nothing notices.  Here a file is named after the bytes of the key that is
in it.  They can differ from process to process, and nothing is written over, so a folder keeps the files of earlier
versions of the source until somebody clears it.

Imports Numba, so it is imported with the loops and not before.
"""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any

import numba
from numba.core.caching import IndexDataCacheFile


def njit(function: Callable | None = None, **options: Any) -> Any:
    """A decorator, with options of Numba's or bare."""
    if function is None:
        return partial(njit, **options)
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        made = numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder for the cache can be written to
        return numba.njit(function, **options)
    if cache := getattr(made, "_cache", None):  # there is none where NUMBA_DISABLE_JIT is set
        cache._cache_file = Files(cache._cache_path, cache._impl.filename_base, cache._impl.locator.get_source_stamp())
    return made


class Files(IndexDataCacheFile):
    """An index that names a file for each signature."""

    def save(self, key: Any, data: Any) -> None:
        name = sha256(self._dump((self._source_stamp, key))).hexdigest()[:16]
        name = self._data_name_pattern.replace("{number:d}", name)
        self._save_data(name, data)  # first, as whoever finds it in the index reads it
        folder = os.open(self._cache_path, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems lock no folders; a lost entry is compiled again
                fcntl.flock(folder, fcntl.LOCK_EX)
            self._save_index({**self._load_index(), key: name})
        finally:
            os.close(folder)
