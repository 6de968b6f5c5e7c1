"""What is written past the page cache is what was given, at any length and on any file system."""

import errno
import os

import numpy as np
import pytest

from trainer.checkpoint import stream
from trainer.checkpoint.stream import ALIGN, Stream


def written(path, pieces):
    with open(path, "wb", buffering=0) as file:
        out = Stream(file.fileno(), buffer_bytes=4 * ALIGN)
        for piece in pieces:
            out.write(piece)
        out.finish()
    return path.read_bytes()


SIZES = [
    (),
    (1,),
    (ALIGN,),
    (ALIGN - 1, 2),
    (3 * ALIGN, 5 * ALIGN, 7),
    (40 * ALIGN + 11,),
    (13, 16 * ALIGN, 16 * ALIGN - 13),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("refusal", [None, "at once", "at the first write"])
def test_every_byte_is_written_once(tmp_path, monkeypatch, sizes, refusal):
    data = np.random.default_rng(1).integers(0, 256, sum(sizes), np.uint8).tobytes()
    ends = np.cumsum(sizes)
    pieces = [data[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    if refusal == "at once":
        monkeypatch.setattr(stream, "_set_direct", lambda file, wanted: False)
    if refusal == "at the first write":
        write, direct = os.write, [True]

        def picky(file, view):
            if direct[0]:
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(file, view[:5000])  # and never all of it

        def set_direct(file, wanted):
            direct[0] = wanted
            return True

        monkeypatch.setattr(stream, "_set_direct", set_direct)
        monkeypatch.setattr(os, "write", picky)
    assert written(tmp_path / "file", pieces) == data
