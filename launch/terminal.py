"""What every command shares: its common options, and how it prints for people and for programs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of the config; repeatable.")
]


def print_error(message: str) -> None:
    """`error:` and the message in red on stderr, further lines indented under it."""
    first, *rest = message.strip().splitlines() or ["unknown"]
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/bold red] {escape(first)}", soft_wrap=True, highlight=False)
    for line in rest:
        console.print(f"       {escape(line)}", soft_wrap=True, highlight=False)


def print_failure(failure: Any, *, way_out: str = "") -> None:
    """Why a job ended early, where the whole story is, and what to do then."""
    details = f"\nthe whole story: {shown(failure.details)}" if failure.details else ""
    print_error(failure.message + details + (f"\n{way_out}" if way_out else ""))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str), flush=True)


def console_for(as_json: bool) -> Console:
    """Where progress goes: stdout belongs to the JSON object where one was asked for."""
    return Console(stderr=as_json)


def shown(path: Path) -> str:
    """The path as a person would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
