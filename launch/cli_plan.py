"""`tablemesh plan`: the command; launch.plan answers, launch.plan_view shows."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kernels.errors import UserError
from launch.terminal import Json, Set, console_for, print_json


def plan(
    config: Annotated[Path, typer.Argument(help="TOML config, such as configs/quickstart.toml.")],
    cluster: Annotated[
        str | None,
        typer.Option(
            help="PROFILE:HOSTSxRANKS, such as h100-80gb:16x8; default: the first of --what-if that can have what "
            "the config asks for, else this machine with train.nproc ranks."
        ),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="A dataset.json, or its folder, where the data is not at data.path.")
    ] = None,
    hbm: Annotated[str | None, typer.Option(help="Device memory of each rank to use, such as 60GiB.")] = None,
    host_mem: Annotated[str | None, typer.Option(help="Memory of each host to use for tables, such as 500GiB.")] = None,
    profiles: Annotated[Path | None, typer.Option(help="TOML with \\[profiles.NAME] sections of clusters.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan there, for `train --plan`.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the plan as one page there, beside plans for --what-if's or other numbers of hosts."),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two of: auto, a sharding type, a plan.json, a cluster."),
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(metavar="CLUSTERS", help="Other clusters, such as h100-80gb:1..64x8,h200:8x8, beside each other."),
    ] = None,
    weak: Annotated[
        bool, typer.Option("--weak", help="With --what-if: each rank keeps its rows; default: the global batch stays.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say where the tables would go on a cluster, whether they fit, and what a step would take; exit code 1 if not."""
    from launch import plan as plans
    from launch import plan_view
    from launch import what_if as sizes
    from trainer import config as configs
    from trainer import report as reports

    resolved = configs.load(config, set_ or [])
    on = sizes.titles(what_if) if cluster is None and what_if is not None else cluster
    asked = plans.make(resolved, dataset=dataset, cluster=on, hbm=hbm, host_mem=host_mem, profiles=profiles)
    console = console_for(as_json)
    if compare is not None:
        sides = plans.compare(asked, *compare)
        if as_json:
            print_json(sides)
        else:
            plan_view.show_comparison(sides, console)
        return
    for option, file in (("--out", out), ("--html", html)):
        if file is not None and not file.resolve().parent.is_dir():
            raise UserError(f"{option} {file}: the folder {file.parent} does not exist")
    if html is not None:
        from launch import plan_page

        answer = plans.answer(asked)
        wanted = sizes.clusters(what_if, asked.profiles) if what_if else sizes.around(asked.cluster)
        plan_page.write(html.resolve(), answer, sizes.what_if(asked, wanted, weak=weak))
        if not as_json:
            console.print(f"written: {html}", highlight=False, soft_wrap=True)
    if what_if is not None:
        others = sizes.what_if(asked, sizes.clusters(what_if, asked.profiles), weak=weak)
        if as_json:
            print_json(others)
        else:
            plan_view.show_what_if(others, console)
        if not any(c["feasible"] for c in others["clusters"]):
            raise typer.Exit(1)
        return
    if weak:
        raise UserError("--weak: says how --what-if's clusters compare; give --what-if CLUSTERS too")
    found = plans.answer(asked) if html is None else answer
    if out is not None and found["feasible"]:
        reports.write_json(out.resolve().parent, found["plan"], name=out.name)
    if as_json:
        print_json(found)
    else:
        plan_view.show(found, console)
    if not found["feasible"]:
        raise typer.Exit(1)


def preflight(
    config: Any, *, world_size: int | None, cluster: str | None, dataset: Path | None, rank: int | None, as_json: bool
) -> None:
    """`train --preflight`: a run on many ranks, as far as this process can try it; exit code 1 if it would fail."""
    from launch import rehearsal
    from trainer import planning

    meant = rehearsal.cluster_for(world_size, cluster, planning.profiles_of(config))
    found = rehearsal.rehearse(config, cluster=meant, dataset=dataset, plan_file=config.plan.file, rank=rank)
    if as_json:
        print_json(found)
    else:
        console = console_for(False)
        console.print(f"[bold]{escape(config.name)}[/bold] on [bold]{escape(found['cluster'])}[/bold]", highlight=False)
        for check in found["checks"]:
            mark = "[green]ok[/green]     " if check["ok"] else "[red]problem[/red]"
            console.print(f"  {mark}  {check['name']:9} {escape(check['said'])}", highlight=False, soft_wrap=True)
    if not found["ok"]:
        raise typer.Exit(1)
