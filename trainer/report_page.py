"""What `report.html` says: a run folder turned into verdict, tiles, charts and tables for the template.

Everything may be missing (a run that failed while it was built has no curves, no plan, no evaluation): a part without
data is left out. Numbers become words here, layout is the template's.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from trainer import report_saves, report_tables, runlog
from trainer.charts import LineChart, Rule, Series, calibration_chart, line_chart
from trainer.words import bound_text, count, duration, figure, milliseconds, moment, percent, runs, size

SHARDING_COLOURS = {
    "data_parallel": 6,
    "table_wise": 1,
    "row_wise": 2,
    "column_wise": 3,
    "table_row_wise": 4,
    "table_column_wise": 5,
    "grid_shard": 7,
}
PHASE_COLOURS = {"data_wait": 2, "forward": 1, "backward": 3, "optimizer": 5, "other": 8}
MAP_RANKS = 16  # above it the placement of a table is words, not cells
CALIBRATION_TASKS = 6
RANK_BYTES = ("table_bytes", "optimizer_bytes", "id_map_bytes", "filter_bytes")
# The share of the way from guessing (0.5) to the best possible AUC from which a run counts as having learned.
LEARNED, LEARNED_SOME = 0.9, 0.1


def render(run_dir: Path) -> str:
    """The page of one run folder, whatever it holds."""
    return template().render(**view(run_dir))


@cache
def template() -> Template:
    """Compiled once a process, which takes half a second."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        count=count, size=size, percent=percent, figure=figure, moment=moment, bound=bound_text, ms=milliseconds
    )
    return environment.get_template("report.html.j2")


def view(run_dir: Path) -> dict[str, Any]:
    """Every value the template uses."""
    report = _json(run_dir / "report.json")
    events = runlog.events(run_dir / "metrics.jsonl")
    plan = _json(run_dir / "plan.json")
    config = run_dir / "config.toml"
    start = next((e for e in reversed(events) if e["event"] == "start"), {})
    train, evals = _by_step(events, "train"), [e for e in events if e["event"] == "eval"]
    bayes = _dict(report, "bayes") or _dict(start, "bayes")
    report.setdefault("status", "running" if events else "unknown")
    errors = [_json(path) for path in sorted(run_dir.glob("errors/rank_*.json"))]
    saves = report_saves.saves(events)
    return {
        "name": report.get("name") or start.get("run") or run_dir.resolve().name,
        "report": report,
        "verdict": _verdict(report, events, bayes),
        "facts": _facts(report, start, plan),
        "tiles": _tiles(report, start, plan, bayes),
        "charts": _charts(train, evals, bayes, report),
        "phases": _phases(report),
        "ranks": _ranks(plan),
        "foretold": [{"note": "", **row} for row in report.get("foretold") or []],
        "planner": plan.get("planner"),
        "tables": _tables(plan),
        "logical": report_tables.view(report),
        "id_maps": _dict(report, "id_maps"),
        "row_balance": report.get("row_balance") or [],
        "shardings": _shardings(plan),
        "world_size": len(plan.get("ranks") or []),
        "map_ranks": MAP_RANKS,
        "features": _features(report),
        "dense": _dense(report),
        "splits": _dict(_dict(report, "dataset"), "splits"),
        "calibration": _calibration(report),
        "tasks": _tasks(report),
        "checkpoints": saves,
        "saving": report_saves.totals(report, saves),
        "history": report_saves.history(report, events),
        "messages": [e for e in events if e["event"] == "message"],
        "errors": sorted((e for e in errors if e), key=lambda e: (e.get("kind") == "peer", e.get("time") or 0)),
        "kernels": _dict(report, "kernels"),
        "config": config.read_text(errors="replace") if config.is_file() else "",
        "versions": _dict(report, "versions"),
        "hardware": _hardware(report),
        "identity": [(k, report[k]) for k in ("config_sha256", "data_fingerprint") if report.get(k)],
    }


@dataclass(frozen=True)
class Verdict:
    tone: str  # good, fair, bad, neutral: a class of the page
    headline: str
    detail: str = ""


