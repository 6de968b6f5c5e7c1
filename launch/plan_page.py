"""`tablemesh plan --html`: a plan as one self-contained page.

    write(file, found, others)      found: launch.plan.answer's; others: launch.what_if's of clusters beside it

The page has no script and asks for nothing: pictures are inline SVG made here, colours the report's.  Beyond
MOST_COLUMNS ranks a column stands for several: for the fullest of them, or for what any of them holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import trainer
from launch.plan_view import fixed_words, in_short, ranks_of, stop_words, words
from sharding.explain import BOUNDS, SHORT
from sharding.tables.base import SHARDING_TYPES
from trainer.report import write_text
from trainer.words import count, figure, milliseconds, percent, runs, size

MOST_COLUMNS = 256
FAR = 4  # a limit so many times what the fullest rank holds is not drawn, but told
MOST_TABLES = 60  # rows of the map: those that take the most time
WIDTH = 1100
MEMORY = {  # what a rank's memory is for -> (words, colour)
    "fixed": ("whatever the plan", 8),
    "weights": ("weights", 1),
    "state": ("optimizer state", 4),
    "gradient": ("gradients of data-parallel tables", 6),
    "buffers": ("pooled vectors and their gradients", 3),
    "ids": ("ids", 2),
    "cache": ("cache of rows in host memory", 5),
}
TIMES = {"host": 8, "input": 6, "lookup": 1, "output": 3, "groups": 7, "dense": 5, "all-reduce": 8, "gradients": 4,
         "update": 2, "dense update": 6}  # fmt: skip
COLOURS = {sharding: 1 + i for i, sharding in enumerate(SHARDING_TYPES)}


def write(file: Path, found: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    write_text(file, render(found, others))


def render(found: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    folders = [Path(__file__).parent, Path(trainer.__path__[0])]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        count=count, size=size, figure=figure, ms=milliseconds, percent=percent, words=words, ranks_of=ranks_of,
        stop_words=stop_words,
    )  # fmt: skip
    pictures = _pictures(found) if found["feasible"] else {}
    return environment.get_template("plan.html.j2").render(
        found=found, others=others, bounds=BOUNDS, colours=COLOURS, **pictures
    )


def _pictures(found: Mapping[str, Any]) -> dict[str, Any]:
    tables = sorted(found["tables"], key=lambda t: -t["ms_total"])
    return {
        "timeline": _timeline(found),
        "memory": _memory(found),
        "far_limit": _far_limit(found),
        "memory_keys": [
            (f"{words}: {fixed_words(found)}" if name == "fixed" else words, colour)
            for name, (words, colour) in MEMORY.items()
            if any(r["memory"][name] for r in found["ranks"])
        ],
        "map": _map(found, tables[:MOST_TABLES]),
        "map_rest": len(tables) - MOST_TABLES,
        "faint": any(_is_faint(found, t) for t in tables[:MOST_TABLES]),
        "used": [s for s in SHARDING_TYPES if any(t["sharding"] == s for t in found["tables"])],
        "tables": tables,
        "per_column": -(-found["world_size"] // MOST_COLUMNS),
    }


def _timeline(found: Mapping[str, Any]) -> Markup:
    """The slowest rank's parts, one under the other where they begin."""
    step = found["predicted"]["step_ms"]
    events = [e for e in found["timeline"] if e["ms"] > 1e-6]
    left, right, row = 230, 90, 24
    scale = (WIDTH - left - right) / step
    parts = []
    for i, event in enumerate(events):
        y, x, width = i * row, left + event["start_ms"] * scale, max(1.0, event["ms"] * scale)
        beside, faint = (" beside the rest", ' opacity=".55"') if event["beside"] else ("", "")
        name = escape(SHORT[event["name"]]) + beside
        parts.append(
            f'<g class="s{TIMES[event["name"]]}"><title>{escape(event["words"])}{beside and ","}{beside}</title>'
            f'<text class="tick" x="{left - 10}" y="{y + 16}" text-anchor="end">{name}</text>'
            f'<rect x="{left}" y="{y + 2}" width="{WIDTH - left - right}" height="{row - 4}" fill="var(--track)"/>'
            f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{row - 4}" rx="2" fill="var(--c)"{faint}/>'
            f'<text class="tick" x="{WIDTH - right + 8}" y="{y + 16}">{event["ms"]:.3f} ms</text></g>'
        )
    return _svg(len(events) * row, parts, "Parts of the slowest rank's step")


