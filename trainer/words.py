"""Numbers as people read them: counts, bytes, shares, times."""

import math
from datetime import UTC, datetime


def count(value: float | None) -> str:
    """1234567 -> 1,234,567."""
    return "–" if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in the unit that fits: 1.5 MiB."""
    if value is None:
        return "–"
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    unit = units[0]
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:.1f}%" if share >= 0.001 or share == 0 else "<0.1%"


def figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def bound_text(value: float) -> str:
    """A bound in two figures, rounded up so that it stays one: 1.74e-5 -> 0.000018."""
    if value <= 0:
        return "0"
    digits = 1 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{max(digits, 0)}f}"


def moment(unix: float | None) -> str:
    return "–" if unix is None else datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def runs(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)
