"""Table kinds beside each other: every kind at every byte budget with several seeds, on one config.

    plan_cells(config, dataset, kinds=..., budgets=..., seeds=...) -> (cells, refused)
    run_cells(cells, folder, ...) -> rows             trained here, or read back where they were trained before
    summary(rows, ...), write(folder, ...)            compare.json, compare.html and compare.svg

A cell is a whole config: the base config in which `fit` of the kind (sharding/tables/base.py) has chosen every table's
options for the budget.  It is trained by one rank; several cells are trained beside each other, each process taking one
after the other.  A cell's figures are kept in FOLDER/cells under a hash of its config and the data, so that a
comparison that was stopped, or gets more budgets or seeds, trains only what is missing.

Speeds: samples/s is the median of the steps' rates, the look-up's time the median over LOOKUPS of them on different
batches, and of both the median over seeds is shown.  A machine's own pace drifts by a third within minutes, so cells
are trained seed by seed: a slow minute falls on many kinds once, not on all seeds of one.
"""

import hashlib
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kernels import registry
from kernels.errors import UserError
from sharding.tables.base import ROW_TYPES, OptionError, Table
from trainer import config as configs
from trainer import report
from trainer.charts import LineChart, Series, line_chart, picture
from trainer.config import Config
from trainer.data.dataset import Dataset
from trainer.data.parquet import open_dataset
from trainer.tables import overrides_of, resolve, with_overrides

LOOKUPS, LOOKUP_BATCHES = 100, 10
ROW_TYPE = "row_type"  # of --kinds, beside the options of a kind
WARM_UP = 5  # steps and look-ups left out of times
MEASURED = 2  # raised when cells are measured in another way: those kept from before are then trained again
KIND_WIDTH = 18  # letters, of the 80 of a terminal
MOST_TICKS = 8  # of budgets, below the charts
SPREAD = ("auc", "logloss", "train_samples_per_second", "lookup_ms")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """kind: as it was asked for, options included.  budget: share of the bytes of one standard table each.
    config: of the run, as TOML.  key: names its file."""

    kind: str
    budget: float
    seed: int
    config: str
    key: str


def parse_kind(text: str) -> tuple[str, dict[str, Any]]:
    """ "unified:lookups=2:seed=5" -> ("unified", {"lookups": 2, "seed": 5}); UserError for what is not like this."""
    kind, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"--kinds {text!r}: {pair!r} is not option=value; write it as unified:lookups=2")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    registry.load("sharding.tables", kind)
    return kind, options


