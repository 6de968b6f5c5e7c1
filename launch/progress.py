"""What a person sees while a job runs: one live line on a terminal, plain lines now and then anywhere else."""

import time
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 5.0  # between two plain lines of training figures

Event = dict[str, Any]


class Display(Protocol):
    def event(self, event: Event) -> None:
        """Take one event of metrics.jsonl (trainer/runlog.py has the kinds and their keys)."""

    def work(self, done: int, total: int, text: str) -> None:
        """Progress of work that writes no events: `done` of `total` in any unit, and what is being done."""

    def line(self, text: str, style: str = "") -> None:
        """A line that stays on the screen."""

    def close(self) -> None:
        """Leave the screen as it should stay. Harmless when called twice."""


def make(console: Console) -> Display:
    """The display that suits where the console writes to."""
    return OnTerminal(console) if console.is_terminal and not console.is_dumb_terminal else Plain(console)


class Plain:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._steps_total = 0
        self._pending: str | None = None
        self._work = ""
        self._phases: set[str | None] = set()

    def event(self, event: Event) -> None:
        kind = event.get("event")
        if kind == "start":
            self._steps_total = event.get("steps_total") or 0
        if kind == "train":
            text = training_line(event, self._steps_total)
            if time.monotonic() - self._last >= PLAIN_SECONDS:
                self._last, self._pending = time.monotonic(), None
                self.line(text)
            else:
                self._pending = text
            return
        if kind == "phase":
            if event.get("name") in self._phases:  # back to training after each evaluation
                return
            self._phases.add(event.get("name"))
        text, style = lasting_line(event)
        if text:
            self._flush()
            self.line(text, style)

    def work(self, done: int, total: int, text: str) -> None:
        if text != self._work or done == total or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._work, self._last = text, time.monotonic()
            self.line(f"{text}: {percent(done, total)}")

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.line(pending)


class OnTerminal:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._done, self._total = 0, 0
        self._figures = Text()
        self._live: Live | None = None

    def event(self, event: Event) -> None:
        kind = event.get("event")
        if kind == "start":
            self._total = event.get("steps_total") or 0
        elif kind == "phase":
            self._phase = event.get("name", "")
        elif kind == "train":
            self._phase, self._done = "training", event.get("step", 0)
            self._figures = training_figures(event, self._total)
        text, style = lasting_line(event)
        if text and kind != "phase":
            self.line(text, style)
        self._refresh()

    def work(self, done: int, total: int, text: str) -> None:
        self._phase, self._done, self._total = text, done, total
        self._figures = Text(percent(done, total))
        self._refresh()
        if total and done >= total:
            self._done, self._total, self._figures = 0, 0, Text()

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True, get_renderable=self._render)
            self._live.start()

    def _render(self) -> Table:
        row = Table.grid(padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(width=20)
        row.add_column(no_wrap=True, overflow="ellipsis")
        # An unknown total pulses: the ranks are being started, or evaluate.
        known = self._total > 0 and (self._phase == "training" or self._figures.plain.endswith("%"))
        bar = ProgressBar(total=self._total if known else None, completed=self._done, width=20, pulse=not known)
        row.add_row(Text(self._phase or "starting", style="bold cyan"), bar, self._figures)
        return row


def training_figures(event: Event, steps_total: int) -> Text:
    """Step, loss, NE, AUC, speed and time left, as one text for the live line."""
    parts = [(f"{event.get('step', 0)}/{steps_total}" if steps_total else f"step {event.get('step', 0)}", "bold")]
    for name, key, digits in (("loss", "loss", 4), ("NE", "ne", 3), ("AUC", "auc", 4)):
        if event.get(key) is not None:
            parts.append((f"{name} {event[key]:.{digits}f}", "green" if key == "auc" else ""))
    if rate := event.get("samples_per_second"):
        parts.append((f"{count(rate)}/s", "magenta"))
        left = _seconds_left(event, steps_total)
        if left is not None:
            parts.append((f"ETA {clock(left)}", "yellow"))
    text = Text()
    for i, (part, style) in enumerate(parts):
        text.append(("  " if i else "") + part, style)
    return text


def training_line(event: Event, steps_total: int) -> str:
    return "  train   " + training_figures(event, steps_total).plain


def lasting_line(event: Event) -> tuple[str, str]:
    """(text, style) of an event that leaves a line behind; an empty text for one that does not."""
    kind = event.get("event")
    if kind == "start":
        return _start_line(event), "bold"
    if kind == "phase":
        return f"  {event.get('name', '')} ...", "dim"
    if kind == "eval":
        figures = [f"AUC {event['auc']:.4f}"] if event.get("auc") is not None else []
        figures += [f"NE {event['ne']:.4f}"] if event.get("ne") is not None else []
        figures += [f"log loss {event['logloss']:.4f}"] if event.get("logloss") is not None else []
        size = f"({event.get('rows', 0):,} rows, {event.get('seconds', 0):.1f} s)"
        return f"  {event.get('split', 'eval'):7} step {event.get('step', 0):>6}  {'  '.join(figures)}  {size}", "cyan"
    if kind == "restart":
        return f"  restart {event.get('number')} of {event.get('of')}: {event.get('message', '')}", "yellow"
    if kind == "message":
        if event.get("level") == "warning":
            return f"  warning: {event.get('text', '')}", "yellow"
        return f"  {event.get('text', '')}", ""
    return "", ""


def count(value: float) -> str:
    """81000 -> 81.0k"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def size(bytes: float) -> str:
    """3_200_000_000 -> 3.2 GB"""
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if bytes >= unit:
            return f"{bytes / unit:.1f} {letter}"
    return f"{bytes:.0f} B"


def clock(seconds: float) -> str:
    """75 -> 1:15"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(done: int, total: int) -> str:
    return f"{100 * done / total:.0f}%" if total else count(done)


def _seconds_left(event: Event, steps_total: int) -> float | None:
    step, samples = event.get("step") or 0, event.get("samples") or 0
    if not steps_total or not step or not samples:
        return None
    return max(0, steps_total - step) * (samples / step) / event["samples_per_second"]


def _start_line(event: Event) -> str:
    ranks = event.get("world_size", 1)
    first = [str(event.get("run", "")), f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {event.get('device', 'cpu')}"]
    if event.get("tables"):
        first.append(f"{event['tables']} tables, {size(event.get('table_bytes') or 0)}")
    if event.get("bayes"):
        first.append(f"best possible AUC {event['bayes']['auc']:.4f}")
    lines = [first]
    if event.get("train_rows"):
        epochs = event.get("epochs", 1)
        rows = f"{event['train_rows']:,} rows" + (f" x {epochs} epochs" if epochs > 1 else "")
        lines.append([f"  {rows} in {event.get('steps_total', 0):,} steps of {event.get('batch_size', 0):,}"])
    return "\n".join("  ·  ".join(parts) for parts in lines)
