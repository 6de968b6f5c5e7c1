"""Line and scatter charts as inline SVG, without scripts or fonts of their own; colours are CSS classes of the page.

    line_chart(...), calibration_chart(...)    a figure of a page
    picture(charts)                            line charts side by side as an SVG file of its own

Every chart of a page carries its points in `data-hover`, from which the page's script shows a tooltip; they read
without it too.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 38
FAR = 30  # times the span of the middle nine tenths
MAX_POINTS = 400  # of one curve: more than the pixels that show it


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.  colour: 1..8, a class of the page; dots: mark the points; line: join them.

    spans: (x, low, high), drawn as bars through the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    line: bool = True
    dots: bool = False
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A horizontal line with its label, such as the best possible value."""

    value: float
    label: str
    above: bool = True  # where the label stands


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """x_ticks: where the x axis has numbers; None: at round ones."""

    title: str
    x_label: str
    series: Sequence[Series]
    format_y: Callable[[float], str]
    rules: Sequence[Rule] = ()
    from_zero: bool = False
    x_ticks: Sequence[float] | None = None


def line_chart(chart: LineChart) -> Markup:
    """The figure of a page; empty when no series has a point."""
    found = _drawn(chart)
    if found is None:
        return Markup("")
    series, parts, hover = found
    return _figure(chart.title, _legend(series), parts, hover)


def picture(charts: Sequence[LineChart]) -> str:
    """Charts of the same series side by side, with one legend, as an SVG file: light or dark as the reader has it."""
    found = [(chart.title, *drawn) for chart in charts if (drawn := _drawn(chart))]
    width = WIDTH * len(found)
    keys, below = _keys(found[0][1] if found else (), width)
    top = below + 24
    css = "".join(Path(__file__).with_name(name).read_text() for name in ("colours.css", "charts.css"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + HEIGHT}" '
        f'viewBox="0 0 {width} {top + HEIGHT}" font-family="sans-serif"><style>{css}</style>'
        f'<rect width="{width}" height="{top + HEIGHT}" fill="var(--card)"/>',
        *keys,
    ]
    for i, (title, _, drawn, _) in enumerate(found):
        parts.append(f'<text class="title" x="{i * WIDTH + LEFT}" y="{below + 14}">{escape(title)}</text>')
        parts.append(f'<g transform="translate({i * WIDTH} {top})">{"".join(drawn)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _drawn(chart: LineChart) -> tuple[list[Series], list[str], list[dict]] | None:
    """(the series that have points, SVG elements of a chart of WIDTH x HEIGHT, its tooltips); None without a point."""
    series = [s for s in chart.series if s.points]
    if not series:
        return None
    rules = chart.rules
    series = [Series(**{**vars(s), "points": _thinned(s.points)}) for s in series]
    x_low, x_high = _extent([x for s in series for x, _ in s.points])
    values = [y for s in series for y in (*(y for _, y in s.points), *(y for _, *ends in s.spans for y in ends))]
    y_low, y_high = _visible(values, [r.value for r in rules], from_zero=chart.from_zero)

    def px(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    x_ticks = ticks(x_low, x_high, 7) if chart.x_ticks is None else chart.x_ticks
    parts = [*_axes(x_ticks, y_low, y_high, px, py), _axis_title(chart.x_label)]
    for rule in rules:
        y = py(rule.value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    clip = "clip-" + re.sub(r"\W+", "-", chart.title)
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT - 5}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 10}" '
        f'height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath><g clip-path="url(#{clip})">'
    )
    for s in series:
        parts += [f'<path class="span s{s.colour}" d="M{px(x)} {py(a)}V{py(b)}"/>' for x, a, b in s.spans]
    for s in sorted(series, key=lambda s: len(s.points) == 1):  # a point alone would vanish below the curves
        at = [(px(x), py(y)) for x, y in s.points]
        if s.line and len(at) > 1:
            path = " ".join(f"{x},{y}" for x, y in at)
            parts.append(f'<polyline class="curve s{s.colour}" points="{path}"/>')
        if s.dots or len(at) == 1:
            parts += [f'<circle class="dot s{s.colour}" cx="{x}" cy="{y}" r="4"/>' for x, y in at]
    parts.append("</g>")
    for rule in rules:
        y = py(rule.value) + (-6 if rule.above else 15)
        label = escape(rule.label)
        parts.append(f'<text class="rule-label" text-anchor="end" x="{WIDTH - RIGHT - 2}" y="{y}">{label}</text>')
    return series, parts, _hover(series, px, py, chart.x_label, chart.format_y)