def _verdict(report: dict, events: list[dict], bayes: dict) -> Verdict:
    status, error = report.get("status"), _dict(report, "error")
    step = max([report.get("steps") or 0, *(e.get("step") or 0 for e in events)])
    if status == "failed":
        rank = error.get("rank")
        where = "The run failed" if rank is None else f"Rank {rank} failed"
        when = f"after step {step:,}" if step else "before its first step"
        return Verdict("bad", f"{where} {when}", str(error.get("message") or "No cause was recorded."))
    if status == "interrupted":
        detail = str(error.get("message") or "It was asked to stop; what it had learned is in its last checkpoint.")
        return Verdict("fair", f"Stopped at step {step:,}", detail)
    if status != "finished":
        steps = next((e.get("steps_total") for e in reversed(events) if e["event"] == "start"), None)
        of = f" of {steps:,}" if steps else ""
        return Verdict("neutral", f"Running: step {step:,}{of}" if events else "Nothing has been recorded yet")
    found = _dict(report, "eval")
    auc, ne = found.get("auc"), found.get("ne")
    if auc is None:
        return Verdict("neutral", f"Finished after {step:,} steps", "There was no evaluation with an AUC.")
    split = str(found.get("split") or "test").capitalize()
    best = bayes.get("auc")
    if best is None or best <= 0.5:
        tone, words = ("good", "it learned") if ne is not None and ne < 0.995 else ("bad", "it did not learn")
        worse = "" if ne is None else f"Log loss is {100 * abs(1 - ne):.1f}% {'below' if ne < 1 else 'above'} guessing"
        return Verdict(tone, f"{split} AUC {auc:.4f} — {words}", worse and f"{worse} the base rate for every row.")
    share = (auc - 0.5) / (best - 0.5)
    gap = f"{abs(best - auc):.4f} {'below' if auc <= best else 'above'} the best possible {best:.4f}"
    if share >= LEARNED:
        tone, words = "good", "it learned"
    elif share >= LEARNED_SOME:
        tone, words = "fair", "it learned some of what there is"
    else:
        tone, words = "bad", "it did not learn"
    detail = (
        f"That is {100 * share:.1f}% of the way from guessing (0.5) to the best that any model can reach on this data."
    )
    return Verdict(tone, f"{split} AUC {auc:.4f}, {gap} — {words}", detail)


def _facts(report: dict, start: dict, plan: dict) -> list[str]:
    """The line under the name: data, size, place, time."""
    world_size, device = (
        report.get("world_size") or start.get("world_size"),
        report.get("device") or start.get("device"),
    )
    samples, dataset = report.get("samples_seen"), _dict(report, "dataset")
    facts = [
        dataset.get("name") and f"data: {dataset['name']}",
        samples and f"{samples:,} samples",
        report.get("steps") and f"{report['steps']:,} steps",
        world_size and f"{world_size} {'rank' if world_size == 1 else 'ranks'} on {device or 'an unnamed device'}",
        plan.get("tables") and f"{len(plan['tables']):,} {'table' if len(plan['tables']) == 1 else 'tables'}",
        report.get("started") and moment(report["started"]),
    ]
    return [fact for fact in facts if fact]


