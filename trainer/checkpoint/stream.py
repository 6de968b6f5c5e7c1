"""Writing a file past the page cache, where its file system can.

A checkpoint is written once and read after a failure, if ever: in the page cache it would push out the data that the
run reads, the kernel would copy every byte with the CPU that the steps want, and on a machine that is given its memory
as it touches it (most virtual ones) fresh pages cost more than the disk does.  O_DIRECT wants memory, lengths and
positions that are multiples of ALIGN, so bytes are gathered in a buffer; the last few go through the cache.
"""

import errno
import fcntl
import mmap
import os
from typing import Any

import numpy as np

BUFFER_BYTES = 8 << 20  # of one call: enough to keep a disk busy, small enough for a thread each
ALIGN = 4096  # bytes; no file system wants more of it than the size of a page
O_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


class Stream:
    """`write` bytes to an open, empty file, then `finish`; nothing may be taken for written before.

    buffer_bytes: a multiple of ALIGN.
    """

    def __init__(self, descriptor: int, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._file, self._size = descriptor, buffer_bytes
        self._map = mmap.mmap(-1, buffer_bytes)  # begins at a page
        self._buffer = np.frombuffer(self._map, np.uint8)
        self._filled = 0
        self._direct = O_DIRECT != 0 and _set_direct(descriptor, True)

    def write(self, data: Any) -> None:
        """data: bytes-like; its values are taken before this returns."""
        new = np.frombuffer(data, np.uint8)
        while len(new):
            count = min(len(new), self._size - self._filled)
            np.copyto(self._buffer[self._filled : self._filled + count], new[:count])  # without the interpreter's lock
            self._filled += count
            new = new[count:]
            if self._filled == self._size:
                self._empty(self._size)

    def finish(self) -> None:
        """Write what is left; the file is whole, though not yet on the disk."""
        whole = self._filled // ALIGN * ALIGN
        self._empty(whole)
        if self._direct and self._filled:
            self._direct = not _set_direct(self._file, False)
        self._empty(self._filled)

    def _empty(self, count: int) -> None:
        """Write the first `count` bytes of the buffer; the others move to its front."""
        view = memoryview(self._map)[:count]
        while len(view):  # one call of the system may write less
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = not _set_direct(self._file, False)  # a file system that says so only now
        self._buffer[: self._filled - count] = self._buffer[count : self._filled].copy()
        self._filled -= count


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """False where the file system refuses."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | O_DIRECT if wanted else flags & ~O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True