def plan_cells(
    config: Config, dataset: Dataset, *, kinds: Sequence[str], budgets: Sequence[float], seeds: int
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """The cells, and {"kind", "budget", "why"} of each kind and budget that cannot be.

    Seeds follow the config's, and cells come seed by seed.  Raises UserError for a kind that is unknown, has no `fit`
    or has no such options.
    """
    base = [replace(table, kind="standard", options={}) for table in resolve(config, dataset).tables]
    full = sum(table.bytes for table in base)
    cells, refused = [], []
    for text in kinds:
        kind, options = parse_kind(text)
        module = registry.load("sharding.tables", kind)
        if not hasattr(module, "fit"):
            raise UserError(f"--kinds {text!r}: {kind} has no fit(tables, budget), which finds its sizes for a budget")
        for key in (key for key in options if key in getattr(module, "FITTED", ())):
            raise UserError(f"--kinds {text!r}: a budget is what chooses {key}; leave {key} out")
        row_type = {"row_type": options.pop(ROW_TYPE)} if ROW_TYPE in options else {}
        if row_type and row_type[ROW_TYPE] not in ROW_TYPES:
            raise UserError(f"--kinds {text!r}: row_type can be {', '.join(ROW_TYPES)}")
        tables = [replace(table, kind=kind, options=options, **row_type) for table in base]
        fitting = 0
        for budget in budgets:
            try:
                fitted = module.fit(tables, round(budget * full))
                resolve(with_overrides(config, overrides_of(fitted)), dataset)  # what a cell would stumble over
            except OptionError as error:
                raise UserError(f"--kinds {text!r}: {error}") from None
            except UserError as error:
                refused.append({"kind": text, "budget": budget, "why": str(error)})
                continue
            fitting += 1
            for seed in range(config.seed, config.seed + seeds):
                cells.append(_cell(config, dataset, text, budget, seed, fitted))
        if not fitting and len(budgets) == 1 and len(kinds) == 1:
            raise UserError(refused[-1]["why"])
    return sorted(cells, key=lambda cell: cell.seed), refused


def _cell(config: Config, dataset: Dataset, kind: str, budget: float, seed: int, tables: Sequence[Table]) -> Cell:
    changed = with_overrides(config, overrides_of(tables)).model_copy(update={"seed": seed})
    text = changed.located().to_toml()
    key = hashlib.sha256(f"{text}\n{dataset.fingerprint}\n{MEASURED}".encode()).hexdigest()[:20]
    return Cell(kind=kind, budget=budget, seed=seed, config=text, key=key)


def run_cells(
    cells: Sequence[Cell], folder: Path, *, processes: int, threads: int, progress: Callable[[int, int, str], None]
) -> list[dict[str, Any]]:
    """The figures of every cell, in order.  progress(done, of, what) is called as they come.

    A cell that was trained with as many processes and threads is kept: with others its speeds are others.
    Raises UserError when a cell fails; what was finished before is kept.
    """
    kept = folder / "cells"
    kept.mkdir(parents=True, exist_ok=True)
    beside = {"processes": processes, "threads": threads}
    missing = [cell for cell in cells if _read(kept, cell, beside) is None]
    done = len(cells) - len(missing)
    if not cells:
        return []
    progress(done, len(cells), "kept from before" if done else "starting")
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(processes, len(missing)), mp_context=context, initializer=_start, initargs=(threads,)
        ) as pool:
            futures = {pool.submit(run_cell, cell): cell for cell in missing}
            try:
                for future in as_completed(futures):
                    cell = futures[future]
                    report.write_json(kept, future.result() | beside, name=f"{cell.key}.json")
                    done += 1
                    progress(done, len(cells), f"{cell.kind} at {cell.budget:g}, seed {cell.seed}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [_read(kept, cell, beside) for cell in cells]


def _read(folder: Path, cell: Cell, beside: dict[str, int]) -> dict[str, Any] | None:
    """A cell's figures under this comparison's name for it; None: missing, broken, or `beside` differs."""
    try:
        found = json.loads((folder / f"{cell.key}.json").read_text())
    except (OSError, ValueError):
        return None
    if any(found.get(key) != value for key, value in beside.items()):
        return None
    return found | {"kind": cell.kind, "budget": cell.budget, "seed": cell.seed}


def _start(threads: int) -> None:
    """Once per process: alone in its process group."""
    import torch

    from trainer import quiet
    from trainer.world import World

    quiet.install()
    torch.set_num_threads(threads)
    World.from_env().connect(timeout_seconds=300)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and evaluate one cell in this process, whose process group is up."""
    import tomllib

    from trainer.evaluate import evaluate
    from trainer.pipeline import build_pipeline
    from trainer.trainer import build, eval_splits
    from trainer.world import World

    config = configs.validate(Config, tomllib.loads(cell.config), where=f"{cell.kind} at budget {cell.budget:g}")
    world = World.from_env()
    dataset = open_dataset(config.data.path, config.data.features)
    built = build(config, dataset, config.data.path, world)
    reader = built.reader("train", batch_size=config.train.batch_size, shuffle=True)
    steps = config.train.max_steps or reader.steps_per_epoch * config.train.epochs
    pipeline = build_pipeline(
        config.train.pipeline,
        built.model,
        built.optimizer,
        device=world.device,
        schedule=config.optim.schedule,
        clip=config.optim.clip_grad_norm,
    )
    built.model.train()
    rates: list[float] = []
    batches = _endless(reader)
    try:
        for step in range(steps):
            started = time.perf_counter()
            _, _, batch = pipeline.step(batches)
            if step >= WARM_UP or steps <= WARM_UP:
                rates.append(batch.rows_in_step / (time.perf_counter() - started))
    finally:
        batches.close()
    with pipeline.paused():
        _, split = eval_splits(config, dataset)
        if split is None:
            raise UserError(f"dataset {dataset.name!r} has no split to compare on; prepare it with test = 0.2")
        test = built.eval_reader(split)
        figures = evaluate(built.model, test, built.metrics(), world=world)
        latency = _lookup_ms(built, test)
    combine = built.model.module.embeddings.combine
    dense = sum(p.numel() * p.element_size() for p in combine.parameters())

    def planned(key: str) -> int:
        return sum(table[key] for table in built.plan["tables"])

    return {
        "bytes": dense + sum(planned(key) for key in ("bytes", "id_map_bytes", "filter_bytes")),
        "table_bytes": planned("bytes"),
        "dense_bytes": dense,
        "id_map_bytes": planned("id_map_bytes"),
        "filter_bytes": planned("filter_bytes"),
        "optimizer_bytes": planned("optimizer_bytes"),
        "rows_used": _rows_used(built),
        "auc": figures["auc"],
        "logloss": figures["logloss"],
        "train_samples_per_second": statistics.median(rates),
        "lookup_ms": latency,
        "lookup_rows": test.order.batch_size,
        "steps": steps,
        "split": split,
    }


def _rows_used(built: Any) -> int:
    """Rows that stand for something at the end: of a table whose rows are given to ids, those that have been given."""
    from sharding import by_id

    embeddings = built.model.module.embeddings
    given = by_id.figures(embeddings)
    return sum(given[t.name]["ids"] if t.name in given else t.rows for t in embeddings.physical)


def _endless(reader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        with reader.batches(epoch) as batches:
            yield from batches
        epoch += 1


def _lookup_ms(built: Any, reader: Any) -> float:
    """Median milliseconds of the look-up alone, of batches of `reader`, without gradients."""
    import torch

    with reader.batches(epoch=0) as batches:
        ids = [batch.to(built.world.device).ids for batch in islice(batches, LOOKUP_BATCHES)]
    times = []
    with torch.no_grad():
        for turn in range(WARM_UP + LOOKUPS):
            started = time.perf_counter()
            built.model.module.embeddings(ids[turn % len(ids)])
            if built.world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP:])


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per kind and budget: means over seeds of AUC and log loss, medians of speeds; of each the "_range",
    [smallest, largest], and the "_spread" between them."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["budget"]), []).append(row)
    found = []
    for (kind, budget), members in groups.items():
        entry: dict[str, Any] = {"kind": kind, "budget": budget, "seeds": len(members), "bytes": members[0]["bytes"]}
        for key in SPREAD:
            values = [member[key] for member in members]
            middle = statistics.fmean(values) if key in ("auc", "logloss") else statistics.median(values)
            low, high = min(values), max(values)
            entry |= {key: middle, f"{key}_range": [low, high], f"{key}_spread": high - low}
        if all("rows_used" in member for member in members):
            entry["rows_used"] = max(member["rows_used"] for member in members)
        found.append(entry)
    return found


def result(
    config: Config, dataset: Dataset, rows: Sequence[dict[str, Any]], refused: Sequence[dict[str, Any]], full: int
) -> dict[str, Any]:
    """compare.json."""
    split = rows[0]["split"] if rows else None
    bayes = dataset.bayes.get(split or "")
    return {
        "name": config.name,
        "dataset": dataset.name,
        "source": dataset.source,
        "split": split,
        "full_bytes": full,
        "rows": list(rows),
        "summary": summary(rows),
        "refused": list(refused),
        "bayes": bayes.model_dump() if bayes else None,
        "hardware": report.hardware(),
        "versions": report.versions(),
    }


def full_bytes(config: Config, dataset: Dataset) -> int:
    """Bytes of the config's tables, were each one standard table."""
    return sum(table.bytes for table in resolve(config, dataset).tables)


def write(folder: Path, found: dict[str, Any]) -> Path:
    """FOLDER/compare.json, compare.svg and compare.html, whose path it returns."""
    report.write_json(folder, found, name="compare.json")
    if found["summary"]:
        report.write_text(folder / "compare.svg", picture(_charts(found)[:2]))
    return report.write_text(folder / "compare.html", render(found))


def render(found: dict[str, Any]) -> str:
    from trainer.words import count, figure, size

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(count=count, size=size, figure=figure, kind_lines=kind_lines)
    charts = [line_chart(chart) for chart in _charts(found)]
    beside = {(row["processes"], row["threads"]) for row in found["rows"] if "processes" in row}
    return environment.get_template("compare.html.j2").render(
        found=found,
        charts=[chart for chart in charts if chart],
        best=found["bayes"],
        by_budget=by_budget(found["summary"]),
        beside=sorted(beside),
    )


def _charts(found: dict[str, Any]) -> list[LineChart]:
    """AUC, log loss and the two speeds by byte budget."""
    kinds = list(dict.fromkeys(entry["kind"] for entry in found["summary"]))
    budgets = sorted({entry["budget"] for entry in found["summary"]})

    def series(i: int, kind: str, key: str) -> Series:
        entries = sorted((e for e in found["summary"] if e["kind"] == kind), key=lambda e: e["budget"])
        return Series(
            name=kind,
            colour=i % 8 + 1,
            dots=True,
            points=[(e["budget"], e[key]) for e in entries],
            spans=[(e["budget"], *e[f"{key}_range"]) for e in entries],
        )

    return [
        LineChart(
            title=title,
            x_label="byte budget, of the full size",
            series=[series(i, kind, key) for i, kind in enumerate(kinds)],
            format_y=digits.format,
            from_zero=from_zero,
            x_ticks=budgets if len(budgets) <= MOST_TICKS else None,
        )
        for title, key, digits, from_zero in (
            ("AUC", "auc", "{:.4f}", False),
            ("Log loss", "logloss", "{:.4f}", False),
            ("Training, samples per second", "train_samples_per_second", "{:,.0f}", True),
            ("Look-up of a batch, ms", "lookup_ms", "{:.2f} ms", True),
        )
    ]


def kind_lines(kind: str) -> list[str]:
    """A kind and its options in lines of at most KIND_WIDTH letters, cut after colons, so that tables stay narrow."""
    lines = [""]
    for part in re.split("(?<=:)", kind):
        if lines[-1] and len(lines[-1] + part) > KIND_WIDTH:
            lines.append("")
        lines[-1] += part
    return lines


def by_budget(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Largest budget first, the best AUC first within one."""
    return sorted(entries, key=lambda e: (-e["budget"], -e["auc"]))
