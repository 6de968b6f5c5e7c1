"""The commands of jobs that run elsewhere: submit, status, logs, cancel. `launch.cli` adds them to `tablemesh`."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from launch.terminal import Json, Set, console_for, print_json

Handle = Annotated[str, typer.Argument(help="What submit printed, such as slurm://tablemesh/123, or the run folder.")]
POLL_SECONDS = 1.0


def submit(
    config: Annotated[Path, typer.Argument(help="TOML config, such as configs/quickstart.toml.")],
    on: Annotated[str, typer.Option("--on", help="local, docker, slurm, kubernetes, aws_batch or a module of yours.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines, or containers.")] = 1,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each node; default: one a GPU, or train.nproc.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 0,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of each node.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node, such as 60G.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time", help="Limit of one run, such as 12h.")] = None,
    image: Annotated[str, typer.Option(help="Container image (docker, kubernetes, aws_batch).")] = "",
    mount: Annotated[
        list[str] | None, typer.Option(metavar="FROM:TO[:ro]", help="Folder or volume for the containers; repeatable.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="A=B", help="Environment of the ranks; repeatable.")] = None,
    restarts: Annotated[
        int, typer.Option(min=0, max=8, help="Times a failed run starts again from its newest checkpoint.")
    ] = 3,
    preflight: Annotated[bool, typer.Option("--preflight", help="Examine all nodes before the first step.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="A=B", help="Option of the scheduler, such as partition=gpu; repeatable."),
    ] = None,
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder; default: the config's name.")] = None,
    module: Annotated[
        str, typer.Option(hidden=True, help="What each rank runs: `python -m MODULE JOB.json`.")
    ] = "trainer",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would be sent, send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train somewhere else: hand a job to a scheduler and leave. Prints the job's handle."""
    from launch import schedulers
    from launch import submit as submitting
    from launch.job import Place
    from trainer import config as configs

    console = console_for(as_json)
    overrides = [*(set_ or []), *([f"name={json.dumps(name)}"] if name else [])]
    resolved = configs.load(config, overrides)
    place = Place(
        image=image,
        gpus=gpus_per_node,
        cpus=cpus,
        memory_mb=submitting.memory_mb(memory) if memory else None,
        time_minutes=submitting.minutes(time_limit) if time_limit else None,
        mounts=tuple(submitting.mount(text) for text in mount or []),
        restarts=restarts,
        preflight=preflight,
        options=submitting.pairs("--option", option or []),
    )
    variables = submitting.pairs("--env", env or [])
    made = submitting.prepare(
        resolved, on, nodes=nodes, nproc=nproc, place=place, env=variables, named=name is not None
    )
    made = replace(made, module=module)
    if dry_run:
        text = schedulers.named(on).request(made)
        if as_json:
            print_json({"request": text})
        else:
            console.print(escape(text), end="", soft_wrap=True, highlight=False)
        return
    handle, run_dir = submitting.submit(made, on, resolved, console)
    if as_json:
        print_json({"handle": handle, "run_dir": str(run_dir)})
    else:
        console.print(f"run folder: {escape(str(run_dir))}", soft_wrap=True, highlight=False)
        console.print(escape(handle), soft_wrap=True, highlight=False)


def status(handle: Handle, as_json: Json = False) -> None:
    """How a submitted job goes: the scheduler's word, and the run's progress where its folder can be seen."""
    from launch import submitted

    found = submitted.status(handle)
    if as_json:
        print_json(found)
        return
    console = Console()
    for line in submitted.lines(found):
        console.print(escape(line), soft_wrap=True, highlight=False)


def logs(
    handle: Handle,
    rank: Annotated[int | None, typer.Option(min=0, help="All that one rank has printed.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """What a submitted job has printed: its nodes, and each rank's warnings and errors; one rank's all with --rank."""
    from launch import submitted

    console = Console()
    for line in submitted.logs(handle, rank=rank, follow=follow, wait=lambda: time.sleep(POLL_SECONDS)):
        console.print(escape(line), soft_wrap=True, highlight=False)


def cancel(handle: Handle, as_json: Json = False) -> None:
    """Stop a submitted job. Its ranks save a checkpoint first; a job that has ended is left alone."""
    from launch import submitted

    found = submitted.cancel(handle)
    if as_json:
        print_json(found)
    else:
        Console().print(
            escape(f"{found['handle']}: {found['was']}, now {found['state']}"), soft_wrap=True, highlight=False
        )
