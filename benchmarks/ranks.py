"""The ranks of one side of a benchmark: processes joined by gloo that live as long as the benchmark and run on demand.

    with Ranks(make, 2, workload) as ranks:         # make(workload) in each of them, with the process group up
        seconds = ranks.call("run", 5)              # .run(5) of what `make` returned, on all ranks; results by rank

Two sides that are compared stand side by side and are called in turns; the one not called waits in a read, idle.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.base import usable_cores
from trainer import process, quiet


class Ranks:
    """make: a module-level function; called in every rank, after torch has joined the process group.

    A rank has an equal share of the cores for torch's threads, as `tablemesh train` gives it.
    tuned: whether it is started with the rest of trainer/process.py too, as our own ranks are.
    """

    def __init__(self, make: Callable[..., Any], world_size: int, *args: Any, tuned: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        threads = max(1, usable_cores() // world_size)
        wanted = process.environment(threads=threads) if tuned else {"OMP_NUM_THREADS": str(threads)}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ |= wanted  # read when a process starts
        try:
            pipes = [context.Pipe() for _ in range(world_size)]
            self._pipes = [ours for ours, _ in pipes]
            self._processes = [
                context.Process(target=_rank, args=(theirs, store, rank, world_size, make, args), daemon=True)
                for rank, (_, theirs) in enumerate(pipes)
            ]
            for rank in self._processes:
                rank.start()
            for _, theirs in pipes:
                theirs.close()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def call(self, name: str, *args: Any) -> list[Any]:
        """The method on every rank at once; its results in rank order."""
        for pipe in self._pipes:
            pipe.send((name, args))
        found = []
        for rank, pipe in enumerate(self._pipes):
            try:
                error, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of the benchmark ended without a word") from None
            if error is not None:
                raise RuntimeError(f"rank {rank} of the benchmark failed:\n{error}")
            found.append(value)
        return found

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for rank in self._processes:
            rank.kill()
            rank.join()
        self._folder.cleanup()


def _rank(
    pipe: Connection, store: str, rank: int, world_size: int, make: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    quiet.install()
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    target = None
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        try:
            if target is None:
                dist.init_process_group(
                    "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
                )
                target = make(*args)
            pipe.send((None, getattr(target, name)(*given)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
            return
