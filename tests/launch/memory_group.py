"""A memory cgroup of this machine's, version 1 or 2, that a process enters to be killed by the kernel.

    with MemoryGroup(64 << 20) as group: ...      group.folder / "cgroup.procs" takes the process's number

Root, a memory controller that is mounted writable, and no swap, into which a process would grow instead; `missing()`
says what is not there.
"""

import contextlib
import os
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LIMITS = ("memory.limit_in_bytes", "memory.max")  # of version 1 and of version 2


def missing() -> str | None:
    """Why no such group can be made here, or None."""
    if os.geteuid() != 0:
        return "a memory cgroup needs root"
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        return "this machine swaps: a process would not be killed"
    try:
        with MemoryGroup(64 << 20):
            return None
    except OSError as error:
        return f"no memory cgroup can be made: {error}"


class MemoryGroup:
    """limit: bytes of all processes in it."""

    def __init__(self, limit: int) -> None:
        parent = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
        self.limit, self.folder = limit, parent / f"tablemesh-test-{os.getpid()}"

    def __enter__(self) -> "MemoryGroup":
        self.folder.mkdir()
        try:
            found = [self.folder / name for name in LIMITS if (self.folder / name).exists()]
            if not found:
                raise OSError(f"{self.folder} has no memory limit")
            found[0].write_text(str(self.limit))
        except OSError:
            self.folder.rmdir()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(100):  # a killed process leaves it a moment later
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)
