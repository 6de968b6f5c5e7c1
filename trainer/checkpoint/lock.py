"""One run folder, one run: LOCK says who is writing there.

The file holds pid, the process's start, host and the host's boot id.  A lock whose process has ended, or whose host has
been started again since, is stale and taken over; one of another host cannot be examined from here and stands.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kernels.errors import UserError

NAME = "LOCK"


def acquire(run_dir: Path) -> str | None:
    """Take the folder's lock; what was found out about a stale one that was taken over, for people to read.

    Raises UserError while another process has it.
    """
    with _alone(run_dir):
        return _acquire(run_dir / NAME)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """One process of this host at a time: of two that find a stale lock, one would remove the new one of the other."""
    try:
        folder = os.open(run_dir, os.O_RDONLY)
    except OSError:  # what is written there next says it
        yield
        return
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _acquire(path: Path) -> str | None:
    note = None
    for _ in range(3):
        if (holder := _read(path)) is not None:
            note = _refuse_or_stale(path, holder)
            path.unlink(missing_ok=True)
        beside = path.with_name(f".{NAME}-{os.getpid()}")
        try:
            beside.write_text(json.dumps(_self()) + "\n")
            os.link(beside, path)  # fails when somebody was faster
            return note
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            beside.unlink(missing_ok=True)
    raise UserError(f"{path}: several processes want this run folder; start one of them alone")


def check(run_dir: Path) -> None:
    """Raises UserError while a living process has the folder's lock."""
    if (holder := _read(run_dir / NAME)) is not None:
        _refuse_or_stale(run_dir / NAME, holder)


def release(run_dir: Path) -> None:
    """Give back this process's lock; harmless without one."""
    path = run_dir / NAME
    holder = _read(path)
    if holder is not None and {k: holder.get(k) for k in ("pid", "boot_id")} == {
        "pid": os.getpid(),
        "boot_id": _boot_id(),
    }:
        path.unlink(missing_ok=True)


def _refuse_or_stale(path: Path, holder: dict[str, Any]) -> str:
    pid, host = holder.get("pid"), holder.get("host")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", 0)))
    who = f"process {pid} on {host}, since {since}"
    if host == socket.gethostname() and holder.get("boot_id") != _boot_id():
        return f"took over the lock of {who}: {host} has been restarted since"
    if host == socket.gethostname():
        if _start_of(pid) is not None and _start_of(pid) == holder.get("start"):
            raise UserError(
                f"{path.parent}: another run is writing here ({who}); wait for it, stop it, or use another --name"
            )
        return f"took over the lock of {who}: that process has ended"
    raise UserError(
        f"{path.parent}: locked by {who}, which cannot be examined from {socket.gethostname()}; "
        f"if that run is over, remove {path}"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a lock ({error}); if no run is writing here, remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a lock; if no run is writing here, remove it")
    return found


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "start": _start_of(pid),
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "since": time.time(),
    }


def _start_of(pid: Any) -> str | None:
    """When a living process started, in the kernel's ticks (pids are used again); None when there is none."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return _alive(pid)
    return None if fields[0] in "ZX" else fields[19]


def _alive(pid: Any) -> str | None:
    """Where there is no /proc (macOS): a constant for a living process."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return None
    return "alive"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