def _tiles(report: dict, start: dict, plan: dict, bayes: dict) -> list[dict[str, str]]:
    found, train, step_ms = _dict(report, "eval"), _dict(report, "train"), _dict(_dict(report, "train"), "step_ms")
    tiles = []

    def tile(label: str, value: str | None, note: str = "") -> None:
        if value is not None:
            tiles.append({"label": label, "value": value, "note": note})

    auc, best, bound = found.get("auc"), bayes.get("auc"), found.get("auc_error_bound")
    split = str(found.get("split") or "test")
    if auc is not None:
        tile(f"{split} AUC", figure(auc), "" if bound is None else f"exact to ±{bound_text(bound)}")
    if auc is not None and best is not None:
        sample = bayes.get("sample_auc")
        drawn = "" if sample is None else f" ({sample:.4f} on these rows)"
        tile("below the best possible" if auc <= best else "above the best possible", figure(abs(best - auc)),
             f"best possible {best:.4f}{drawn}")  # fmt: skip
    if found.get("ne") is not None:
        tile("normalised entropy", figure(found["ne"]), f"log loss {figure(found.get('logloss'))}; 1 is guessing")
    if found.get("calibration") is not None:
        tile("calibration", figure(found["calibration"], 3), "predicted ÷ actual; 1 is right")
    rate = train.get("samples_per_second")
    if rate is not None:
        tile("samples per second", count(rate), f"{count(report.get('samples_seen'))} samples")
    if step_ms.get("p50") is not None:
        tail = f"p90 {milliseconds(step_ms.get('p90'))}, p99 {milliseconds(step_ms.get('p99'))}"
        tile("median step", milliseconds(step_ms["p50"]), tail)
    peak = _dict(report, "memory").get("peak_bytes")
    if peak is not None:
        tile("peak memory of a rank", size(peak), f"tables {size(_table_bytes(start, plan))} in all")
    if train.get("seconds") is not None:
        started, finished = report.get("started"), report.get("finished")
        whole = f"{duration(finished - started)} from start to end" if started and finished else ""
        tile("training time", duration(train["seconds"]), whole)
    return tiles


def _table_bytes(start: dict, plan: dict) -> float | None:
    if start.get("table_bytes") is not None:
        return start["table_bytes"]
    return sum(t.get("bytes") or 0 for t in plan["tables"]) if plan.get("tables") else None


def _charts(train: list[dict], evals: list[dict], bayes: dict, report: dict) -> list[Markup]:
    best_auc, best_ne = bayes.get("auc"), _bayes_ne(report, bayes)
    charts = [
        line_chart(LineChart(
            title="AUC", x_label="step", format_y="{:.4f}".format, series=_curves("auc", train, evals),
            rules=[] if best_auc is None else [Rule(value=best_auc, label=f"best possible {best_auc:.4f}")],
        )),
        line_chart(LineChart(
            title="Normalised entropy", x_label="step", format_y="{:.4f}".format, series=_curves("ne", train, evals),
            rules=[] if best_ne is None else [Rule(value=best_ne, label=f"best possible {best_ne:.4f}", above=False)],
        ))
        or line_chart(LineChart(
            title="Loss", x_label="step", format_y="{:.4f}".format, series=_curves("loss", train, []),
        )),
        line_chart(LineChart(
            title="Throughput, samples per second", x_label="step", format_y="{:,.0f}".format, from_zero=True,
            series=[Series(name="samples per second", colour=3, points=_points(train, "samples_per_second"))],
        )),
        line_chart(LineChart(
            title="Step time, ms", x_label="step", format_y="{:.2f} ms".format, from_zero=True,
            series=[
                Series(name="median step", colour=1, points=_points(train, "step_ms_p50")),
                Series(name="waiting for data", colour=2, points=_points(train, "data_wait_ms")),
            ],
        )),
    ]  # fmt: skip
    return [chart for chart in charts if chart]


def _bayes_ne(report: dict, bayes: dict) -> float | None:
    """The best possible NE: the best log loss over the entropy of the evaluated rows' base rate (log loss / NE)."""
    found = _dict(report, "eval")
    if not (bayes.get("logloss") and found.get("ne") and found.get("logloss")):
        return None
    return bayes["logloss"] * found["ne"] / found["logloss"]


def _curves(key: str, train: list[dict], evals: list[dict]) -> list[Series]:
    """Train as a line; each evaluated split in its own colour, a split seen once as a point."""
    series = [Series(name="train", colour=1, points=_points(train, key))]
    splits = list(dict.fromkeys(str(e.get("split")) for e in evals))
    for colour, split in zip((2, 3, 4, 5), splits, strict=False):
        points = _points(_last_of_step([e for e in evals if str(e.get("split")) == split]), key)
        series.append(Series(name=split, colour=colour, points=points, dots=len(points) <= 40))
    return [s for s in series if s.points]


