"""One run folder, one run."""

import json
import os
import subprocess
import sys
import threading

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


def test_of_two_that_find_a_stale_lock_one_gets_it(tmp_path, monkeypatch):
    """The second comes while the first has read the stale one and not yet replaced it."""
    held_by(tmp_path, start="12")
    found, examine = [], lock._refuse_or_stale

    def second():
        try:
            found.append(lock.acquire(tmp_path))
        except UserError as error:
            found.append(str(error))

    other = threading.Thread(target=second)

    def examine_slowly(path, holder):
        note = examine(path, holder)
        if other.ident is None:
            other.start()
            other.join(0.3)
        return note

    monkeypatch.setattr(lock, "_refuse_or_stale", examine_slowly)
    assert "has ended" in lock.acquire(tmp_path)
    other.join()
    assert len(found) == 1 and "another run is writing here" in found[0]


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
