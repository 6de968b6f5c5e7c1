"""The ranks agree, after a step, on what to do next: save, or save and stop.

A signal reaches one rank a step earlier than another, and clocks differ; yet all must save after the same step.  So
every rank puts its wish into one integer that is reduced to the maximum in a group of its own, beside the next step:
what is read after step k was asked for after step k-1, is equal on all ranks, and costs the step next to nothing.
"""

import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from trainer.world import World

NOTHING, SAVE, STOP = 0, 1, 2


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
