"""Build a run and train it: the whole loop.

train(config, run_dir, world)              what `tablemesh train` runs on every rank
evaluate_run, predict_run                  a trained run again, on any dataset with its columns
"""

import contextlib
import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kernels.errors import UserError
from kernels.interaction import DotInteraction
from sharding import by_id
from sharding.compute_kernel import kernels_of
from sharding.parallelize import parallelize
from sharding.plan import plan_task
from sharding.row_balance import row_balance
from trainer import pulse, report, report_tables, restarts
from trainer.checkpoint import lock
from trainer.checkpoint.restore import place_of
from trainer.checkpoint.session import Progress, Session, Stopped, restored
from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.dataset import Dataset
from trainer.data.parquet import Reader, open_dataset
from trainer.evaluate import Stopping, evaluate, predict
from trainer.foretold import foretold, measured
from trainer.metrics import BITS, WINDOW_BITS, Metrics, StepTimer, peak_memory_bytes
from trainer.models.base import init_dense
from trainer.optim.base import build_optimizer, table_update
from trainer.pipeline import Pipeline, build_pipeline
from trainer.planning import cluster_of, constraints_of, limits_of, on_meta, work_of_config
from trainer.precision import Precision
from trainer.precision import choose as choose_precision
from trainer.profile import Profile
from trainer.rowlog import RowLog
from trainer.runlog import RunLog
from trainer.tables import ResolvedTables
from trainer.task import TrainTask
from trainer.world import World

WARM_UP_STEPS = 3  # left out of step times: buffers are made and pipelines fill


@dataclass(frozen=True, kw_only=True)
class Built:
    """A sharded model and what belongs to it, the same in training, evaluation and prediction."""

    config: Config
    dataset: Dataset
    folder: Path  # of the dataset
    tables: ResolvedTables
    model: nn.Module  # DistributedModelParallel over a TrainTask
    optimizer: Any
    plan: dict[str, Any]  # plan.json
    precision: Precision
    world: World

    def reader(self, split: str, *, batch_size: int, shuffle: bool, any_label: bool = False) -> Reader:
        data = self.config.data
        return Reader(
            self.folder,
            self.dataset,
            split,
            batch_size=batch_size,
            streams=data.streams,
            seed=self.config.seed,
            shuffle_window=data.shuffle_window,
            shuffle=shuffle,
            rank=self.world.rank,
            world_size=self.world.size,
            rows_by_feature=self.tables.reader_rows,
            id_policy=self.tables.policy,
            table_by_feature={f: t.name for t in self.tables.tables for f in t.features},
            any_label=any_label,
            threads=data.threads,
            prefetch=data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )

    def eval_reader(self, split: str, *, any_label: bool = False) -> Reader:
        batch_size = self.config.eval.batch_size or self.config.train.batch_size
        return self.reader(split, batch_size=batch_size, shuffle=False, any_label=any_label)

    def metrics(self, *, bits: int = BITS) -> Metrics:
        return Metrics(self.dataset.labels, self.world.device, bits=bits)


def build(config: Config, dataset: Dataset, folder: Path, world: World, *, training: bool = True) -> Built:
    """Tables -> model on the meta device -> plan -> sharded model with its initial weights -> optimizer.

    training: take plan.file where the config has one; afterwards any plan will do, on any number of ranks.
    """
    model = on_meta(config, dataset)
    weights, labels = config.train.task_weights, dataset.labels
    if weights is not None and len(weights) != len(labels):
        raise UserError(
            f"train.task_weights = {list(weights)} has {len(weights)} values, but the data has {len(labels)} labels "
            f"({', '.join(labels)}); give one weight for each, in this order"
        )
    precision = choose_precision(config.train.precision, world.device)
    task = TrainTask(
        model.embeddings,
        model.net,
        world_size=world.size,
        device=world.device,
        loss=config.train.loss,
        task_weights=weights,
        bf16=precision.is_bf16,
        dense_names=[d.name for d in dataset.dense],
    )
    work = work_of_config(config, dataset, model, device=world.device.type)
    cluster = cluster_of(config, world_size=world.size, local_world_size=world.local_size, device=world.device.type)
    planned = plan_task(
        task,
        work,
        cluster,
        constraints=constraints_of(config, device=world.device.type),
        limits=limits_of(config, cluster),
        file=config.plan.file if training else None,
    )
    plan = planned.sharding
    sharded = parallelize(
        task,
        plan,
        device=world.device,
        seed=config.seed,
        init_dense=init_dense,
        output=torch.bfloat16 if precision.is_bf16 else torch.float32,
        id_map=config.kernels.id_map,
        **table_update(config.optim, plan, device=world.device, kernel=config.kernels.embedding_bag),
    )
    return Built(
        config=config,
        dataset=dataset,
        folder=folder,
        tables=model.tables,
        model=sharded,
        optimizer=build_optimizer(config.optim, sharded),
        plan=planned.described,
        precision=precision,
        world=world,
    )


