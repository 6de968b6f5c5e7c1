"""A training run's dealings with its checkpoints, on every rank: begin, save when it is time, stop when told to.

In this order, by trainer/trainer.py:

    session = Session(built, run_dir, log, metrics=...)
    start = session.begin("auto", steps_total=N)    step, samples, seconds to go on from; zeros for a new run
    session.leave_history()                         now checkpoints of later steps are another history's
    for step in ...:
        if session.after_step(progress): raise session.stopped(step)
    session.finish(progress)
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kernels.errors import UserError
from sharding.snapshot import Snapshot
from sharding.table_state import fused_kernels
from sharding.touched import Key, Touched
from sharding.update_counts import UpdateCounts
from trainer import config as configs
from trainer import pulse
from trainer.checkpoint import by_id, restore, state, tools, transfer
from trainer.checkpoint.agree import NOTHING, SAVE, STOP, Agreement, from_first, together
from trainer.checkpoint.chain import Chain
from trainer.checkpoint.manifest import COUNTED_SINCE, Manifest, Position
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.storage import Part
from trainer.runlog import RunLog


class Stopped(Exception):
    """The run was told to stop, and can go on from the checkpoint of `step`."""

    def __init__(self, step: int, by: str) -> None:
        super().__init__(f"stopped by {by} after the checkpoint of step {step}; --resume auto goes on from there")
        self.step = step


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run has done: the position in its data follows from `step`."""

    step: int = 0
    samples: int = 0
    train_seconds: float = 0.0  # the sum over the parts of a resumed run
    evaluated: bool = True  # false: the evaluation that was due after this step was cut short


