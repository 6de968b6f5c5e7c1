"""One training step after the other, in two ways that give the same losses.

    build_pipeline("plain" | "overlapped", dmp, optimizer, device=..., ...) -> Pipeline
    Pipeline.step(batches) -> (loss, logits_BT, batch)     raises StopIteration when the iterator has ended
    with Pipeline.paused(): ...                            the model as a plain callable, for evaluation

plain: one batch at a time.  overlapped (TorchRec's TrainPipelineSparseDist): while batch k is in forward and backward,
the ids of batch k+1 are on their way between the ranks and batch k+2 is copied to the device; the reader is therefore
up to two batches ahead of the step.

Order in a step: learning rates by the schedule -> zero_grad -> forward -> check of the loss -> backward (tables are
updated in it) -> what some of them have left to do -> clipping of the dense gradients -> optimizer.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from sharding.parallelize import average_buffers
from trainer import pulse
from trainer.config import Schedule
from trainer.data.batch import Batch
from trainer.optim.base import TABLES, clip_grad_norm, set_factor

PHASES = ("data_wait", "forward", "backward", "optimizer", "other")
CHECK_EVERY_ON_GPU = 50  # steps; a look at the loss makes the host wait for the device

PULSE = {"data_wait": "data", "forward": "forward", "backward": "backward", "optimizer": "optimizer"}

Result = tuple[Tensor, Tensor, Batch]


def build_pipeline(
    kind: str,
    dmp: nn.Module,
    optimizer: Any,
    *,
    device: torch.device,
    schedule: Schedule | None = None,
    clip: float | None = None,
    first_step: int = 0,
    check_every: int | None = None,
) -> "Pipeline":
    """A pipeline over `dmp` (sharding.parallelize) and `optimizer` (trainer.optim.base.build_optimizer).

    schedule: factor of the learning rates by step number; constant when None.  clip: the largest L2 norm of the dense
    gradients.  first_step: number of the first step, after a resume.  check_every: steps between two looks at whether
    the loss is finite; 1 on the CPU and CHECK_EVERY_ON_GPU on a GPU when None.
    """
    assert kind in ("plain", "overlapped")
    every = check_every or (1 if device.type == "cpu" else CHECK_EVERY_ON_GPU)
    pipeline = {"plain": Plain, "overlapped": Overlapped}[kind]
    return pipeline(
        dmp, optimizer, device=device, schedule=schedule, clip=clip, first_step=first_step, check_every=every
    )


class Pipeline:
    """The interface, and what both kinds share.

    step_number: of the next step.
    phases_ms: milliseconds of each of PHASES in the last step; None where they are not measured (on a GPU all but
        data_wait, since the host only queues work there).
    """

    def __init__(
        self,
        dmp: nn.Module,
        optimizer: Any,
        *,
        device: torch.device,
        schedule: Schedule | None,
        clip: float | None,
        first_step: int,
        check_every: int,
    ) -> None:
        self.dmp, self.optimizer, self.device = dmp, optimizer, device
        self.schedule, self.clip, self.check_every = schedule, clip, check_every
        self.step_number = first_step
        self._dense = [p for name, p in dmp.named_parameters() if not name.startswith(TABLES)]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.phases_ms: dict[str, float | None] = dict.fromkeys(PHASES)

    def step(self, batches: Iterator[Batch]) -> Result:
        """Train on the next batch: (loss of this rank, detached; logits_BT float32; the batch, on the device)."""
        task = self.dmp.module
        task.step, task.check = self.step_number, self.step_number % self.check_every == 0
        if self.schedule is not None:
            set_factor(self.optimizer, self.schedule.factor(self.step_number))
        self._seconds = dict.fromkeys(PHASES, 0.0)
        started = time.perf_counter()
        result = self._progress(batches)
        self._record(time.perf_counter() - started)
        self.step_number += 1
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Between two steps: `dmp(batch)` runs by itself, and the ranks agree on batch norm's statistics."""
        self._detach()
        average_buffers(self.dmp)
        try:
            yield
        finally:
            self._attach()

    def _progress(self, batches: Iterator[Batch]) -> Result:
        raise NotImplementedError

    def _detach(self) -> None:
        pass

    def _attach(self) -> None:
        pass

    def _timed(self, phase: str, call: Callable[..., Any], *args: Any) -> Any:
        pulse.mark(PULSE[phase], self.step_number + 1)
        started = time.perf_counter()
        try:
            with torch.profiler.record_function(f"phase: {phase}"):
                return call(*args)
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def _forward(self, batch: Batch) -> tuple[Tensor, Result]:
        loss, logits_BT = self.dmp(batch)
        return loss, (loss.detach(), logits_BT, batch)

    def _update(self) -> None:
        self.dmp.module.embeddings.after_backward()
        if self.clip is not None and self._dense:
            clip_grad_norm(self._dense, self.clip)
        self.optimizer.step()

    def _record(self, total: float) -> None:
        self._seconds["other"] = total - sum(self._seconds.values())
        known = PHASES if self.device.type == "cpu" else ("data_wait",)
        self.phases_ms = {phase: 1e3 * self._seconds[phase] if phase in known else None for phase in PHASES}


class Plain(Pipeline):
    def _progress(self, batches: Iterator[Batch]) -> Result:
        batch = self._timed("data_wait", next, batches).to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        loss, result = self._timed("forward", self._forward, batch)
        self._timed("backward", loss.backward)
        self._timed("optimizer", self._update)
        return result


class Overlapped(Pipeline):
    def __init__(self, dmp: nn.Module, optimizer: Any, **options: Any) -> None:
        super().__init__(dmp, optimizer, **options)
        self._inner = _SparseDist(self)

    def _progress(self, batches: Iterator[Batch]) -> Result:
        return self._inner.progress(batches)

    def _detach(self) -> None:
        self._inner.detach()

    def _attach(self) -> None:
        self._inner.attach()


class _SparseDist(TrainPipelineSparseDist):
    """TorchRec's pipeline with our forward and update, and a stopwatch at its phases."""

    def __init__(self, owner: Pipeline) -> None:
        super().__init__(
            owner.dmp,
            owner.optimizer,
            owner.device,
            execute_all_batches=True,
            pipeline_postproc=True,
            custom_model_fwd=lambda batch: owner._timed("forward", owner._forward, batch),
        )
        self._owner = owner

    def _next_batch(self, dataloader_iter: Iterator[Batch]) -> Batch | None:
        return self._owner._timed("data_wait", super()._next_batch, dataloader_iter)

    def _backward(self, losses: Tensor) -> None:
        self._owner._timed("backward", losses.backward)

    def _optimizer_step(self) -> None:
        self._owner._timed("optimizer", self._owner._update)
