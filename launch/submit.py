"""`tablemesh submit`: from a config and what the user asks for to a job of any kind of scheduler."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from kernels.errors import UserError
from launch import dataset, handles, job, rundir, schedulers
from launch.job import Job, Mount, Place
from trainer.config import Config

_MB = {"": 1, "m": 1, "g": 1024, "t": 1024**2}


def prepare(
    config: Config, kind: str, *, nodes: int, nproc: int | None, place: Place, env: dict[str, str], named: bool
) -> Job:
    """The job of a training run, before anything is written. UserError when it cannot be.

    nproc: ranks of each node; default: one for each GPU asked for, or train.nproc.
    named: the user chose the run's name. Where nobody here can see which names are taken, others get the time as well.
    """
    nproc = _ranks(config, nodes, nproc, place)
    shares_files = schedulers.named(kind).shares_files
    if not shares_files:
        name = config.name if named else f"{config.name}-{time.strftime('%m%d-%H%M%S')}"
        return delivered(config, name, None, nodes=nodes, nproc=nproc, place=place, env=env)
    run_dir = (config.run.dir / config.name).absolute()
    if kind == "docker":
        place = _with_folders(place, run_dir.parent, config.data.path.absolute())
    made = job.make(
        name=config.name,
        action="train",
        run_dir=run_dir,
        nproc=nproc,
        nodes=nodes,
        place=place,
        env=env,
        grace=config.run.grace_seconds,
        detached=True,
    )
    return job.resuming(made)


def delivered(
    config: Config,
    name: str,
    root: Path | None,
    *,
    nodes: int,
    nproc: int | None,
    place: Place,
    env: dict[str, str] | None = None,
) -> Job:
    """A job that brings its config along; node 0 makes the run folder.

    root: what relative paths of the config are relative to; None: the volume that is mounted at job.VOLUME.
    """
    root = root or job.VOLUME
    nproc = _ranks(config, nodes, nproc, place)
    there = config.model_copy(update={"data": config.data.model_copy(update={"path": root / config.data.path})})
    return job.make(
        name=name,
        action="train",
        run_dir=root / config.run.dir / name,
        nproc=nproc,
        nodes=nodes,
        place=place,
        env=env,
        config=there.to_toml(),
        grace=config.run.grace_seconds,
    )


def _ranks(config: Config, nodes: int, nproc: int | None, place: Place) -> int:
    """Ranks of each node. UserError when they do not fit the GPUs or the config's streams."""
    nproc = nproc or place.gpus or config.train.nproc
    if place.gpus and nproc > place.gpus:
        raise UserError(f"--nproc {nproc}: more ranks than the {place.gpus} GPUs of a node; each has one of its own")
    config.check_world_size(nodes * nproc)
    return nproc


def submit(made: Job, kind: str, config: Config, console: Console) -> tuple[str, Path]:
    """Prepare the data, make the run folder and submit; (handle, run folder). What fails leaves no run folder."""
    there = schedulers.named(kind)
    there.request(made)  # a job that cannot be, or that nobody takes, must not cost the preparation of its data
    if not there.shares_files:
        return _noted(kind, there.submit(made), made.run_dir, console), made.run_dir
    there.reach(made)
    dataset.prepare_missing(console, config)
    run_dir = rundir.create(made.run_dir.parent, made.run_dir.name, latest=False)
    made = job.moved(made, run_dir)
    try:
        (run_dir / "config.toml").write_text(config.located().to_toml())
        made.write()
        id = there.submit(made)
    except BaseException:
        shutil.rmtree(run_dir)
        raise
    return _noted(kind, id, run_dir, console), run_dir


def _noted(kind: str, id: str, run_dir: Path, console: Console) -> str:
    """The handle of a job that now runs: whatever goes wrong here must not keep it from the user."""
    try:
        handles.record(kind, id, run_dir)
        if run_dir.is_dir():
            rundir.make_latest(run_dir)
    except (OSError, RuntimeError) as error:  # such as a home that is read-only, or none
        text = f"the job was submitted; its handle could not be written down: {error}"
        console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
    return handles.make(kind, id)


def memory_mb(text: str) -> int:
    """ "60G" -> 61440"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mgt]?)(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--memory {text!r}: write it as 60G or 900M")
    return int(float(match[1]) * _MB[match[2]])


def minutes(text: str) -> int:
    """ "90m" -> 90, "1d12h" -> 2160, "45" -> 45"""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m?)?", text.strip())
    total = sum(int(part or 0) * unit for part, unit in zip(match.groups(), (1440, 60, 1), strict=True)) if match else 0
    if total == 0:
        raise UserError(f"--time {text!r}: write it as 45m, 12h or 1d12h")
    return total


def mount(text: str) -> Mount:
    """ "/data:/data:ro" or "claim:/workspace" """
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1].startswith("/") or parts[2:] not in ([], ["ro"]):
        raise UserError(f"--mount {text!r}: write it as FOLDER_OR_VOLUME:/FOLDER/INSIDE, and :ro after it to read only")
    source = parts[0]
    if source.startswith(("./", "../", "~")):
        source = str(Path(source).expanduser().absolute())
    return Mount(source=source, target=parts[1], read_only=len(parts) == 3)


def pairs(flag: str, texts: list[str]) -> dict[str, str]:
    """["a=1"] -> {"a": "1"}"""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UserError(f"{flag} {text!r}: write it as {flag} NAME=VALUE")
        found[name] = value
    return found


def _with_folders(place: Place, *folders: Path) -> Place:
    """Containers see the runs and the data where they are here, so that every path means the same on both sides."""
    mounted = {mount.target for mount in place.mounts}
    own = [Mount(source=str(f), target=str(f)) for f in dict.fromkeys(folders) if str(f) not in mounted]
    return replace(place, mounts=(*own, *place.mounts))
