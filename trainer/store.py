"""The store in which the ranks of one host meet: rank 0 opens it on a port that the kernel finds free, and the others
read the port in a file.

torch's launcher finds a free port in the agent instead, seconds before rank 0 has imported torch and listens on it: in
the meantime any other program may have got it. It must not live in the agent either, whose death the ranks report.
"""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

FILE = "TABLEMESH_STORE"  # environment of the ranks: the file's path
_POLL_SECONDS = 0.02


def prepare(path: Path) -> dict[str, str]:
    """In the agent, before the ranks start: what their environment needs. The last ranks' file goes."""
    path.unlink(missing_ok=True)
    return {FILE: str(path)}


def open_store(path: Path, *, rank: int, limit: timedelta) -> "TCPStore":
    """The store, from any rank. DistNetworkError when rank 0 does not open it within the limit."""
    from torch.distributed import DistNetworkError, TCPStore

    if rank == 0:
        store = TCPStore("localhost", 0, None, True, limit, wait_for_workers=False)
        made = path.with_name(path.name + ".tmp")
        made.write_text(str(store.port))
        made.replace(path)
        return store
    deadline = time.monotonic() + limit.total_seconds()
    while not path.exists():
        if time.monotonic() > deadline:
            seconds = limit.total_seconds()
            raise DistNetworkError(f"rank 0 did not open the ranks' store within {seconds:.0f} s ({path})")
        time.sleep(_POLL_SECONDS)
    return TCPStore("localhost", int(path.read_text()), None, False, limit, wait_for_workers=False)


def path_from_env() -> Path | None:
    """Of the file; None where the launcher has not set it: its own store serves (several hosts, torchrun)."""
    path = os.environ.get(FILE)
    return Path(path) if path else None
