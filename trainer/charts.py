"""Line and scatter charts as inline SVG, without scripts or fonts of their own; colours are CSS classes of the page.

Every chart carries its points in `data-hover`, from which the page's script shows a tooltip; they read without it too.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 38
FAR = 30  # times the span of the middle nine tenths
MAX_POINTS = 400  # of one curve: more than the pixels that show it


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.  colour: 1..8, a class of the page; dots: mark the points; line: join them."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    line: bool = True
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A horizontal line with its label, such as the best possible value."""

    value: float
    label: str
    above: bool = True  # where the label stands


def line_chart(
    *,
    title: str,
    x_label: str,
    series: Sequence[Series],
    format_y: Callable[[float], str],
    rules: Sequence[Rule] = (),
    from_zero: bool = False,
) -> Markup:
    """The figure; empty when no series has a point."""
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    series = [Series(**{**vars(s), "points": _thinned(s.points)}) for s in series]
    x_low, x_high = _extent([x for s in series for x, _ in s.points])
    y_low, y_high = _visible([y for s in series for _, y in s.points], [r.value for r in rules], from_zero=from_zero)

    def px(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [*_axes(x_low, x_high, y_low, y_high, px, py), _axis_title(x_label)]
    for rule in rules:
        y = py(rule.value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    clip = "clip-" + re.sub(r"\W+", "-", title)
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 5}" '
        f'height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath><g clip-path="url(#{clip})">'
    )
    for s in series:
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
    return _figure(title, _legend(series), parts, _hover(series, px, py, x_label, format_y))


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

    parts = [*_axes(0, top, 0, top, px, py), _axis_title("predicted probability")]
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


def _axes(x_low, x_high, y_low, y_high, px, py) -> list[str]:
    parts = []
    y_ticks = ticks(y_low, y_high, 6)
    decimals = max((len(f"{t:.10f}".rstrip("0").split(".")[1]) for t in y_ticks), default=0)
    for t in y_ticks:
        y, label = py(t), f"{t:.{decimals}f}" if abs(t) < 1000 else short(t)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y + 4}">{label}</text>')
    for t in ticks(x_low, x_high, 7):
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
