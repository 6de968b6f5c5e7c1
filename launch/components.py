"""For `torchx run`: the same job that `tablemesh submit` makes, as a TorchX component.

torchx run -s local_cwd launch/components.py:train --config configs/quickstart.toml

The config travels with the job, and node 0 makes the run folder: TorchX starts a component without a chance to do so
first. TorchX calls the function and offers its arguments; it takes only plain types, and its help from this docstring.
"""

import sys
import time
from pathlib import Path
from types import TracebackType

import torchx.specs as specs

from kernels.errors import UserError
from launch import app, submit
from launch.job import Place
from launch.terminal import print_error
from trainer import config as configs


def _say(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """TorchX shows a traceback of whatever goes wrong; what the user did wrong is told in words, as by `tablemesh`."""
    if isinstance(error, UserError):
        print_error(str(error))
    else:
        sys.__excepthook__(kind, error, where)


sys.excepthook = _say  # of the `torchx` process, which alone loads this file


def train(
    config: str,
    nodes: int = 1,
    nproc: int = 0,
    gpus: int = 0,
    cpus: int = 0,
    memory: str = "",
    image: str = "",
    mounts: str = "",
    restarts: int = 3,
    preflight: bool = False,
    overrides: str = "",
    name: str = "",
) -> specs.AppDef:
    """Train a model.

    Args:
        config: path of a TOML config, such as configs/quickstart.toml
        nodes: machines, or containers
        nproc: ranks of each node; default: one for each GPU, or train.nproc
        gpus: GPUs of each node
        cpus: CPUs of each node
        memory: memory of each node, such as 60G
        image: container image, for schedulers that start containers
        mounts: FROM:TO[:ro], separated by commas
        restarts: times that a failed run starts again from its newest checkpoint
        preflight: examine all nodes before the first step
        overrides: A.B=C of the config, separated by semicolons
        name: name of the run folder; default: the config's name and the time
    """
    given = [text for text in overrides.split(";") if text]
    resolved = configs.load(config, [*given, f'name="{name}"'] if name else given)
    place = Place(
        image=image,
        gpus=gpus,
        cpus=cpus or None,
        memory_mb=submit.memory_mb(memory) if memory else None,
        mounts=tuple(submit.mount(text) for text in mounts.split(",") if text),
        restarts=restarts,
        preflight=preflight,
    )
    run = name or f"{resolved.name}-{time.strftime('%m%d-%H%M%S')}"
    return app.make(
        submit.delivered(resolved, run, Path.cwd() if not image else None, nodes=nodes, nproc=nproc, place=place)
    )
