"""`tablemesh bench scaling --curves FILE.svg`: MLPerf's DLRM-DCNv2 on 8 to 4,096 H100s, simulated and drawn.

Of all these points only the last row of benchmarks/scaling.py was ever run.  Strong scaling keeps its global batch,
weak scaling its rows per GPU, so that the two meet at its 64 GPUs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.base import Row
from benchmarks.scaling import HUGECTR, ROWS
from sharding import topology
from sharding.simulate import TABLEMESH, Point, Program, point, with_efficiency
from trainer.report import write_text

HOSTS = tuple(2**n for n in range(10))  # of 8 GPUs
RUN = ROWS[-1]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 190, 16, 44


@dataclass(frozen=True, kw_only=True)
class Curve:
    """points: by number of GPUs, each with its efficiency beside the first."""

    name: str
    colour: str
    dash: str
    points: Sequence[Point]


def curves(hosts: Sequence[int] = HOSTS) -> list[Curve]:
    """Weak and strong, with the step in a CUDA graph as HugeCTR has it, and launched by the host as tablemesh does."""
    wide = RUN.topology()

    def curve(name: str, program: Program, colour: str, *, weak: bool) -> Curve:
        found = []
        for n in hosts:
            batch = RUN.batch_size * n // wide.hosts if weak else RUN.batch_size
            cluster = topology.parse(f"{wide.name}:{n}x{wide.ranks_per_host}")
            found.append(point(replace(RUN.work(), batch_size=batch), cluster, program=program))
        return Curve(name=name, colour=colour, dash="" if weak else "5 4", points=with_efficiency(found))

    return [
        curve("weak, CUDA graph", HUGECTR, "#1f5fbf", weak=True),
        curve("strong, CUDA graph", HUGECTR, "#1f5fbf", weak=False),
        curve("weak, eager", TABLEMESH, "#c4641a", weak=True),
        curve("strong, eager", TABLEMESH, "#c4641a", weak=False),
    ]


def draw(path: Path) -> tuple[list[Row], list[str]]:
    """Write the picture; the first curve as rows, beside as much for each GPU as on the fewest, and all as notes."""
    found = curves()
    write_text(path, svg(found))
    rows, notes = [], [f"{path}: written"]
    for p in found[0].points:
        ideal = p.samples_per_second / p.efficiency
        rows.append(Row(name=f"weak scaling, {p.topology.world_size:,} GPUs", unit="samples/s simulated",
                        ours=p.samples_per_second, baseline=ideal, baseline_name="linear", ratio=p.efficiency,
                        correct=True))  # fmt: skip
    for c in found:
        at = ", ".join(
            f"{p.topology.world_size:,}: {p.samples_per_second / 1e6:.1f} ({p.efficiency:.0%}, {p.step.bound_by})"
            for p in c.points
            if p.step
        )
        notes.append(f"{c.name}; GPUs: M samples/s (of linear, bound by): {at}")
    return rows, notes


def svg(found: Sequence[Curve]) -> str:
    """Samples/s by GPUs, both axes logarithmic; dotted: as much for each GPU as the first curve has on the fewest."""
    first = found[0].points[0]
    ranks = [p.topology.world_size for p in found[0].points]
    ideal = [(n, first.samples_per_second * n / ranks[0]) for n in ranks]
    lines = [(c, [(p.topology.world_size, p.samples_per_second) for p in c.points if p.step]) for c in found]
    rates = [rate for _, at in lines for _, rate in at] + [rate for _, rate in ideal]
    low, high = 10 ** math.floor(math.log10(min(rates))), 10 ** math.ceil(math.log10(max(rates)))

    def px(n: float) -> float:
        return round(LEFT + math.log(n / ranks[0]) / math.log(ranks[-1] / ranks[0]) * (WIDTH - LEFT - RIGHT), 1)

    def py(rate: float) -> float:
        return round(HEIGHT - BOTTOM - math.log(rate / low) / math.log(high / low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(at: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{px(n)},{py(rate)}" for n, rate in at)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#444"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y, label = py(10**power), f"{10**power / 1e6:g} M"
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    for n in ranks:
        parts.append(f'<text x="{px(n)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{n:,}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">GPUs (H100, 8 a host); '
                 "samples/s upwards</text>")  # fmt: skip
    parts.append(f'<polyline points="{path(ideal)}" fill="none" stroke="#999" stroke-dasharray="1 4"/>')
    for c, at in lines:
        dash = f' stroke-dasharray="{c.dash}"' if c.dash else ""
        parts.append(f'<polyline points="{path(at)}" fill="none" stroke="{c.colour}" stroke-width="2"{dash}/>')
    x, y = px(RUN.topology().world_size), py(RUN.samples_per_second)
    parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="none" stroke="#111" stroke-width="1.5"/>')
    keys = [("#999", "1 4", "linear"), *((c.colour, c.dash, c.name) for c in found)]
    for i, (colour, dash, name) in enumerate(keys):
        at_x, at_y = WIDTH - RIGHT + 14, TOP + 20 + 20 * i
        parts.append(f'<path d="M{at_x} {at_y}h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{at_x + 33}" y="{at_y + 4}">{escape(name)}</text>')
    at_y = TOP + 20 + 20 * len(keys)
    parts.append(f'<circle cx="{at_x + 13}" cy="{at_y}" r="4.5" fill="none" stroke="#111" stroke-width="1.5"/>')
    parts.append(f'<text x="{at_x + 33}" y="{at_y + 4}">published, MLPerf v3.1</text></svg>\n')
    return "\n".join(parts)