def train(
    config: Config,
    run_dir: Path,
    world: World,
    *,
    resume: str | None = None,
    profiled: bool = False,
    rows: str | None = None,
) -> dict[str, Any]:
    """Train to the end and evaluate; the run folder is then as docs/architecture.md lists it. Returns the report.

    profiled: trace a few steps (trainer/profile.py).
    resume: go on from a checkpoint: "auto" for the run's newest valid one, or a checkpoint's path.
    rows: a folder in which every step's rows are written down (trainer/rowlog.py).
    Raises Stopped when a signal has stopped the run and it is saved.
    """
    log = None
    try:
        note = lock.acquire(run_dir) if world.is_first else None
        log = RunLog(run_dir, enabled=world.is_first, tensorboard=config.run.tensorboard)
        if note:
            log.event("message", level="warning", text=note)
        return _train(config, run_dir, world, log, resume=resume, profiled=profiled, rows=rows)
    finally:
        if log is not None:
            log.close()
        if world.is_first:
            lock.release(run_dir)


def _train(
    config: Config,
    run_dir: Path,
    world: World,
    log: RunLog,
    *,
    resume: str | None,
    profiled: bool,
    rows: str | None,
) -> dict[str, Any]:
    started, began = time.time(), time.monotonic()
    _seed(config.seed, world.rank)
    log.event("phase", name="building")
    dataset = open_dataset(config.data.path, config.data.features)
    _check_labels(dataset, "training")
    built = build(config, dataset, config.data.path, world)
    reader = built.reader("train", batch_size=config.train.batch_size, shuffle=True)
    during, final = eval_splits(config, dataset)
    steps_total = config.train.max_steps or reader.steps_per_epoch * config.train.epochs
    result = _first_report(built, run_dir, started) | {"status": "running"}
    result["tables"] = report_tables.tables(built.plan, result, built.config.optim.sparse.kind)
    if world.is_first:
        report.write_json(run_dir, result)
        report.write_json(run_dir, built.plan, name="plan.json")
    bayes = dataset.bayes.get(final or "")
    log.event(
        "start",
        run=run_dir.name,
        world_size=world.size,
        device=str(world.device.type),
        steps_total=steps_total,
        steps_per_epoch=reader.steps_per_epoch,
        epochs=-(-steps_total // reader.steps_per_epoch),
        batch_size=config.train.batch_size,
        train_rows=reader.rows,
        tables=len(built.tables.tables),
        table_bytes=sum(t["bytes"] for t in built.plan["tables"]),
        bayes=bayes.model_dump() if bayes else None,
    )

    profile = Profile(run_dir, world.rank) if profiled else None
    total, window = StepTimer(), StepTimer()
    window_metrics, eval_metrics = built.metrics(bits=WINDOW_BITS), built.metrics()
    during_reader = built.eval_reader(during) if during and config.eval.every else None
    final_reader = built.eval_reader(final) if final else None
    window_loss = torch.zeros((), device=world.device)  # sum over the window's steps, of this rank's share
    sums = {"window": window_metrics.sums, "window_loss": window_loss}
    session = Session(built, run_dir, log, steps_per_epoch=reader.steps_per_epoch, metrics=sums)
    start = session.begin(resume, steps_total=steps_total)
    pipeline = build_pipeline(
        config.train.pipeline,
        built.model,
        built.optimizer,
        device=world.device,
        schedule=config.optim.schedule,
        clip=config.optim.clip_grad_norm,
        first_step=start.step,
    )
    row_log = RowLog(Path(rows), world.rank) if rows else None
    progress, evaluated = start, None
    session.agreement.listen()

    def evaluate_now(step: int) -> None:
        with pipeline.paused():
            _log_eval(log, built, session, step, during, during_reader, eval_metrics, max_rows=config.eval.max_rows)

    built.model.train()
    log.event("phase", name="training")
    session.leave_history()
    batches = _endless(reader, start.step)
    try:
        if during_reader and 0 < start.step < steps_total and not start.evaluated:
            evaluate_now(start.step)
        for step in range(start.step + 1, steps_total + 1):
            if profile:
                profile.before_step()
            tick = time.perf_counter()
            loss, logits_BT, batch = pipeline.step(batches)
            window_loss.add_(loss, alpha=1 / world.size)
            window_metrics.update(logits_BT, batch.labels_BT, batch.weight_B)
            seconds, samples = time.perf_counter() - tick, progress.samples + batch.rows_in_step
            if profile:
                profile.after_step(seconds)
            warm = step - start.step > WARM_UP_STEPS or steps_total - start.step <= WARM_UP_STEPS
            for timer in (total, window) if warm else ():
                timer.add(seconds=seconds, samples=batch.rows_in_step, phases=_seconds(pipeline))
            train_seconds = start.train_seconds + total.seconds
            progress = Progress(step=step, samples=samples, train_seconds=train_seconds)

            if row_log is not None:
                row_log.add(step, batch.row_B)
            pulse.mark("logging", step)
            if step % config.train.log_every == 0 or step == steps_total:
                _log_train(log, built, step, samples, reader.steps_per_epoch, window, window_metrics, window_loss)
            if during_reader and step % config.eval.every == 0 and step < steps_total:
                progress = replace(progress, evaluated=False)
                with contextlib.suppress(Stopping):
                    evaluate_now(step)
                    progress = replace(progress, evaluated=True)
            if session.after_step(progress) and step < steps_total:
                raise _stopped(run_dir, result, session, progress)
    finally:
        batches.close()
    if profile:
        profile.close()

    session.finish(progress)
    try:
        if final_reader:
            with pipeline.paused():
                evaluated = _log_eval(
                    log, built, session, steps_total, final, final_reader, eval_metrics, final_one=True
                )
                result["row_balance"] = _row_balance(built, final_reader)
    except Stopping:
        raise _stopped(run_dir, result, session, progress) from None
    pulse.mark("finishing", steps_total)
    result |= {
        "status": "finished",
        "finished": time.time(),
        "samples_seen": progress.samples,
        "steps": progress.step,
        "train": total.summary() | {"seconds": progress.train_seconds},
        "eval": {"split": final, **evaluated} if evaluated else None,
        "bayes": bayes.model_dump() if bayes else None,
        "memory": measured(built.model, built.optimizer, world),
        **_id_maps(built),
        "checkpoints": session.saver.totals.as_json(),
        "resumed": session.resumed,
        "restarts": restarts.read(run_dir),
    }
    result["foretold"] = foretold(built.plan, result)
    result["tables"] = report_tables.tables(built.plan, result, built.config.optim.sparse.kind)
    log.event("end", status="finished", seconds=time.monotonic() - began)
    if world.is_first:
        report.write_json(run_dir, result)
        report.write_html(run_dir)
    return result


def evaluate_run(config: Config, run_dir: Path, world: World, *, dataset: str | None, split: str | None) -> dict:
    """Metrics of the run's newest checkpoint on a split, with the best possible ones where the data knows them."""
    built = _restored(config, run_dir, world, dataset)
    _check_labels(built.dataset, "evaluating")
    split = split or _last_split(config, built.dataset)
    figures = evaluate(built.model, built.eval_reader(split), built.metrics(), world=world)
    bayes = built.dataset.bayes.get(split)
    return {
        "run": run_dir.name,
        "dataset": str(built.folder),
        "split": split,
        **figures,
        "bayes": bayes.model_dump() if bayes else None,
    }


def predict_run(config: Config, run_dir: Path, world: World, *, dataset: str, split: str | None, out: Path) -> dict:
    """Predictions of the run's newest checkpoint for every row of a split, in a Parquet file."""
    built = _restored(config, run_dir, world, dataset)
    split = split or _last_split(config, built.dataset)
    figures = predict(
        built.model,
        built.eval_reader(split, any_label=True),
        out,
        tasks=built.dataset.labels,
        streams=config.data.streams,
        labelled=built.dataset.labelled,
        world=world,
    )
    return figures | {"split": split}


def eval_splits(config: Config, dataset: Dataset) -> tuple[str | None, str | None]:
    """(split evaluated during training, split evaluated at the end); None where the dataset has neither.

    UserError for a split that the config names and the dataset lacks.
    """
    for asked in (config.eval.split, config.eval.final_split):
        if asked is not None:
            dataset.split(asked)
    there = [s for s in ("valid", "test") if s in dataset.splits and dataset.splits[s].rows]
    during = config.eval.split or (there[0] if there else None)
    final = config.eval.final_split or (there[-1] if there else None)
    return during, final


def _last_split(config: Config, dataset: Dataset) -> str:
    """What eval and predict read where nobody says: the split evaluated at the end of the run if it is there."""
    there = [name for name in (config.eval.final_split, "test", "valid", "train") if name in dataset.splits]
    return there[0] if there else "test"


def _check_labels(dataset: Dataset, doing: str) -> None:
    if not dataset.labelled:
        raise UserError(
            f"dataset {dataset.name!r} has no labels, which {doing} needs; `tablemesh predict` works without, "
            f"or prepare it from a source with the column {', '.join(dataset.labels)}"
        )


def _restored(config: Config, run_dir: Path, world: World, dataset: str | None) -> Built:
    """The model of a run with the weights of its newest checkpoint, on the run's dataset or another of its columns."""
    trained_on = open_dataset(config.data.path, config.data.features)
    folder = Path(dataset) if dataset else config.data.path
    other = trained_on
    if dataset and folder.resolve() != config.data.path.resolve():
        other = open_dataset(folder, config.data.features)
        _check_columns(trained_on, config.data.path, other, folder)
    built = build(config, trained_on, folder, world, training=False)
    restored(built.model, place_of(run_dir, config.checkpoint.dir))
    return Built(**{**vars(built), "dataset": other})


def _check_columns(trained_on: Dataset, like: Path, other: Dataset, folder: Path) -> None:
    """UserError unless `other` has the columns that the model was trained on, in the same order, encoded alike."""
    for what, ours, theirs in (
        ("labels", trained_on.labels, other.labels),
        ("dense columns", tuple(d.name for d in trained_on.dense), tuple(d.name for d in other.dense)),
        ("features", trained_on.feature_names, other.feature_names),
    ):
        if ours != theirs:
            odd = sorted(set(ours) ^ set(theirs)) or "the order"
            raise UserError(
                f"dataset {folder} has other {what} than {like}, on which the run was trained "
                f"(they differ in {odd}); make it with `tablemesh prepare SOURCE DEST --like {like}`"
            )
    if trained_on.encoding and other.encoding and trained_on.encoding != other.encoding:
        raise UserError(
            f"dataset {folder} numbers its ids in another way than {like}, on which the run was trained, so the "
            "model would look up other rows; "
            f"make it with `tablemesh prepare SOURCE DEST --like {like}`"
        )


def _seed(seed: int, rank: int) -> None:
    """Begin the generators that a model may draw from (dropout): each rank its own, the same in every run."""
    number = zlib.crc32(f"{seed}/{rank}".encode())
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _endless(reader: Reader, first_step: int) -> Iterator[Batch]:
    """The reader's epochs one after the other, so that the pipeline does not run dry between them; from a step on."""
    epoch, step = divmod(first_step, reader.steps_per_epoch)
    while True:
        with reader.batches(epoch, step) as batches:
            yield from batches
        epoch, step = epoch + 1, 0


def _seconds(pipeline: Pipeline) -> dict[str, float]:
    return {name: ms / 1e3 for name, ms in pipeline.phases_ms.items() if ms is not None and name != "other"}


def _log_train(
    log: RunLog,
    built: Built,
    step: int,
    samples: int,
    steps_per_epoch: int,
    timer: StepTimer,
    metrics: Metrics,
    loss_sum: torch.Tensor,
) -> None:
    """Log what happened since the last such line, and begin the next window: metrics, timer and loss_sum are reset."""
    steps = (step - 1) % built.config.train.log_every + 1
    dist.all_reduce(loss_sum)
    figures = metrics.all_reduce().compute()
    metrics.reset()
    summary = timer.summary()
    timer.reset()
    log.event(
        "train",
        epoch=(step - 1) // steps_per_epoch,
        step=step,
        samples=samples,
        loss=loss_sum.item() / steps,
        **{key: figures[key] for key in ("ne", "auc", "calibration")},
        lr_factor=built.config.optim.schedule.factor(step - 1),
        samples_per_second=summary["samples_per_second"],
        step_ms_p50=summary["step_ms"]["p50"],
        data_wait_ms=summary["phases_ms"].get("data_wait"),
        memory_bytes=peak_memory_bytes(built.world.device),
        **_id_maps(built),
    )
    loss_sum.zero_()


def _log_eval(
    log: RunLog,
    built: Built,
    session: Session,
    step: int,
    split: str,
    reader: Reader,
    metrics: Metrics,
    *,
    max_rows: int | None = None,
    final_one: bool = False,
) -> dict[str, Any]:
    log.event("phase", name="evaluating")
    figures = evaluate(
        built.model,
        reader,
        metrics,
        world=built.world,
        max_rows=max_rows,
        stopping=session.stopping,
        step=step,
    )
    shown = {k: v for k, v in figures.items() if k not in ("tasks", "calibration_bins")}
    log.event("eval", step=step, split=split, final=final_one, **shown)
    log.event("phase", name="training")
    return figures


def _stopped(run_dir: Path, result: dict[str, Any], session: Session, progress: Progress) -> Stopped:
    """The end of a run that a signal has stopped and that is saved; its report says so."""
    stopped = session.stopped(progress.step)
    result |= {
        "status": "interrupted",
        "error": {"rank": None, "kind": "interrupted", "message": str(stopped)},
        "finished": time.time(),
        "samples_seen": progress.samples,
        "steps": progress.step,
        "checkpoints": session.saver.totals.as_json(),
        "resumed": session.resumed,
    }
    session.log.event("end", status="interrupted", seconds=time.time() - result["started"])
    if session.built.world.is_first:
        report.write_json(run_dir, result)
        report.write_html(run_dir)
    return stopped


def _row_balance(built: Built, reader: Reader) -> list[dict[str, Any]]:
    """Of the reader's first batch: where the look-ups of tables that are split by rows fall."""
    with reader.batches(epoch=0) as batches:
        ids = next(iter(batches)).to(built.world.device).ids
    return row_balance(built.model.module.embeddings, ids, built.plan)


def _id_maps(built: Built) -> dict[str, Any]:
    """What the id maps of the tables that have one have done so far; nothing where there are none."""
    found = by_id.figures(built.model.module.embeddings)
    return {"id_maps": found} if found else {}


def _first_report(built: Built, run_dir: Path, started: float) -> dict[str, Any]:
    """What is known of a run before its first step."""
    dataset = built.dataset
    return {
        "name": run_dir.name,
        "error": None,
        "started": started,
        "world_size": built.world.size,
        "device": built.world.device.type,
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "splits": {name: split.rows for name, split in dataset.splits.items()},
            "features": [c.model_dump(mode="json") for c in dataset.categorical],
            "dense": [d.model_dump(mode="json") for d in dataset.dense],
        },
        "kernels": {"embedding_bag": _embedding_kernel(built), **_interaction_kernel(built), **_id_map_kernel(built)},
        "precision": {"name": built.precision.name, "why": built.precision.why},
        "versions": report.versions(),
        "hardware": report.hardware(),
        "config_sha256": built.config.sha256(),
        "data_fingerprint": dataset.fingerprint,
    }


