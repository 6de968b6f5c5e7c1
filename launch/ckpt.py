"""`tablemesh ckpt ...`: what is in a run's checkpoints, whether they are whole, and how they differ."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kernels.errors import UserError
from launch.progress import size
from launch.terminal import Json, print_json

app = typer.Typer(help="List, verify, compare and export checkpoints.", no_args_is_help=True)

MOST_ROWS = 10_000  # of one range to print

Where = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder (its newest checkpoint), or a checkpoint's path.")
]


@app.command()
def ls(run: Where, as_json: Json = False) -> None:
    """The checkpoints of a run."""
    from trainer.checkpoint import tools

    def show(found: dict[str, Any], console: Console) -> None:
        table = _table("checkpoint", "kind", "size", "samples", "ranks", "")
        for row in found["checkpoints"]:
            kind = f"delta to {row['parent']}" if row.get("parent") else row.get("kind", "")
            shown = [size(row["bytes"]), f"{row['samples']:,}", str(row["world_size"])] if "bytes" in row else [""] * 3
            table.add_row(row["name"], kind, *shown, row.get("why", ""))
        console.print(table)
        console.print(f"{len(found['checkpoints'])} in {found['where']}", highlight=False, soft_wrap=True)

    _answer(tools.ls(run), show, as_json)


@app.command()
def verify(run: Where, as_json: Json = False) -> None:
    """Read all files again and compare their hashes; exit code 1 and the damaged file and table when one differs."""
    from trainer.checkpoint import tools

    def show(found: dict[str, Any], console: Console) -> None:
        for row in found["checked"]:
            state = "[green]whole[/green]" if row["ok"] else "[red]damaged[/red]"
            console.print(f"{row['name']:12} {state:8}  {size(row['bytes'])}", highlight=False)
        for row in found["damaged"]:
            console.print(f"[red]{row['message']}[/red]", highlight=False, soft_wrap=True)

    found = tools.verify(run)
    _answer(found, show, as_json)
    raise typer.Exit(0 if found["ok"] else 1)


@app.command()
def diff(
    first: Where,
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Another run or checkpoint.")],
    as_json: Json = False,
) -> None:
    """The largest difference of every tensor and the first row that differs; exit code 1 unless all are equal."""
    from trainer.checkpoint import tools

    def show(found: dict[str, Any], console: Console) -> None:
        table = _table("tensor", "largest difference", "first row", "rows that differ")
        for row in found["tensors"]:
            if "sizes" in row:
                table.add_row(row["tensor"], f"sizes {row['sizes'][0]} and {row['sizes'][1]}", "", "")
            elif row["first_row"] is not None:
                table.add_row(
                    row["tensor"], f"{row['largest']:.3g}", str(row["first_row"]), f"{row['rows_that_differ']:,}"
                )
        if table.row_count:
            console.print(table)
        for key, which in (("only_in_first", found["first"]), ("only_in_second", found["second"])):
            for name in found[key]:
                console.print(f"{name}: only in {which}", highlight=False, soft_wrap=True)
        equal = len(found["tensors"]) - table.row_count
        console.print(f"{equal} of {len(found['tensors'])} tensors are equal", highlight=False)

    found = tools.diff(first, second)
    _answer(found, show, as_json)
    raise typer.Exit(0 if found["same"] else 1)


@app.command()
def inspect(
    run: Where,
    table: Annotated[str | None, typer.Option(help="One table; default: all.")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows of the table to print, such as 0,5,10-12.")] = None,
    as_json: Json = False,
) -> None:
    """Norms, rows of zeros, how often rows were updated, by table; with --table also which most; rows of a table."""
    from trainer.checkpoint import counts, tools

    def show(found: dict[str, Any], console: Console) -> None:
        counted = [t["updates"] for t in found["tables"] if t["updates"] is not None]
        shown = _table("table", "rows", "columns", "size", "mean norm", "largest", "zero rows", "never updated")
        for t in found["tables"]:
            idle = "?" if t["never_updated"] is None else f"{t['never_updated']:,}"
            norm = [f"{t['norm'][key]:.4g}" for key in ("mean", "largest")]
            about = [f"{t['rows']:,}", str(t["columns"]), size(t["bytes"])]
            shown.add_row(t["table"], *about, *norm, f"{t['zero_rows']:,}", idle)
        console.print(shown)
        if counted:
            _show_quantiles(console, found["tables"], [f"p{q}" for q in counts.QUANTILES])
        for updates in counted if table is not None else ():
            _show_updates(console, updates)
        for row in found.get("rows", ()):
            for name, values in row.items():
                if name != "row":
                    numbers = values if isinstance(values, list) else [values]
                    text = " ".join(str(v) if isinstance(v, int) else f"{v:.5g}" for v in numbers)
                    console.print(f"row {row['row']}  {name}: {text}", highlight=False, soft_wrap=True)
        since = counted[0]["since"] if counted else 0
        note = f"; updates counted since step {since}" if since else ""
        console.print(f"{found['checkpoint']}, after {found['step']} steps{note}", highlight=False, soft_wrap=True)
        if not counted:
            console.print(f"how often rows were updated was not counted: {counts.HOW}", highlight=False, soft_wrap=True)

    _answer(tools.inspect(run, table=table, rows=_rows(rows) if rows else ()), show, as_json)


@app.command()
def export(run: Where, out: Annotated[Path, typer.Argument(help="Folder to make.")], as_json: Json = False) -> None:
    """Write the tables as Parquet and the dense weights as safetensors."""
    from trainer.checkpoint import tools

    _answer(
        tools.export(run, out), lambda found, console: _files(console, [f["file"] for f in found["files"]]), as_json
    )


@app.command()
def reshard(
    run: Where,
    out: Annotated[str, typer.Argument(help="Checkpoint to write, such as elsewhere/step_40.")],
    parts: Annotated[int, typer.Option(min=1, help="Cut every table by rows for so many ranks.")] = 1,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint, with its deltas merged, in files for another number of ranks.

    No run needs this: every checkpoint can be read by any number of ranks. Each of them then reads fewer files.
    """
    from trainer.checkpoint import tools

    def show(found: dict[str, Any], console: Console) -> None:
        console.print(f"{found['to']}: {size(found['bytes'])} in {len(found['files'])} files", highlight=False)

    _answer(tools.reshard(run, out, parts=parts), show, as_json)