def _memory(found: Mapping[str, Any]) -> Markup:
    """A column of stacked bytes for every rank, under the limit where that is not far above all of them."""
    limit = found["limits"]["device_bytes"]
    left, top, height = 70, 14, 190
    columns = []
    for group in _groups(found["ranks"]):
        columns.append((group, max(group, key=lambda r: sum(r["memory"].values()))))
    fullest = max(sum(r["memory"].values()) for _, r in columns)
    near = not _far_limit(found)
    highest = 1.06 * (max(limit, fullest) if near else fullest)
    width = (WIDTH - left) / len(columns)
    gap = 0 if len(columns) > 64 else min(4.0, width / 6)
    parts = []
    for i, (group, rank) in enumerate(columns):
        upto = 0.0
        named = f"rank {rank['rank']}" + (f", the fullest of {len(group)}" if len(group) > 1 else "")
        total = sum(rank["memory"].values())
        parts.append(f"<g><title>{named}: {size(total)} of {size(limit)}, step {rank['step_ms']:.3f} ms</title>")
        for name, (_, colour) in MEMORY.items():
            tall = rank["memory"][name] / highest * height
            if tall > 0.05:
                parts.append(
                    f'<rect class="s{colour}" x="{left + i * width:.2f}" y="{top + height - upto - tall:.2f}" '
                    f'width="{width - gap:.2f}" height="{tall:.2f}" fill="var(--c)"/>'
                )
            upto += tall
        parts.append("</g>")
    if near:
        y = top + height - limit / highest * height
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="rule-label" x="{left + 6}" y="{y - 5:.1f}">limit {size(limit)}</text>')
    full = limit if near else fullest
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height - share * full / highest * height
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{size(share * full)}</text>')
    parts += _rank_axis(found["world_size"], left, WIDTH - left, top + height + 18)
    return _svg(top + height + 24, parts, "Memory of every rank")


def _far_limit(found: Mapping[str, Any]) -> bool:
    """Whether the limit is too far above what the ranks hold to be drawn."""
    return max(sum(r["memory"].values()) for r in found["ranks"]) * FAR <= found["limits"]["device_bytes"]


def _map(found: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> Markup:
    """Tables down, ranks across: a rectangle where a part stands, fainter outside the device's memory."""
    world = found["world_size"]
    per_column = -(-world // MOST_COLUMNS)
    count_columns = -(-world // per_column)
    left, top = 190, 22
    row = 18 if len(tables) <= 32 else 13
    width = (WIDTH - left) / count_columns
    parts = _rank_axis(world, left, WIDTH - left, 14)
    for i, table in enumerate(tables):
        y = top + i * row
        name = in_short(table["name"], 26)
        held = f"{words(table['label'])}, {size(table['bytes'])}, ranks {runs(sorted(set(table['ranks'])))}"
        parts.append(
            f'<g class="s{COLOURS[table["sharding"]]}"><title>{escape(table["name"])}: {held}</title>'
            f'<text class="tick" x="{left - 10}" y="{y + row - 5}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y + 1}" width="{WIDTH - left}" height="{row - 2}" fill="var(--track)"/>'
        )
        faint = ' opacity=".5"' if _is_faint(found, table) else ""
        for first, last in _spans(sorted({r // per_column for r in table["ranks"]})):
            parts.append(
                f'<rect x="{left + first * width:.2f}" y="{y + 1}" width="{max(1.5, (last - first + 1) * width):.2f}" '
                f'height="{row - 2}" fill="var(--c)"{faint}/>'
            )
        parts.append("</g>")
    if count_columns <= 64:
        for column in range(1, count_columns):
            x = left + column * width
            parts.append(
                f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{top}" y2="{top + len(tables) * row}" stroke="var(--card)"/>'
            )
    return _svg(top + len(tables) * row + 4, parts, "Which rank holds which table")


def _is_faint(found: Mapping[str, Any], table: Mapping[str, Any]) -> bool:
    """Whether its rows are outside the device's memory.  On a CPU there is one memory."""
    return table["tier"] != "device" and any(r["hbm_bytes"] for r in found["ranks"])


def _rank_axis(world: int, left: float, width: float, y: float) -> list[str]:
    """The numbers of the first rank, some between, and the last."""
    shown = sorted({round(i * (world - 1) / 8) for i in range(9)}) if world > 1 else [0]
    return [
        f'<text class="tick" x="{left + (rank + 0.5) / world * width:.1f}" y="{y}" text-anchor="middle">{rank}</text>'
        for rank in shown
    ]


def _groups(ranks: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    per_column = -(-len(ranks) // MOST_COLUMNS)
    for start in range(0, len(ranks), per_column):
        yield ranks[start : start + per_column]


def _spans(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[0, 1, 2, 5] -> (0, 2), (5, 5)."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1]
            start = i


def _svg(height: float, parts: Sequence[str], label: str) -> Markup:
    body = "".join(parts)
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
    return Markup(f'<div class="chart">{svg}</div>')