def _interaction_kernel(built: Built) -> dict[str, dict[str, str]]:
    """Which kernel makes the model's dots, and why; nothing for a model without."""
    found = [m for m in built.model.module.modules() if isinstance(m, DotInteraction)]
    choices = {choice.name: choice.why for choice in (m.choice(built.world.device) for m in found)}
    return {"interaction": {"backend": ", ".join(choices), "why": "; ".join(choices.values())}} if choices else {}


def _id_map_kernel(built: Built) -> dict[str, dict[str, str]]:
    """Which kernel gives ids their rows on this rank, and why; nothing where no table here has such rows."""
    choices = by_id.id_map_choices(built.model.module.embeddings)
    return {"id_map": {"backend": ", ".join(choices), "why": "; ".join(choices.values())}} if choices else {}


def _embedding_kernel(built: Built) -> dict[str, str]:
    """Which kernel looks up this rank's tables, and why."""
    own = kernels_of(built.model.module)
    if own:
        choices = {kernel.bags.choice.name: kernel.bags.choice.why for kernel in own}
        return {"backend": ", ".join(choices), "why": "; ".join(dict.fromkeys(choices.values()))}
    if any(t["sharding"] != "data_parallel" for t in built.plan["tables"]):
        asked = built.config.kernels.embedding_bag
        why = "asked for" if asked == "fbgemm" else f"the fastest on {built.world.device.type}"
        return {"backend": "fbgemm", "why": f"{why}: TorchRec's own kernel, with the optimizer in its backward"}
    return {"backend": "torchrec dense", "why": "all tables are data_parallel"}
