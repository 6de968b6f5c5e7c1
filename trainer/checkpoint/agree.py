"""The ranks agree: after a step on what to do next (save, or save and stop), and on whether a call has failed.

A signal reaches one rank a step earlier than another, and clocks differ; yet all must save after the same step.  So
every rank puts its wish into one integer that is reduced to the maximum in a group of its own, beside the next step:
what is read after step k was asked for after step k-1, is equal on all ranks, and costs the step next to nothing.

    together(call)      every rank calls; what one of them raises is raised on all
    from_first(call)    rank 0 calls; all have what it returns or raises

A rank that raised by itself between two collectives would leave the others waiting in the second one.
"""

import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kernels.errors import UserError
from trainer.world import World

T = TypeVar("T")
_SHARED = "_tablemesh_shared"  # on an error that all ranks have had from one: it travels with it

NOTHING, SAVE, STOP = 0, 1, 2


def together(call: Callable[[], T], *, group: Any = None) -> T:
    """call() on all ranks; its result, or on all of them what the first failing rank raised (`shared`).

    group: of the collective; not the step's where this runs beside the steps.
    """
    result, error = None, None
    try:
        result = call()
    except Exception as raised:
        error = raised
    rank = dist.get_rank()
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else shared(error, rank), group=group)
    for number, found in enumerate(errors):
        if found is not None:
            raise found from (error if number == rank else None)
    return result  # type: ignore[return-value]


def from_first(call: Callable[[], T]) -> T:
    """What rank 0's call returns or raises, on every rank: they must not see different folders."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box = [call(), None]
        except Exception as error:
            box = [None, shared(error, 0)]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def shared(error: BaseException, rank: int) -> Exception:
    """An error as all ranks raise it: one of ours as it is, any other with the number of its rank in front.

    The errors of libraries cannot all travel between processes.
    """
    if isinstance(error, UserError) or hasattr(error, _SHARED):
        return error  # type: ignore[return-value]
    found: Exception
    if isinstance(error, OSError):
        found = OSError(error.errno, f"rank {rank}: {error.strerror or error}", error.filename)
    else:
        found = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
    setattr(found, _SHARED, True)
    return found


class Agreement:
    """every_minutes: rank 0's clock asks for SAVE this long after the last one; None for never."""

    def __init__(self, world: World, *, every_minutes: float | None = None) -> None:
        self.stopped_by: str | None = None  # the signal that this rank got
        self._world, self._every = world, every_minutes
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._saved = time.monotonic()
        self._wish = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def listen(self) -> None:
        """SIGTERM and SIGUSR1 become the wish to stop, from now on.  (SIGINT still means: leave at once.)"""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number).name

    def after_step(self) -> int:
        """NOTHING, SAVE or STOP, the same on all ranks.  Every rank calls it once a step."""
        if self._group is None:
            return self._own_wish()
        agreed = NOTHING
        if self._work is not None:
            self._work.wait()
            agreed = int(self._wish.item())
        self._wish.fill_(self._own_wish() if agreed == NOTHING else NOTHING)
        self._work = dist.all_reduce(self._wish, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def saved(self) -> None:
        """The clock of `every_minutes` starts again."""
        self._saved = time.monotonic()

    def _own_wish(self) -> int:
        if self.stopped_by is not None:
            return STOP
        due = self._every is not None and self._world.is_first and time.monotonic() - self._saved >= 60 * self._every
        return SAVE if due else NOTHING
