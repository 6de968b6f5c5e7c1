"""The commands that train several times and compare: `tablemesh chaos` and `tablemesh compare-tables`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kernels.errors import UserError
from launch import schedulers
from launch.terminal import Json, Set, console_for, print_json, shown


def chaos(
    config: Annotated[Path, typer.Argument(help="TOML config of a short run, such as configs/quickstart.toml.")],
    kill_at: Annotated[
        int | None, typer.Option(min=1, help="Step at which a rank is struck; default: the middle one.")
    ] = None,
    signal_: Annotated[
        str, typer.Option("--signal", help="KILL, SEGV, ABRT; TERM, USR1 (save and stop); STOP, HANG (stand still).")
    ] = "KILL",
    during: Annotated[
        str | None,
        typer.Option(help="step, save, eval or data: the first of these at or after --kill-at; default: step."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="The rank that is struck; default: a random one.")] = None,
    world: Annotated[
        str | None, typer.Option(metavar="2->1", help="Ranks before and after; default: train.nproc, unchanged.")
    ] = None,
    kills: Annotated[
        int | None, typer.Option("--soak", min=1, metavar="N", help="N kills at random points instead of one.")
    ] = None,
    each: Annotated[
        int | None,
        typer.Option(min=1, help="--soak: kills in one run at most; default: 5, 1 with another --world or TERM."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random here.")] = 0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train twice, once with ranks that die, and compare weights, optimizer state and rows seen; 1 when they differ."""
    import random

    from launch import chaos as chaotic
    from launch import dataset, progress
    from trainer import config as configs

    console = console_for(as_json)
    resolved = configs.load(config, set_ or [])
    worlds = chaotic.Worlds.parse(world, resolved.train.nproc)
    chaotic.check_options(
        resolved, worlds, signal=signal_, during=during, kill_at=kill_at, rank=rank, kills=kills, each=each
    )
    dataset.prepare_missing(console, resolved)
    trial = chaotic.Chaos(resolved, worlds, schedulers.named("local"), progress.make(console), signal=signal_)
    if kills is None:
        rng, during = random.Random(seed), during or "step"
        fault = trial.fault(step=kill_at or max(1, trial.steps // 2), during=during, rng=rng, rank=rank)
        outcomes = [trial.disturb([fault])]
        if not outcomes[0].struck:
            raise UserError(chaotic.why_not_struck(outcomes[0], fault.step, during))
    else:

        def note(outcome: Any, struck: int) -> None:
            console.print(f"{struck} of {kills} kills: {chaotic.sentence(outcome)}", highlight=False, soft_wrap=True)

        outcomes = chaotic.soak(trial, kills, seed=seed, each=each, note=note)
    found = chaotic.summary(trial, outcomes)
    if as_json:
        print_json(found)
    else:
        chaotic.show(found, console)
    if not found["ok"]:
        raise typer.Exit(1)


def compare_tables(
    config: Annotated[Path, typer.Argument(help="TOML config, such as configs/zipf4.toml.")],
    budget: Annotated[
        str, typer.Option(help="Byte budgets, as shares of one standard table each, separated by commas.")
    ] = "1,0.5,0.25,0.1",
    kinds: Annotated[
        str, typer.Option(help="Table kinds, separated by commas; options after colons: unified:lookups=2.")
    ] = "standard,hashed,compositional,mixed_dim,unified,unified:lookups=2",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds from the config's seed on.")] = 3,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Trained beside each other; default: one for each core.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison; what it holds, with as many processes, is not trained again."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train every table kind at every byte budget with several seeds; a table and a plot, as HTML and JSON."""
    from launch import dataset as datasets
    from launch import figures, machine, progress
    from trainer import compare
    from trainer import config as configs
    from trainer.data.parquet import open_dataset

    console = console_for(as_json)
    resolved = configs.load(config, set_ or [])
    budgets = _shares(budget)
    datasets.prepare_missing(console, resolved)
    dataset = open_dataset(resolved.data.path, resolved.data.features)
    asked = list(dict.fromkeys(kind.strip() for kind in kinds.split(",") if kind.strip()))
    if not asked:
        raise UserError(f"--kinds {kinds!r}: names no kind; write it as --kinds standard,unified:lookups=2")
    cells, refused = compare.plan_cells(resolved, dataset, kinds=asked, budgets=budgets, seeds=seeds)
    folder = out or resolved.run.dir / f"{resolved.name}-compare"
    folder.mkdir(parents=True, exist_ok=True)
    processes = processes or machine.cores()
    threads = max(1, machine.cores() // processes)
    display = progress.make(console)
    try:
        rows = compare.run_cells(cells, folder, processes=processes, threads=threads, progress=display.work)
    finally:
        display.close()
    found = compare.result(resolved, dataset, rows, refused, compare.full_bytes(resolved, dataset))
    page = compare.write(folder, found)
    if as_json:
        print_json(found | {"report_html": str(page)})
    else:
        if rows:
            console.print(figures.comparison(found))
            console.print()
        for one in refused:
            console.print(f"left out: {one['kind']} at {one['budget']:g}: {escape(one['why'])}", highlight=False)
        console.print(f"comparison: [link=file://{page}]{escape(shown(page))}[/link]", soft_wrap=True, highlight=False)


def _shares(text: str) -> list[float]:
    """ "1,0.25" -> [1.0, 0.25]; UserError for what is not a number above 0."""
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(0.0)
        if not 0.0 < found[-1] < float("inf"):
            raise UserError(f"--budget {text!r}: {part!r} is not a share above 0; write it as --budget 1,0.5,0.25")
    return list(dict.fromkeys(found))