def _answer(found: dict[str, Any], show: Callable[[dict[str, Any], Console], None], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        show(found, Console())


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return table


def _show_quantiles(console: Console, tables: list[dict[str, Any]], quantiles: list[str]) -> None:
    """How often the rows of each table were updated: half of them at most p50 times, and so on."""
    shown = _table("updates of a row of", *quantiles, "most")
    for t in tables:
        if t["updates"] is not None:
            shown.add_row(t["table"], *(f"{t['updates'][key]:,}" for key in (*quantiles, "most")))
    console.print(shown)


def _show_updates(console: Console, updates: dict[str, Any]) -> None:
    """A table's histogram of updates, and the rows with most."""
    shown = _table("updates", "rows", "")
    shown.add_column("", justify="left")
    most = max(bin["rows"] for bin in updates["histogram"])
    for bin in updates["histogram"]:
        label = f"{bin['from']:,}" if bin["from"] == bin["to"] else f"{bin['from']:,} to {bin['to']:,}"
        share = f"{bin['rows'] / max(1, updates['rows']):.1%}"
        shown.add_row(label, f"{bin['rows']:,}", share, "#" * round(30 * bin["rows"] / max(1, most)))
    console.print(shown)
    key = "id" if any("id" in row for row in updates["most_updated"]) else "row"
    named = (f"{row[key]} ({row['updates']:,})" for row in updates["most_updated"])
    console.print(f"most updated, {key} (updates): {', '.join(named) or 'none'}", highlight=False, soft_wrap=True)


def _files(console: Console, paths: list[str]) -> None:
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)


def _rows(text: str) -> tuple[int, ...]:
    """0,5,10-12 -> (0, 5, 10, 11, 12); ids may be negative: -7,-2--1 -> (-7, -2, -1)"""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", part)
        if match is None:
            raise UserError(f"--rows {text!r}: write it as 0,5,10-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST_ROWS:
            raise UserError(f"--rows {text!r}: {part.strip()} has to ascend, and be at most {MOST_ROWS:,} rows")
        found += range(first, last + 1)
    return tuple(found)