class Session:
    """built: trainer.trainer.Built.  metrics: sums that are added over the ranks, part of the state; by name."""

    def __init__(
        self, built: Any, run_dir: Path, log: RunLog, *, steps_per_epoch: int, metrics: Mapping[str, Tensor]
    ) -> None:
        self.built, self.log, self.metrics = built, log, metrics
        self.steps_per_epoch = steps_per_epoch
        config, world = built.config, built.world
        self.place = restore.place_of(run_dir, config.checkpoint.dir)
        self.saver = Saver(self.place, config.checkpoint, world, log)
        self.agreement = Agreement(world, every_minutes=config.checkpoint.every_minutes)
        self.resumed: dict[str, Any] | None = None  # for report.json
        self._wanted = NOTHING
        self._last_saved: int | None = None  # step
        self._counts = UpdateCounts(built.model.module) if config.checkpoint.count_updates else None
        self._counted_since = 0  # step
        self._touched = Touched(built.model.module) if config.checkpoint.deltas else None
        # On a GPU the copy to the host is made at once: a second stream would read what the step's writes.
        watch = config.checkpoint.background and world.device.type == "cpu"
        self._snapshot = Snapshot(fused_kernels(built.model.module)) if watch else None
        self._parent: dict[str, str] | None = None  # of the next delta: known on rank 0; None until a full one is there
        self._left_after: int | None = None  # step of the run's own checkpoint that it goes on from
        self._deltas = -1  # since the last full one of this process; -1 where it has written none

    def begin(self, resume: str | None, *, steps_total: int) -> Progress:
        """Where the run starts from: a checkpoint if it is resumed, or another run's weights if the config says so.

        steps_total: where the run is to end. UserError, before anything is changed, when the checkpoint is later.
        """
        progress = self.resume(resume, steps_total=steps_total) if resume else Progress()
        source = self.built.config.checkpoint.init_from
        if source is not None and self.resumed is None:
            chain = from_first(lambda: tools.open_at(source))
            self.log.event("message", level="info", text=f"beginning with the weights of {chain.path}")
            allowed = self.built.config.checkpoint.init_rows
            for note in together(lambda: transfer.init_from(self.built.model, chain, rows=allowed)):
                self.log.event("message", level="info", text=note)
        return progress

    def resume(self, where: str, *, steps_total: int) -> Progress:
        """Load what `where` names ("auto", or a checkpoint's path); says what it took and what it passed over."""
        harmless: list[str] = []

        def check(manifest: Manifest) -> None:
            saved = configs.validate(configs.Config, tomllib.loads(manifest.config), where="the checkpoint's config")
            fingerprint = self.built.dataset.fingerprint
            harmless[:] = restore.check_same(
                manifest, saved, self.built.config, fingerprint, where=f"step_{manifest.position.step}"
            )
            if manifest.position.step > steps_total:
                raise UserError(
                    f"the checkpoint was taken after {manifest.position.step} steps, but the config asks for "
                    f"{steps_total} in all (train.max_steps, or train.epochs); raise them, or resume from an earlier "
                    "checkpoint"
                )

        world = self.built.world
        exact = True

        def load(chain: Chain) -> None:
            nonlocal exact
            state.load(self.built.model, self.built.optimizer, chain)
            exact = state.load_own(self.built.model, world.rank, world.size, self.metrics, chain)

        chosen = restore.resume(where, self.place, load, check)
        for reason in chosen.passed_over:
            self.log.event("message", level="warning", text=f"passed over {reason}")
        if chosen.chain is None:
            self.log.event("message", level="info", text=f"no checkpoint in {self.place}: starting from the beginning")
            return Progress()
        manifest, path = chosen.chain.manifest, chosen.chain.path
        position = manifest.position
        if where == restore.AUTO or path == self.place.path(chosen.chain.name):
            self._left_after = position.step
        texts = [f"going on from {path}, after {position.step} steps"]
        if not exact:
            texts.append(
                f"it was written by {position.world_size} ranks, these are {world.size}: the same samples in the same "
                "order; sums are taken in another order, and random number generators (dropout) start anew"
            )
        texts += [f"changed since: {text}" for text in harmless]
        for text in texts:
            self.log.event("message", level="info", text=text)
        self.log.event("resume", step=position.step, path=path, passed_over=list(chosen.passed_over))
        self.resumed = {
            "step": position.step,
            "path": path,
            "world_size": position.world_size,
            "passed_over": list(chosen.passed_over),
            "changed": harmless,
        }
        self._last_saved = position.step
        values = dict(manifest.values)
        since = values.pop(COUNTED_SINCE, None)
        self._counted_since = position.step if since is None else since
        if self._counts is not None and since is None:
            self.log.event("message", level="info", text=f"updates of rows are counted from step {position.step} on")
        return Progress(step=position.step, samples=position.samples, **values)

    def leave_history(self) -> None:
        """Right before the first step: later checkpoints than the one that was loaded belong to a history that this
        run now leaves, and "auto" must not go on from them. Not when loading: the run may yet be stopped, or refused.
        """
        step = self._left_after
        if step is None:
            return
        for name in from_first(lambda: restore.set_aside_after(self.place, step)):
            self.log.event("message", level="info", text=f"set aside {name}: it is later than where this run goes on")

    def stopping(self) -> bool:
        """Whether the ranks have agreed to stop.  All call it together: after every step and every batch evaluated."""
        self._wanted = max(self._wanted, self.agreement.after_step())
        return self._wanted == STOP

    def after_step(self, progress: Progress) -> bool:
        """Save if it is time; True when the run has to stop, and is saved."""
        if self._counts is not None:
            self._counts.after_step()
        self.saver.poll()
        if self.stopping():
            self._save(progress, must=True)
            return True
        if self._wanted == SAVE or self.saver.due(progress.step):
            self._save(progress, must=False)
        return False

    def finish(self, progress: Progress) -> None:
        """The checkpoint of the end of the training: a full one, and on the disk when this returns."""
        self._save(progress, must=True, whole=True)

    def stopped(self, step: int) -> Stopped:
        return Stopped(step, self.agreement.stopped_by or "a signal to another rank")

    def _save(self, progress: Progress, *, must: bool, whole: bool = False) -> None:
        self._wanted = min(self._wanted, NOTHING) if self._wanted == SAVE else self._wanted
        pulse.mark("save", progress.step)
        self.saver.wait()
        # The last one is full; under a URL, where nothing can be replaced in one move, it may stay a delta.
        again = whole and self._deltas > 0 and not self.place.url
        if must and self._last_saved == progress.step and not again and f"step_{progress.step}" in self._names():
            return
        self.log.event("phase", name="saving")
        built = self.built
        rows: dict[Key, Tensor] = {}
        # A delta only to what this very process has written, so that both have one plan; and the last one is full.
        delta = self._touched is not None and self._deltas >= 0 and not whole
        if self.place.url and self._deltas >= built.config.checkpoint.deltas:
            delta = False  # nothing there can be replaced in one move, so deltas are not merged

        def parts() -> list[Part]:
            if self._touched is not None:
                rows.update(self._touched.take())
            found = state.parts_of(built.model, built.optimizer, fused=not delta)
            found += state.own_parts(built.model, built.world.rank, self.metrics)
            if delta:
                found += state.delta_parts(built.model, rows)
            return found + by_id.parts_of(built.model, rows if delta else None)

        def done(manifest: Manifest | None, *, ok: bool, compacted: bool) -> None:
            if not ok:
                if self._touched is not None:
                    self._touched.give_back(rows)
                return
            self._deltas = 0 if compacted or not delta else self._deltas + 1
            if manifest is not None:
                self._parent = {"name": f"step_{progress.step}", "id": manifest.id}

        compact = delta and not must and self._deltas + 1 >= self.built.config.checkpoint.deltas
        about = self._manifest(progress, delta=delta)
        self.saver.save(
            parts, about, step=progress.step, must=must, compact=compact, done=done, snapshot=self._snapshot
        )
        self._last_saved = progress.step
        self.agreement.saved()
        self.log.event("phase", name="training")

    def _names(self) -> list[str]:
        try:
            return from_first(self.place.names)
        except (OSError, UserError, RuntimeError):  # what is saved next says it
            return []

    def _manifest(self, progress: Progress, *, delta: bool) -> Any:
        built = self.built
        position = Position(
            step=progress.step,
            epoch=progress.step // self.steps_per_epoch,
            samples=progress.samples,
            world_size=built.world.size,
            config_sha256=built.config.sha256(),
            data_fingerprint=built.dataset.fingerprint,
        )
        values = {"train_seconds": progress.train_seconds, "evaluated": progress.evaluated}
        if self._counts is not None:
            values[COUNTED_SINCE] = self._counted_since
        return lambda files, tensors: Manifest(
            position=position,
            config=built.config.to_toml(),
            values=values,
            files=files,
            tensors=tensors,
            kind="delta" if delta else "full",
            parent=self._parent if delta else None,
        )


def restored(model: Any, place: Any) -> Position:
    """Fill a model's weights from the newest whole checkpoint, for evaluation and prediction."""
    chain = from_first(lambda: restore.newest(place))
    together(lambda: state.load(model, None, chain))
    return chain.manifest.position
