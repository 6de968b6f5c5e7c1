"""When and how a run saves.

    saver = Saver(place, config.checkpoint, world, log)
    saver.due(step)                      whether the config asks for one after this step
    saver.save(parts, about, ...)        copies into host buffers and writes in the background, or writes at once
                                         (parts: a call that gives them)
    saver.poll()                         takes note of a background save that has ended
    saver.wait()                         until nothing is being written

A periodic save that fails (a full disk, a file system that is gone) is a warning: the run goes on and the checkpoints
before it stay.  One that the run ends with raises.  Either way all ranks learn of it, whichever of them it failed on:
before every collective of a save stands `together`.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kernels.errors import UserError
from kernels.ops import blank
from sharding.snapshot import Snapshot
from trainer.checkpoint import chain, storage
from trainer.checkpoint.agree import together
from trainer.checkpoint.manifest import Damaged, Manifest
from trainer.checkpoint.place import Place, step_of
from trainer.checkpoint.storage import Part
from trainer.config import Checkpoint
from trainer.runlog import RunLog
from trainer.world import World

SPARE_BYTES = 16 << 20  # left free on the disk beside a checkpoint: for the run's own files
LONGEST_SAVE = timedelta(hours=12)  # how long a rank may wait for the slowest writer; a dead one is noticed at once


@dataclass
class Totals:
    """What saving has cost the run so far, for report.json."""

    saved: int = 0
    failed: int = 0
    bytes: int = 0
    pause_seconds: float = 0.0  # the steps stood still
    background_seconds: float = 0.0  # written beside the steps

    def as_json(self) -> dict[str, Any]:
        return vars(self).copy()


class Saver:
    def __init__(self, place: Place, config: Checkpoint, world: World, log: RunLog) -> None:
        self.place, self.config, self.world, self.log = place, config, world, log
        self.totals = Totals()
        # Its own group: the background thread's collectives must not mix with the step's.
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self._buffers: dict[Any, torch.Tensor] = {}
        self._running: _Save | None = None

    def due(self, step: int) -> bool:
        return bool(self.config.every_steps) and step % self.config.every_steps == 0

    def save(
        self,
        parts: Callable[[], Sequence[Part]],
        manifest: Callable[[dict, dict], Manifest],
        *,
        step: int,
        must: bool = False,
        compact: bool = False,
        done: Callable[..., None] | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """Save; all ranks together.

        parts(): what to save.  A rank on which it raises (memory, most likely) makes the save fail, on all ranks.
        manifest(files, tensors): what describes the checkpoint, called on rank 0 when the files are written.
        must: write at once, straight from the run's tensors, and raise UserError when that fails.
        compact: it is a delta; make it full afterwards, from what is on the disk.
        snapshot: watches the parts that are `watched`: they are copied in the background too.
        done(manifest or None, ok=..., compacted=...): called on every rank, on the main thread, when it is known how
            the save went, and before another one begins.
        """
        started = time.perf_counter()
        self.wait()
        save = _Save([], manifest, f"step_{step}", compact=compact, done=done)
        later = self.config.background and not must
        try:
            self._begin(save, parts, snapshot if later else None, copies=later)
        except Exception as error:  # this rank's alone: `_write` tells the others
            save.unready = error
        if not later:
            self._write(save)
            save.pause_seconds = time.perf_counter() - started
            self._note(save, raising=must)
            return
        save.pause_seconds = time.perf_counter() - started
        save.thread = threading.Thread(target=self._write, args=(save,), name="tablemesh-checkpoint", daemon=True)
        self._running = save
        save.thread.start()

    def _begin(
        self, save: "_Save", parts: Callable[[], Sequence[Part]], snapshot: Snapshot | None, *, copies: bool
    ) -> None:
        """Take the parts; with `copies` those that must not change until they are written, and a snapshot's, later."""
        save.parts = parts()
        if not copies:
            return
        if snapshot is not None and any(part.watched for part in save.parts):
            save.snapshot = snapshot
            snapshot.begin()
        save.parts = [part if self._later(part, save.snapshot) else self._copy(part) for part in save.parts]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def writing(self) -> bool:
        """Whether a save goes on in the background."""
        return self._running is not None and self._running.thread is not None and self._running.thread.is_alive()

    def poll(self) -> None:
        if not self.writing():
            self.wait()

    def wait(self) -> None:
        if self._running is not None:
            save, self._running = self._running, None
            assert save.thread is not None
            save.thread.join()
            self._note(save, raising=False)

    def _later(self, part: Part, snapshot: Snapshot | None) -> bool:
        return snapshot is not None and part.watched and not part.copied

    @torch.no_grad()
    def _copy(self, part: Part) -> Part:
        """The part with a copy in host memory."""
        if part.copied:
            return part
        return replace(part, tensor=self._room(part).copy_(part.tensor, non_blocking=True), copied=True)

    @torch.no_grad()
    def _copy_watched(self, save: "_Save") -> None:
        """In the background: copy the tables as they were when the save began.  Raises what its beginning raised."""
        if save.snapshot is None and save.unready is None:
            return
        rooms: dict[int, torch.Tensor] = {}
        try:
            if save.unready is not None:
                raise save.unready
            rooms = {p.tensor.data_ptr(): self._room(p) for p in save.parts if self._later(p, save.snapshot)}
        finally:
            if save.snapshot is not None:
                save.snapshot.copy(rooms)  # without memory for a copy: nothing, and no more rows are kept
        save.parts = [
            replace(p, tensor=rooms[p.tensor.data_ptr()], copied=True) if self._later(p, save.snapshot) else p
            for p in save.parts
        ]

    def _room(self, part: Part) -> torch.Tensor:
        """A host buffer for the part, used again at the next save."""
        key = (part.name, part.offset, part.tensor.shape, part.tensor.dtype)
        if key not in self._buffers:
            self._buffers[key] = self._buffer(part.tensor)
        return self._buffers[key]

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cuda":
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return blank(tensor.numel(), tensor.dtype, tensor.device).view(tensor.shape)

    def _write(self, save: "_Save") -> None:
        """On all ranks, in the background thread or in the main one."""
        started = time.perf_counter()
        try:
            together(lambda: self._copy_watched(save), group=self._group)
            self._check_space(save)
            save.manifest = storage.write(save.parts, self.place, save.name, save.about, group=self._group)
            if save.compact and not self.place.url:
                self._compact(save)
            if self.world.is_first:
                self._prune(save)
        except Exception as error:  # for `_note`, on the main thread
            save.error = error
        save.seconds = time.perf_counter() - started

    def _check_space(self, save: "_Save") -> None:
        """UserError, on all ranks, when the place has less room than the checkpoint needs."""
        mine = sum(part.nbytes for part in save.parts if part.table or self.world.is_first)
        sizes = torch.tensor([mine, 0])
        if self.world.is_first and (free := self.place.free_bytes()) is not None:
            sizes[1] = max(1, free)
        dist.all_reduce(sizes, group=self._group)
        need, free = sizes.tolist()
        if free and free < need + SPARE_BYTES:
            raise UserError(
                f"a checkpoint of {_mib(need)} needs that much and {_mib(SPARE_BYTES)} more, but {_mib(free)} are free "
                f"in {self.place}; make room, keep fewer (checkpoint.keep), or set checkpoint.dir to another disk"
            )

    def _compact(self, save: "_Save") -> None:
        """Make the delta that was just written full, on all ranks; it stays a delta when that fails."""
        try:
            whole = together(lambda: chain.open_chain(self.place, save.name), group=self._group)
            parts = whole.lazy_parts(share=(self.world.rank, self.world.size))
            self._check_space(_Save(parts, save.about, save.name))

            def about(files: dict, tensors: dict) -> Manifest:
                return replace(whole.manifest, kind="full", parent=None, files=files, tensors=tensors)

            storage.write(parts, self.place, save.name, about, group=self._group)
            save.compacted = True
        except (OSError, UserError, RuntimeError) as error:
            save.warnings.append(
                f"{self.place.path(save.name)}: could not be merged with what it is a delta to: {error}"
            )

    def _prune(self, save: "_Save") -> None:
        """Remove what need not stay; what a delta that stays belongs to does, too.

        A failure is a warning: the new checkpoint is there, and the other ranks, which do not hear of this, know it.
        """
        try:
            self._remove_old()
        except Exception as error:  # of fsspec's places each raises its own
            save.warnings.append(
                f"{self.place}: an old checkpoint could not be removed: {error}; it stays until a later save removes it"
            )

    def _remove_old(self) -> None:
        names = self.place.names()
        every, kept, needed = self.config.keep_every, 0, set()
        for name in reversed(names):
            wanted = kept < self.config.keep
            if not wanted and not (every and step_of(name) % every == 0):
                continue
            needed.add(name)
            with contextlib.suppress(Damaged):  # it stays, and counts for nothing: the whole one before it must not go
                needed |= {member for member, _ in chain.members(self.place, name)}
                kept += wanted
        for name in reversed(names):
            if name not in needed:
                self.place.remove(name)

    def _note(self, save: "_Save", *, raising: bool) -> None:
        """Log how a save went, add it up; an error is raised or becomes a warning."""
        background = save.thread is not None
        save.pause_seconds += save.snapshot.seconds if save.snapshot is not None else 0.0
        self.totals.pause_seconds += save.pause_seconds
        self.totals.background_seconds += save.seconds if background else 0.0
        if save.done is not None:
            save.done(save.manifest, ok=save.error is None, compacted=save.compacted)
        for text in save.warnings:
            self.log.event("message", level="warning", text=text)
        if save.error is None:
            self.totals.saved += 1
            if save.manifest is not None:
                self.totals.bytes += save.manifest.bytes
                self.log.event(
                    "checkpoint",
                    step=step_of(save.name),
                    path=self.place.path(save.name),
                    delta=save.manifest.kind == "delta",
                    seconds=save.seconds,
                    pause_seconds=save.pause_seconds,
                    background=background,
                    compacted=save.compacted,
                    bytes=save.manifest.bytes,
                )
            return
        self.totals.failed += 1
        message = self._message(save)
        if raising:
            raise UserError(message) from save.error
        self.log.event("message", level="warning", text=f"{message}; training goes on")

    def _message(self, save: "_Save") -> str:
        error = save.error
        what = f"{self.place.path(save.name)}: the checkpoint could not be written"
        if isinstance(error, UserError):
            return f"{what}: {error}"
        if not isinstance(error, OSError):
            return f"{what}: {type(error).__name__}: {error}"
        free = self.place.free_bytes()
        room = f" ({_mib(free)} free)" if free is not None and error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        try:
            whole = len(self.place.names())
        except Exception:  # the place itself is gone: of that every rank would have to learn, and `what` says it
            return f"{what}: {error.strerror or error}{room}"
        return (
            f"{what}: {error.strerror or error}{room}; nothing is left of it, and the {whole} finished "
            f"checkpoint{'' if whole == 1 else 's'} in {self.place} {'is' if whole == 1 else 'are'} whole"
        )


@dataclass
class _Save:
    parts: Sequence[Part]
    about: Callable[[dict, dict], Manifest]
    name: str
    thread: threading.Thread | None = None
    manifest: Manifest | None = None
    unready: Exception | None = None  # what went wrong on this rank before anything was written
    error: Exception | None = None  # on all ranks
    compact: bool = False
    snapshot: Snapshot | None = None
    compacted: bool = False
    warnings: list[str] = field(default_factory=list)
    done: Callable[..., None] | None = None
    pause_seconds: float = 0.0
    seconds: float = 0.0


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
