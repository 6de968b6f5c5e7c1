"""Source data -> dataset folder.  `prepare` is the only way in; `summary` shows what came out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from kernels.errors import UserError
from trainer.data.dataset import Dataset

# progress(done, total, text): done and total in bytes of the source (rows for synthetic data); text says what is being
# done ("counting ids", "writing").  `done` starts again at 0 with each pass.  Called from the calling thread.
Progress = Callable[[int, int, str], None]


def prepare(
    source: str,
    dest: str | Path,
    *,
    spec: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare `source` into the dataset folder `dest` and return what its dataset.json says.

    source: "synthetic:criteo", "synthetic:zipf4", "criteo:PATH", or PATH: a file, a folder, a glob, or several of these
        separated by commas (.csv, .tsv, .txt, .parquet; text may be .gz, .bz2, .zst).
    spec: TOML that says what the columns are (docs/data.md); not for synthetic and Criteo.
    options: settings by name; text is taken where a number is meant, so they can come from a command line.
        all            seed = 0, threads = cores, existing = "error" | "reuse" | "replace", name, row_group_rows
        synthetic      rows, scale (criteo only)
        files          valid, test = a share such as 0.1, or files (a path, a glob or a list of them);
                       split = "random" | "time", max_rejected = 0.001 (share of malformed lines)
        criteo         also ids = "vocab" | "hash", min_count = 1, rows = size of each hashed table
    Raises UserError for what is wrong with the input; nothing is left at `dest` then.
    """
    raise UserError(f"{source}: preparing is not finished yet")


def summary(dataset: Dataset) -> Table:
    """A rich table of the statistics of every feature."""
    raise UserError(f"{dataset.name}: summary is not finished yet")
