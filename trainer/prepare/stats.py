"""Figures per feature, and the table that shows them."""

import numpy as np
from rich import box
from rich.table import Table

from trainer.data.dataset import Dataset, Stats

TOPS = (1, 10, 100, 1000)


def make_stats(counts: np.ndarray, *, rows: int, missing: int, max_per_bag: int, unseen: int = 0) -> Stats:
    """counts: how often each id that occurs does, in any order."""
    ids = int(counts.sum())
    ordered = np.sort(counts)[::-1]
    share = {str(n): float(ordered[:n].sum() / ids) for n in TOPS} if ids else {}
    return Stats(
        rows=rows,
        ids=ids,
        distinct=int(np.count_nonzero(counts)),
        top_share=share,
        missing=missing,
        max_per_bag=max_per_bag,
        unseen=unseen,
    )


def summary(dataset: Dataset) -> Table:
    """A rich table of the statistics of every feature, over the rows that `Stats` says."""
    splits = ", ".join(f"{name} {split.rows:,}" for name, split in dataset.splits.items())
    rates = ", ".join(f"{label} {rate:.2%} positive" for label, rate in dataset.positive_rate.items())
    told = rates if dataset.labelled else "no labels"
    table = Table(
        title=f"{dataset.name}: rows {splits}; {told}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    names = [f.name for f in (*dataset.dense, *dataset.categorical)]
    # Names stay whole on a narrow terminal; the headings wrap instead.
    table.add_column("feature", min_width=min(24, max(map(len, ("feature", *names)))), overflow="fold")
    right = ("table rows", "distinct", "top 1", "top 100", "ids / bag", "max", "missing", "unseen")
    for heading in right:
        table.add_column(heading, justify="right")
    counted = sum(split.rows for name, split in dataset.splits.items() if name == "train" or dataset.like)
    for dense in dataset.dense:
        missing = "" if dense.missing is None else _percent(dense.missing, counted)
        table.add_row(dense.name, "dense", "", "", "", "", "", missing, "")
    for feature in dataset.categorical:
        stats = feature.stats
        if stats is None:
            table.add_row(feature.name, f"{feature.cardinality:,}", *[""] * 7)
            continue
        table.add_row(
            feature.name,
            f"{feature.cardinality:,}",
            f"{stats.distinct:,}",
            f"{stats.top_share.get('1', 0):.1%}",
            f"{stats.top_share.get('100', 0):.1%}",
            f"{stats.ids_per_bag:.2f}",
            str(stats.max_per_bag),
            _percent(stats.missing, stats.rows),
            _percent(stats.unseen, stats.ids),
        )
    return table


LARGE = 1000.0  # layers are initialised for inputs around 1; beyond this the first losses are in the tens


def warnings(dataset: Dataset) -> list[str]:
    """What looks like a slip in the spec or the source, though it can be trained on."""
    found = []
    for label, rate in dataset.positive_rate.items():
        if rate in (0.0, 1.0):
            found.append(f"label {label!r} is {rate:g} in every row: there is nothing to learn")
    for feature in dataset.categorical:
        stats = feature.stats
        if stats is not None and stats.rows and stats.missing == stats.rows:
            found.append(f"feature {feature.name!r} has no value in any row")
        elif stats is not None and feature.ids == "as_is" and feature.cardinality > max(10**6, 100 * stats.distinct):
            found.append(
                f"feature {feature.name!r}: {feature.cardinality:,} rows for {stats.distinct:,} distinct ids "
                "taken as they are; ids = 'vocab' or 'hash' makes it smaller"
            )
        elif stats is not None and dataset.like and stats.ids and stats.unseen > stats.ids / 2:
            share = stats.unseen / stats.ids
            found.append(f"feature {feature.name!r}: {share:.0%} of the ids do not occur in {dataset.like}")
    for dense in dataset.dense:
        rows = sum(split.rows for name, split in dataset.splits.items() if name == "train" or dataset.like)
        if dense.missing is not None and dense.missing == rows:
            found.append(f"dense column {dense.name!r} has no value in any row")
        elif not dataset.like and max(abs(dense.mean or 0.0), dense.std or 0.0) > LARGE:
            found.append(
                f"dense column {dense.name!r} has mean {dense.mean:,.1f} and deviation {dense.std:,.1f} as the model "
                "gets it, too large for layers to learn from; standardise = true in the spec scales it, or log1p = true"
            )
    return found


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part and whole else "-"
