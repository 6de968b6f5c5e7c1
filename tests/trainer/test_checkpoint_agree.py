"""One rank fails where the others stand before a collective: all hear of it, none waits, what was saved stays whole."""

import errno
import os
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from kernels.errors import UserError
from tests.ranks import run_ranks
from tests.trainer import runs
from trainer.checkpoint import by_id, chain, restore, saver, state
from trainer.checkpoint.agree import from_first, together
from trainer.checkpoint.files import Files, verify
from trainer.checkpoint.manifest import Damaged
from trainer.checkpoint.place import Place
from trainer.checkpoint.saver import Saver

STEP = {"now": 0}  # of the save that goes on in this rank


class Strange(Exception):
    """Cannot travel between processes."""

    def __init__(self):
        super().__init__("odd")
        self.handle = lambda: None


ERRORS = (OSError(errno.EIO, "Input/output error", "f"), MemoryError("none"), UserError("yours"), Strange())


def raise_on_rank_1():
    found = []
    for error in ERRORS:
        for agreed in (together, lambda call: from_first(lambda: call() if dist.get_rank() == 0 else None)):
            failing = 1 if agreed is together else 0

            def call(error=error, failing=failing):
                if dist.get_rank() == failing:
                    raise error
                return "fine"

            try:
                found.append(agreed(call))
            except Exception as raised:
                found.append((type(raised).__name__, str(raised)))
    return found, together(lambda: dist.get_rank()), from_first(lambda: dist.get_rank())


def test_what_one_raises_all_raise():
    (found, mine, first), (others, theirs, same) = run_ranks(raise_on_rank_1, 2)
    assert found == others and (mine, theirs) == (0, 1) and first == same == 0
    assert found[0] == ("OSError", "[Errno 5] rank 1: Input/output error: 'f'")
    assert found[1] == ("OSError", "[Errno 5] rank 0: Input/output error: 'f'")
    assert found[2] == ("RuntimeError", "rank 1: MemoryError: none")
    assert found[4] == ("UserError", "yours") and found[6] == ("RuntimeError", "rank 1: Strange: odd")


@contextmanager
def failing(where, name, error, *, rank, when=lambda *args: True):
    """where.name raises on one rank."""
    original = getattr(where, name)

    def call(*args, **options):
        if dist.get_rank() == rank and when(*args):
            raise error
        return original(*args, **options)

    setattr(where, name, call)
    try:
        yield
    finally:
        setattr(where, name, original)


def at(step):
    return lambda *args: STEP["now"] == step


def rename_to(step):
    return lambda source, target: str(target).endswith(f"step_{step}") and str(source).endswith(".partial")


def save_with_failures(run_dir):
    """A training whose saves fail on one rank, each at another point; the totals."""
    save = Saver.save

    def save_at(self, *args, step, **options):
        self.wait()
        STEP["now"] = step
        save(self, *args, step=step, **options)

    full = OSError(errno.ENOSPC, "No space left on device", "f")
    points = (
        failing(state, "own_parts", MemoryError("a copy"), rank=1, when=at(4)),
        failing(state, "delta_parts", MemoryError("rows"), rank=1, when=at(8)),
        failing(Saver, "_room", MemoryError("a buffer"), rank=1, when=at(10)),
        failing(by_id, "parts_of", MemoryError("maps"), rank=0, when=at(12)),
        failing(Place, "create", full, rank=1, when=at(14)),
        failing(saver.chain, "open_chain", PermissionError(errno.EPERM, "no", "f"), rank=1, when=at(20)),
        failing(chain.Chain, "read", OSError(errno.EIO, "gone", "f"), rank=1, when=at(26)),
        failing(os, "rename", full, rank=0, when=rename_to(22)),
        failing(Place, "begin", full, rank=0, when=at(24)),
    )
    Saver.save = save_at
    try:
        for point in points:
            point.__enter__()
        report = runs.run(run_dir)
    finally:
        Saver.save = save
        for point in points[::-1]:
            point.__exit__(None, None, None)
    return report["checkpoints"]


