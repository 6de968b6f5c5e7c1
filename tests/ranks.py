"""Run a function in W real processes joined by gloo.

    losses = run_ranks(train, 2, tables, "row_wise")      # train(tables, "row_wise") on 2 ranks; results in rank order

The ranks come from a fork server that has torch, TorchRec, the trainer and what tests need imported already: that takes
ten seconds of CPU, forking milliseconds.  The server itself has run no tensor operation, so no thread pool is inherited
half-alive.  A rank that raises fails the test with that rank's traceback, and the others are killed.
"""

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOAD = [
    *("torch", "torch.distributed", "torchrec", "fbgemm_gpu", "torchrec.distributed.train_pipeline"),
    *("trainer.trainer", "tests.ready"),
    *("pandas", "pytest", "typer.testing"),  # pyarrow imports pandas at its first conversion
]
TIMEOUT_SECONDS = 500  # of ranks that share two slow cores with those of another test, and compile


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    local_world_size: int | None = None,
) -> list[Any]:
    """`fn(*args)` in every rank, with the default process group up; the picklable results, in rank order.

    fn: a module-level function of a test file.  local_world_size: ranks of one pretended host; all when None.
    Raises AssertionError with the first failing rank's traceback, or after TIMEOUT_SECONDS.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    # Pickled here and not by multiprocessing, which would pass tensors as shared memory of a rank that is gone by then.
    work = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(
                target=_rank,
                args=(results, store, rank, world_size, local_world_size or world_size, work),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _gather(results, ranks, time.monotonic() + TIMEOUT_SECONDS)
        finally:
            for process in ranks:
                process.join(timeout=2)
                if process.is_alive():
                    process.kill()
                process.join()


def _gather(results: Any, ranks: list[Any], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        # Before the queue: what a rank said before it died is read before its death is held against it.
        dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in found]
        try:
            rank, error, value = results.get(timeout=0.2)
        except queue.Empty:
            assert not dead, f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode} and no traceback"
            missing = [r for r in range(len(ranks)) if r not in found]
            assert time.monotonic() < deadline, f"ranks {missing} of {len(ranks)} did not finish in time"
            continue
        assert error is None, f"rank {rank} of {len(ranks)} failed:\n{error}"
        found[rank] = pickle.loads(value)
    return [found[r] for r in range(len(ranks))]


def _rank(results: Any, store: str, rank: int, world_size: int, local_size: int, work: bytes) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
    }
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        fn, args = pickle.loads(work)
        value = pickle.dumps(fn(*args))
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, None, value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
