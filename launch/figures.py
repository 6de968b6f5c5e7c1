"""The key figures of a run, as the command line prints them at its end."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from launch.progress import count, size


def table(report: dict[str, Any]) -> Table:
    """Rows of name and value out of report.json; what the report does not have is left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    found, bayes, train = report.get("eval") or {}, report.get("bayes") or {}, report.get("train") or {}
    if found.get("auc") is not None:
        grid.add_row(f"{found.get('split', '')} AUC".strip(), _auc(found, bayes))
        if bayes.get("auc") is not None:
            grid.add_row("best possible", f"{bayes['auc']:.4f} (Bayes), {_gap(bayes['auc'] - found['auc'])}")
    for name, key in (("normalised entropy", "ne"), ("log loss", "logloss"), ("calibration", "calibration")):
        if found.get(key) is not None:
            grid.add_row(name, f"{found[key]:.4f}")
    if found.get("rows"):
        grid.add_row("rows evaluated", f"{found['rows']:,}")
    if train.get("samples_per_second"):
        steps = f", {train['step_ms']['p50']:.1f} ms a step" if train.get("step_ms") else ""
        grid.add_row("training speed", f"{count(train['samples_per_second'])} samples/s{steps}")
    if (report.get("memory") or {}).get("peak_bytes"):
        grid.add_row("peak memory", f"{size(report['memory']['peak_bytes'])} in the largest rank")
    return grid


def profile(found: dict[str, Any]) -> Table:
    """Kind of work, milliseconds and share of a step, out of profile/summary_R.json."""
    grid = Table()
    grid.add_column(f"{found['step_ms']:.1f} ms a step went into")
    for name in ("ms", "share"):
        grid.add_column(name, justify="right")
    for row in found["kinds"]:
        grid.add_row(row["kind"], f"{row['ms']:.2f}", f"{100 * row['share']:.1f}%")
    return grid


def _auc(found: dict[str, Any], bayes: dict[str, Any]) -> str:
    bound = found.get("auc_error_bound")
    digits = f"{found['auc']:.4f}" + (f" (± {bound:.1e})" if bound else "")
    return f"[bold green]{digits}[/bold green]"


def _gap(gap: float) -> str:
    return f"{gap:.4f} above this" if gap >= 0 else f"{-gap:.4f} below this"


def comparison(found: dict[str, Any]) -> Table:
    """Kinds and budgets of compare.json, the largest budget first."""
    from trainer.compare import by_budget, kind_lines

    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    grid.add_column("kind", vertical="bottom", overflow="fold")
    for heading in ("budget", "bytes", "AUC", "spread", "log\nloss", "samples\n/s", "look-up\nms"):
        grid.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for entry in by_budget(found["summary"]):
        grid.add_row(
            escape("\n".join(kind_lines(entry["kind"]))),
            f"{entry['budget']:g}",
            size(entry["bytes"]),
            f"{entry['auc']:.4f}",
            f"{entry['auc_spread']:.4f}",
            f"{entry['logloss']:.4f}",
            f"{entry['train_samples_per_second']:,.0f}",
            f"{entry['lookup_ms']:.2f}",
        )
    return grid