def _points(events: list[dict], key: str) -> list[tuple[float, float]]:
    return [(e["step"], e[key]) for e in events if isinstance(e.get(key), (int, float)) and e.get("step") is not None]


def _phases(report: dict) -> list[dict[str, Any]]:
    phases = {k: v for k, v in _dict(_dict(report, "train"), "phases_ms").items() if v}
    total = sum(phases.values())
    return [
        {
            "name": name.replace("_", " "),
            "colour": PHASE_COLOURS.get(name, 7),
            "share": value / total,
            "text": milliseconds(value),
        }
        for name, value in phases.items()
    ]


def _ranks(plan: dict) -> list[dict[str, Any]]:
    """Per rank a bar of its shards, largest first, in units of the fullest rank."""
    ranks = plan.get("ranks") or []
    fullest = max((sum(r.get(key) or 0 for key in RANK_BYTES) for r in ranks), default=0)
    if not fullest:
        return []
    shards: dict[int, list[dict]] = {r["rank"]: [] for r in ranks}
    for table in plan.get("tables") or []:
        colour = SHARDING_COLOURS.get(table.get("sharding"), 8)
        for shard in table.get("shards") or []:
            share = (shard.get("bytes") or 0) / fullest
            tip = f"{table['name']} · {_part(table, shard)} · {size(shard.get('bytes'))}"
            shards.setdefault(shard["rank"], []).append(
                {"name": table["name"], "share": share, "colour": colour, "tip": tip}
            )
    found = []
    for r in ranks:
        tables, optimizer, *maps = (r.get(key) or 0 for key in RANK_BYTES)
        tip = f"optimizer state · {size(optimizer)}" + (
            f"; id maps and filters · {size(sum(maps))}" if any(maps) else ""
        )
        found.append(
            {
                "rank": r["rank"],
                "device": r.get("device") or "",
                "shards": sorted(shards[r["rank"]], key=lambda s: -s["share"]),
                "optimizer": {"share": (optimizer + sum(maps)) / fullest, "tip": tip},
                "maps": any(maps),
                "text": size(tables + optimizer + sum(maps)),
            }
        )
    return found


def _part(table: dict, shard: dict) -> str:
    """Which part of a table a shard is."""
    rows, cols = shard.get("rows"), shard.get("cols")
    if not rows or not cols:
        return str(table.get("sharding"))
    all_rows, all_cols = rows == [0, table.get("rows")], cols == [0, table.get("dim")]
    if all_rows and all_cols:
        return "whole table"
    words = [] if all_rows else [f"rows {rows[0]:,} to {rows[1]:,}"]
    return ", ".join(words if all_cols else [*words, f"columns {cols[0]} to {cols[1]}"])


def _tables(plan: dict) -> list[dict[str, Any]]:
    tables = plan.get("tables") or []
    world_size = len(plan.get("ranks") or [])
    largest = max((t.get("bytes") or 0 for t in tables), default=0) or 1
    found = []
    for t in tables:
        shards = t.get("shards") or []
        used = sorted({s["rank"] for s in shards})
        cells = []
        for rank in range(world_size if world_size <= MAP_RANKS else 0):
            mine = [s for s in shards if s["rank"] == rank]
            held = sum(s.get("bytes") or 0 for s in mine)
            tip = "; ".join(_part(t, s) for s in mine) or "nothing of it"
            cells.append({"share": held, "tip": f"rank {rank}: {tip} · {size(held)}"})
        most = max((c["share"] for c in cells), default=0) or 1
        for cell in cells:
            cell["share"] = max(cell["share"] / most, 0.15) if cell["share"] else 0  # a sliver can be seen
        found.append(
            {
                "name": t["name"],
                "rows": t.get("rows"),
                "dim": t.get("dim"),
                "kind": t.get("kind") or "standard",
                "features": t.get("features") or [],
                "sharding": str(t.get("sharding")).replace("_", " "),
                "colour": SHARDING_COLOURS.get(t.get("sharding"), 8),
                "bytes": t.get("bytes"),
                "optimizer_bytes": t.get("optimizer_bytes"),
                "share": (t.get("bytes") or 0) / largest,
                "cells": cells,
                "ranks": runs(used),
                "shards": len(shards),
            }
        )
    return found


