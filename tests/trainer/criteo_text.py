"""Lines such as Criteo's files have, made up."""

import numpy as np


def criteo_lines(rows: int, *, seed: int = 0) -> list[str]:
    """`rows` lines with line ends: a label, 13 integers, 26 categories of 8 hexadecimal digits; some values missing."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        counts = [("" if rng.random() < 0.3 else str(rng.integers(-2, 500))) for _ in range(13)]
        codes = [("" if rng.random() < 0.1 else f"{rng.zipf(1.3) % 10**8:08x}") for _ in range(26)]
        lines.append("\t".join([str(rng.integers(0, 2)), *counts, *codes]) + "\n")
    return lines
