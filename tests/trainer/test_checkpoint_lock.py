"""One run folder, one run."""

import json
import os
import subprocess
import sys

import pytest

from kernels.errors import UserError
from trainer.checkpoint import lock


def held_by(folder, **changes):
    (folder / lock.NAME).write_text(json.dumps(lock._self() | changes))


def test_acquire_and_release(tmp_path):
    assert lock.acquire(tmp_path) is None
    with pytest.raises(UserError, match=f"another run is writing here \\(process {os.getpid()}"):
        lock.check(tmp_path)
    with pytest.raises(UserError, match="another run"):
        lock.acquire(tmp_path)
    lock.release(tmp_path)
    lock.check(tmp_path)
    lock.release(tmp_path)
    assert lock.acquire(tmp_path) is None
    assert [p.name for p in tmp_path.iterdir()] == [lock.NAME]


def test_a_dead_process_leaves_a_stale_lock(tmp_path):
    code = f"from pathlib import Path\nfrom trainer.checkpoint import lock\nlock.acquire(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / lock.NAME).exists()
    lock.check(tmp_path)
    assert "that process has ended" in lock.acquire(tmp_path)


def test_a_pid_that_is_used_again_and_a_restarted_host(tmp_path):
    held_by(tmp_path, start="12")
    assert "has ended" in lock.acquire(tmp_path)
    held_by(tmp_path, boot_id="another")
    assert "has been restarted since" in lock.acquire(tmp_path)


def test_another_host_cannot_be_examined(tmp_path):
    held_by(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=r"cannot be examined from .*; if that run is over, remove .*LOCK"):
        lock.acquire(tmp_path)
    lock.release(tmp_path)


def test_what_is_no_lock(tmp_path):
    for text in ("", "[]", "{"):
        (tmp_path / lock.NAME).write_text(text)
        with pytest.raises(UserError, match="not a lock"):
            lock.check(tmp_path)


def test_another_ones_lock_is_not_released(tmp_path):
    held_by(tmp_path, pid=1)
    lock.release(tmp_path)
    assert (tmp_path / lock.NAME).exists()