def _shardings(plan: dict) -> list[tuple[str, int]]:
    """The sharding types in use with their colours, for the legend."""
    used = dict.fromkeys(str(t.get("sharding")) for t in plan.get("tables") or [])
    return [(name.replace("_", " "), SHARDING_COLOURS.get(name, 8)) for name in used]


def _features(report: dict) -> list[dict[str, Any]]:
    found = []
    for f in _dict(report, "dataset").get("features") or []:
        stats = _dict(f, "stats")
        bags, ids, shares = stats.get("rows"), stats.get("ids"), _dict(stats, "top_share")
        found.append(
            {
                "name": f.get("name"),
                "cardinality": f.get("cardinality"),
                "multi_hot": bool(f.get("multi_hot")),
                "ids": f.get("ids") or "",
                "distinct": stats.get("distinct"),
                "estimate": bool(stats.get("distinct_is_estimate")),
                "per_bag": ids / bags if bags and ids is not None else None,
                "max_per_bag": stats.get("max_per_bag"),
                "missing": stats["missing"] / bags if bags and stats.get("missing") is not None else None,
                "unseen": stats["unseen"] / ids if ids and stats.get("unseen") is not None else None,
                "top": [(n, shares.get(n)) for n in ("1", "10", "100", "1000")],
            }
        )
    return found


def _dense(report: dict) -> list[dict[str, Any]]:
    found = []
    for d in _dict(report, "dataset").get("dense") or []:
        d = {"name": d} if isinstance(d, str) else d
        transform = d.get("transform") or {}
        words = [
            k if v is True else f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in transform.items()
        ]
        found.append(
            {
                "name": d.get("name"),
                "missing": d.get("missing"),
                "mean": d.get("mean"),
                "std": d.get("std"),
                "transform": ", ".join(words),
            }
        )
    return found


def _calibration(report: dict) -> list[Markup]:
    found = _dict(report, "eval")
    tasks = {k: v for k, v in _dict(found, "tasks").items() if _dict(_dict(found, "tasks"), k).get("calibration_bins")}
    if len(tasks) > 1:
        first = list(tasks.items())[:CALIBRATION_TASKS]
        return [calibration_chart(title=f"Calibration of {task}", bins=t["calibration_bins"]) for task, t in first]
    chart = calibration_chart(title="Calibration", bins=found.get("calibration_bins") or [])
    return [chart] if chart else []


def _tasks(report: dict) -> list[dict[str, Any]]:
    """One row per task when there are several."""
    tasks = _dict(_dict(report, "eval"), "tasks")
    return [{"name": name, **values} for name, values in tasks.items()] if len(tasks) > 1 else []


def _hardware(report: dict) -> dict[str, str]:
    found = {}
    for key, value in _dict(report, "hardware").items():
        if key == "gpus":
            gpus = [
                f"{g['name']} ({size(g.get('memory_bytes'))})" if isinstance(g, dict) else str(g) for g in value or []
            ]
            found["GPUs"] = ", ".join(gpus) or "none"
        elif key.endswith("_bytes"):
            found[key.removesuffix("_bytes").replace("_", " ")] = size(value)
        else:
            found["CPU" if key == "cpu" else key.replace("_", " ")] = str(value)
    return found


def _dict(value: dict, key: str) -> dict:
    """value[key] when it is a dict, else an empty one."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict:
    """A JSON object of the run folder, or {} when it is not there or was cut off while it was written."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _by_step(events: list[dict], kind: str) -> list[dict]:
    return _last_of_step([e for e in events if e["event"] == kind])


def _last_of_step(events: list[dict]) -> list[dict]:
    """Sorted by step, the last of each: a resumed run writes the steps after its checkpoint a second time."""
    last = {e["step"]: e for e in events if isinstance(e.get("step"), int)}
    return [last[step] for step in sorted(last)]