def calibration_chart(*, title: str, bins: Sequence[dict[str, float]]) -> Markup:
    """Mean prediction against mean label of each bin, on the diagonal when calibrated; empty without bins."""
    if not bins:
        return Markup("")
    top = max(max(b["predicted"], b["actual"]) for b in bins) * 1.08 or 1.0
    top = min(top, 1.0)

    def px(x: float) -> float:
        return round(LEFT + x / top * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [*_axes(ticks(0, top, 7), 0, top, px, py), _axis_title("predicted probability")]
    parts.append(f'<line class="rule" x1="{px(0)}" y1="{py(0)}" x2="{px(top)}" y2="{py(top)}"/>')
    parts.append(f'<text class="rule-label" text-anchor="end" x="{px(top) - 36}" y="{py(top) + 12}">calibrated</text>')
    parts.append(f'<text class="tick" x="{LEFT + 8}" y="{TOP + 10}">share that said yes</text>')
    hover = []
    path = " ".join(f"{px(b['predicted'])},{py(b['actual'])}" for b in bins)
    parts.append(f'<polyline class="curve thin s1" points="{path}"/>')
    for b in bins:
        x, y = px(b["predicted"]), py(b["actual"])
        parts.append(f'<circle class="dot s1" cx="{x}" cy="{y}" r="4"/>')
        rows = [["predicted", f"{b['predicted']:.4f}", 0], ["actual", f"{b['actual']:.4f}", 1]]
        hover.append({"x": x, "y": [y], "label": f"weight {b['weight']:,.0f}", "rows": rows})
    return _figure(title, "", parts, hover)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most `most` of them: ticks(0.68, 0.83) -> [0.7, 0.75, 0.8]."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 81,000 -> 81k, 1200000 -> 1.2M, 0.75 -> 0.75."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (abs(value) >= size and size > 1e3):
            return f"{value / size:.6g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _axes(x_ticks, y_low, y_high, px, py) -> list[str]:
    parts = []
    y_ticks = ticks(y_low, y_high, 6)
    decimals = max((len(f"{t:.10f}".rstrip("0").split(".")[1]) for t in y_ticks), default=0)
    for t in y_ticks:
        y, label = py(t), f"{t:.{decimals}f}" if abs(t) < 1000 else short(t)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y + 4}">{label}</text>')
    for t in x_ticks:
        x = px(t)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{x}" y="{HEIGHT - BOTTOM + 17}">{short(t)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    return parts


def _axis_title(text: str) -> str:
    x = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="tick" text-anchor="middle" x="{x}" y="{HEIGHT - 5}">{escape(text)}</text>'


def _legend(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return ""
    items = "".join(
        f'<span><i class="key {"line" if len(s.points) > 1 else "point"} s{s.colour}"></i>{escape(s.name)}</span>'
        for s in series
    )
    return f'<div class="legend">{items}</div>'


def _keys(series: Sequence[Series], width: int) -> tuple[list[str], int]:
    """(the legend in SVG, in lines as wide as the picture, the y below it)."""
    parts, x, y = [], LEFT, 20
    for s in series:
        wide = 34 + 7 * len(s.name)  # a generous 7 pixels a letter
        if x > LEFT and x + wide > width - RIGHT:
            x, y = LEFT, y + 18
        line = f'<path class="curve s{s.colour}" d="M{x} {y - 4}h16"/>'
        dot = f'<circle class="dot s{s.colour}" cx="{x + 8}" cy="{y - 4}" r="4"/>'
        parts.append(line if len(s.points) > 1 else dot)
        parts.append(f'<text class="key-name" x="{x + 22}" y="{y}">{escape(s.name)}</text>')
        x += wide
    return parts, y + 12


def _hover(series, px, py, x_label, format_y) -> list[dict]:
    by_x: dict[float, list[tuple[Series, float]]] = {}
    for s in series:
        for x, y in s.points:
            by_x.setdefault(x, []).append((s, y))
    return [
        {
            "x": px(x),
            "y": [py(y) for _, y in values],
            "label": f"{x_label} {x:,.6g}" if x % 1 else f"{x_label} {x:,.0f}",
            "rows": [[s.name, format_y(y), s.colour] for s, y in values],
        }
        for x, values in sorted(by_x.items())
    ]


def _figure(title: str, legend: str, parts: Sequence[str], hover: list[dict]) -> Markup:
    return Markup(
        f'<figure class="chart"><figcaption><span>{escape(title)}</span>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-hover="{escape(json.dumps(hover))}">{"".join(parts)}</svg></figure>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of them, the last one always."""
    if len(points) <= MAX_POINTS:
        return list(points)
    every = math.ceil(len(points) / (MAX_POINTS - 1))
    return [*points[::every], points[-1]] if (len(points) - 1) % every else list(points[::every])


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _visible(values: Sequence[float], always: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """The y range: all values, but for the few so far out (a first loss of 80) that they would flatten the others."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    span = (high - low) or abs(high) or 1.0
    low = ordered[0] if low - ordered[0] < FAR * span else low
    high = ordered[-1] if ordered[-1] - high < FAR * span else high
    low, high = min([low, *always]), max([high, *always])
    if from_zero:
        low = 0.0
    if high == low:
        pad = abs(high) * 0.1 or 1.0
    else:
        pad = (high - low) * 0.1
    return (0.0 if from_zero else low - pad), high + pad
