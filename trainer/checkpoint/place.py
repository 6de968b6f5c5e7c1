"""Where checkpoints are: a folder, or a URL that fsspec knows ("s3://bucket/runs", "memory://x").

    place = Place(run_dir / "checkpoints")
    place.names()                               ["step_20", "step_40"]: those with a manifest, oldest first
    with place.create(name, file) as out: ...   a file of a checkpoint in the making
    place.publish(name, manifest)               the moment at which it exists

A folder: files are written into NAME.partial, synced, and the folder is renamed once its manifest is there.  A URL has
no rename worth the name, so files go to NAME itself and the manifest, written last, is what makes it a checkpoint.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from trainer.checkpoint.stream import Stream

MANIFEST = "manifest.json"
PARTIAL = ".partial"
OLD = ".old"  # the checkpoint that another of its name is just replacing
ASIDE = ".superseded"  # of a history that a resume from an earlier step has left


class Place:
    def __init__(self, where: str | Path) -> None:
        self.url = "://" in str(where)  # fsspec's
        self.where = str(where).rstrip("/") if self.url else str(Path(where).absolute())
        if self.url:
            import fsspec

            try:
                self._fs, self._root = fsspec.core.url_to_fs(str(where))  # "memory://" is no path without its slashes
            except (ValueError, ImportError) as error:
                raise UserError(f"{self.where}: fsspec cannot open it: {error}") from error
            self._root = self._root.rstrip("/")
        else:
            self._root = self.where

    def __str__(self) -> str:
        return self.where

    def path(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self._root, name, file) if part)

    def names(self) -> list[str]:
        """The checkpoints here, oldest first: folders step_N with a manifest."""
        return sorted((name for name in self._folders() if self._is_file(name, MANIFEST)), key=step_of)

    def _folders(self) -> list[str]:
        if self.url:
            found = [path.rstrip("/").rpartition("/")[2] for path in self._ls(self._root)]
        else:
            found = os.listdir(self._root) if os.path.isdir(self._root) else []
        return [name for name in found if name.startswith("step_") and name[5:].isdigit()]

    def _ls(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [str(p) for p in self._fs.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def _is_file(self, name: str, file: str) -> bool:
        path = self.path(name, file)
        return self._fs.isfile(path) if self.url else os.path.isfile(path)

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of every file of a checkpoint, by its name."""
        folder = self.path(name)
        if self.url:
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
            return {e["name"].rpartition("/")[2]: int(e["size"]) for e in entries if e["type"] == "file"}
        if not os.path.isdir(folder):
            return {}
        with os.scandir(folder) as entries:
            return {e.name: e.stat().st_size for e in entries if e.is_file()}

    def read(self, name: str, file: str) -> bytes:
        path = self.path(name, file)
        if self.url:
            return self._fs.cat_file(path)
        with open(path, "rb") as stream:
            return stream.read()

    def read_into(self, name: str, file: str, at: int, into: memoryview) -> None:
        """Fill `into` from byte `at` on.  OSError when the file is missing or too short."""
        path = self.path(name, file)
        if self.url:
            data = self._fs.cat_file(path, start=at, end=at + len(into))
            if len(data) != len(into):
                raise OSError(f"{path} ends at byte {at + len(data)}, {at + len(into)} were expected")
            into[:] = data
            return
        with open(path, "rb", buffering=0) as stream:
            stream.seek(at)
            done = 0
            while done < len(into):
                count = stream.readinto(into[done:])
                if not count:
                    raise OSError(f"{path} ends at byte {at + done}, {at + len(into)} were expected")
                done += count

    def begin(self, name: str) -> None:
        """Make room for a checkpoint; what unfinished ones left behind goes.  One process calls it, before the others
        create files."""
        if self.url:
            self.remove(name)
            self._fs.makedirs(self.path(name), exist_ok=True)  # an object store has no folders and does nothing
            return
        self.recover()
        for entry in os.listdir(self._root) if os.path.isdir(self._root) else ():
            if entry.endswith((PARTIAL, OLD)):
                shutil.rmtree(os.path.join(self._root, entry), ignore_errors=True)
        os.makedirs(self.path(name + PARTIAL))

    def recover(self) -> None:
        """Where a writer died between moving an old checkpoint away and moving the new one in: the old one is back.

        For whoever has the run's lock alone: to others a writer may just be between the two.
        """
        if self.url:
            return
        for entry in os.listdir(self._root) if os.path.isdir(self._root) else ():
            if entry.endswith(OLD):
                self._restore_old(entry.removesuffix(OLD))

    def _restore_old(self, name: str) -> None:
        if os.path.exists(self.path(name + OLD)) and not os.path.exists(self.path(name)):
            os.rename(self.path(name + OLD), self.path(name))

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Any]:
        """A file of the checkpoint in the making: `write(bytes-like)`; on the disk when the block ends.  Any thread."""
        if self.url:
            with self._fs.open(self.path(name, file), "wb") as stream:
                yield stream
            return
        with open(self.path(name + PARTIAL, file), "wb", buffering=0) as opened:
            stream = Stream(opened.fileno())
            yield stream
            stream.finish()
            os.fsync(opened.fileno())

    def publish(self, name: str, manifest: bytes) -> None:
        """Write the manifest: from here on the checkpoint exists, and replaces one of the same name."""
        with self.create(name, MANIFEST) as stream:
            stream.write(manifest)
        if self.url:
            return
        partial, final, old = self.path(name + PARTIAL), self.path(name), self.path(name + OLD)
        _sync_folder(partial)
        if os.path.exists(final):
            os.rename(final, old)
        try:
            os.rename(partial, final)
        except OSError:
            self._restore_old(name)
            raise
        _sync_folder(self._root)
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self, name: str) -> None:
        """Remove what there is of a checkpoint in the making."""
        if self.url:
            self.remove(name)
        else:
            shutil.rmtree(self.path(name + PARTIAL), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first: what is half removed is none."""
        path, manifest = self.path(name), self.path(name, MANIFEST)
        if self.url:
            self._fs.invalidate_cache()
            if self._fs.exists(manifest):
                self._fs.rm_file(manifest)
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)
            return
        if os.path.exists(manifest):
            os.unlink(manifest)
        shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, name: str) -> None:
        """Take a checkpoint out of the line without deleting it."""
        if self.url:
            self._fs.mv(self.path(name, MANIFEST), self.path(name, MANIFEST + ASIDE))
            return
        aside = self.path(name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.path(name), aside)

    def free_bytes(self) -> int | None:
        """Bytes that may still be written here; None where nobody knows (a URL, a file system that is gone)."""
        if self.url:
            return None
        folder = Path(self._root)
        try:
            while not folder.exists():
                folder = folder.parent
            return shutil.disk_usage(folder).free
        except OSError:  # no error of its own: only rank 0 asks, and what is written next says it on every rank
            return None


def step_of(name: str) -> int:
    """step_40 -> 40"""
    return int(name.removeprefix("step_"))


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