def save_without_and_with(plain, hurt):
    runs.run(plain)
    return save_with_failures(hurt)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_run_goes_on(data, tmp_path):
    often = {"every_steps": 2, "deltas": 2, "keep": 99, "count_updates": True}
    plain, hurt = (runs.write_config(data, tmp_path / name, checkpoint=often) for name in ("plain", "hurt"))
    totals = run_ranks(save_without_and_with, 2, plain, hurt)
    place = Place(hurt / "checkpoints")
    lost = {4, 8, 10, 12, 14, 22, 24}
    assert [(t["saved"], t["failed"]) for t in totals] == [(14 - len(lost), len(lost))] * 2
    assert place.names() == [f"step_{step}" for step in range(2, 30, 2) if step not in lost]
    for name in place.names():
        of_chain = chain.open_chain(place, name)
        assert not [d for files in of_chain.members for d in verify(place, files.name, files.manifest)]
        expected, found = runs.tensors(plain, name), runs.tensors(hurt, name)
        assert not [tensor for tensor in expected if not torch.equal(expected[tensor], found[tensor])], name
    text = runs.run_as_text(hurt)
    for words in ("rank 1: MemoryError: a copy", "rank 1: MemoryError: rows", "rank 1: MemoryError: a buffer"):
        assert words in text
    assert text.count("training goes on") == len(lost) and text.count("could not be merged") == 2
    assert sorted(p.name for p in (hurt / "checkpoints").iterdir()) == sorted(place.names())


def resume_with_failures(run_dir):
    """What each of several resumes says, all failing on one rank at another point; then the one that goes well."""
    runs.run(run_dir, stop_after=7)
    denied, broken = PermissionError(errno.EACCES, "Permission denied", "f"), OSError(errno.EIO, "gone", "f")
    points = {
        "names": lambda: failing(Place, "names", denied, rank=0),
        "open": lambda: failing(restore, "open_chain", denied, rank=0),
        "parts": lambda: failing(state, "parts_of", MemoryError("parts"), rank=1),
        "fit": lambda: failing(state, "_fit_row_states", UserError("another table optimizer"), rank=1),
        "read": lambda: failing(Files, "read_box", broken, rank=1),
        "rows": lambda: failing(Files, "read", broken, rank=1),
        "own": lambda: failing(state, "load_own", MemoryError("own"), rank=1),
        "later": lambda: failing(restore, "set_aside_after", denied, rank=0),
    }
    said = {}
    for point, make in points.items():
        with make():
            try:
                said[point] = runs.run(run_dir, resume="auto")["status"]
            except Exception as error:
                said[point] = f"{type(error).__name__}: {error}"
        dist.barrier()
    passed = []
    with failing(Files, "read", Damaged("torn", file="f"), rank=1, when=lambda self, *_: self.name == "step_8"):
        passed = runs.run(run_dir, resume="auto", stop_after=9)
    return said, passed


def test_a_load_that_fails_on_one_rank_ends_on_all(data, tmp_path):
    run_dir = runs.write_config(data, tmp_path / "run", checkpoint={"every_steps": 4, "deltas": 3, "keep": 99})
    (said, stopped), (same, _) = run_ranks(resume_with_failures, 2, run_dir)
    assert said == same
    assert "rank 0: Permission denied" in said["names"] and "rank 0: Permission denied" in said["open"]
    assert said["parts"] == "RuntimeError: rank 1: MemoryError: parts"
    assert said["fit"] == "UserError: another table optimizer"
    assert "rank 1: gone" in said["read"] and "rank 1: gone" in said["rows"]
    assert said["own"] == "RuntimeError: rank 1: MemoryError: own" and "rank 0: Permission denied" in said["later"]
    assert "after the checkpoint of step 10" in stopped
    assert "passed over step_8: torn" in runs.run_as_text(run_dir)
