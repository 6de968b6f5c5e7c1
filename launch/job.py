"""What is to be started, told to a scheduler: one frozen value, the same for every kind of scheduler."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launch import gpu, machine
from trainer import process

Action = Literal["train", "eval", "predict"]

ROOT = Path(__file__).resolve().parent.parent  # the folder that holds launch/, trainer/, sharding/, kernels/


IMAGE_ROOT = Path("/opt/tablemesh")  # where docker/Dockerfile puts that folder
VOLUME = Path("/workspace")  # where a volume that the submitting machine does not see is mounted

PORT = 29500  # of the nodes' roll call
WAIT_SECONDS = 300  # for all nodes to come
TIED = "TABLEMESH_TIED"  # environment variable: the node ends with the process that started it


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder of the host, or a volume by name (docker's, or a Kubernetes claim), inside the job's containers."""

    source: str  # absolute path = folder of the host, anything else = name of a volume
    target: str
    read_only: bool = False

    @property
    def is_volume(self) -> bool:
        return not self.source.startswith("/")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the job asks of wherever it runs. None: the scheduler's own default."""

    image: str = ""  # of the containers; "" where there are none
    gpus: int = 0  # of each node
    cpus: int | None = None  # of each node
    memory_mb: int | None = None  # of each node
    time_minutes: int | None = None  # limit of one run; the job checkpoints before it and is queued again
    mounts: tuple[Mount, ...] = ()
    restarts: int = 0  # how often a failed run starts again from its newest checkpoint
    preflight: bool = False  # examine all nodes before the first step
    options: Mapping[str, str] = field(default_factory=dict)  # of the scheduler, by its own names


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str  # shown to people and used by schedulers as the job's name
    action: Action
    run_dir: Path  # absolute; holds config.toml
    nproc: int  # ranks on each node
    nodes: int = 1
    threads: int  # of each rank
    grace: int = 60  # seconds from a signal to stop until the ranks are killed
    env: Mapping[str, str] = field(default_factory=dict)  # added to the ranks' environment
    values: Mapping[str, Any] = field(default_factory=dict)  # what JOB.json says besides action and run_dir
    module: str = "trainer"  # what each rank runs: `python -m MODULE JOB.json`
    place: Place = Place()
    detached: bool = False  # goes on when the process that submits it has ended
    config: str | None = None  # TOML that the first node writes into the run folder, which nobody else can reach
    max_restarts: int = 0  # of all ranks, after a failure

    @property
    def file(self) -> Path:
        return self.run_dir / ("JOB.json" if self.action == "train" else f"JOB-{self.action}.json")

    @property
    def logs(self) -> Path:
        """Folder of rank_R.out, rank_R.err and what the scheduler itself writes."""
        return self.run_dir / "logs" / self.action

    @property
    def errors(self) -> Path:
        """Folder of rank_R.json (by the ranks) and agent.json (by whoever watches them)."""
        return self.run_dir / "errors"

    def write(self) -> None:
        """Put JOB.json in the run folder."""
        text = json.dumps({"action": self.action, "run_dir": str(self.run_dir), **self.values}, indent=1)
        self.file.write_text(text + "\n")

    def agent_args(self) -> list[str]:
        """Arguments of python for the agent that starts and watches the ranks of one node."""
        return [
            *("-m", "launch.agent"),
            *("--nproc", str(self.nproc)),
            *("--module", self.module),
            *("--job", str(self.file)),
            *("--logs", str(self.logs)),
            *("--errors", str(self.errors)),
            *("--grace", str(self.grace)),
            *("--max-restarts", str(self.max_restarts)),
        ]

    def node_args(self, *, node_rank: str, head: str, run_id: str, port: int | str = PORT) -> list[str]:
        """Arguments of python for one node of a submitted job (launch/node.py, which explains them)."""
        return [
            *("-m", "launch.node"),
            *("--nodes", str(self.nodes)),
            *("--node-rank", node_rank),
            *("--head", head),
            *("--port", str(port)),
            *("--run-id", run_id),
            *("--nproc", str(self.nproc)),
            *(["--gpus", str(self.place.gpus)] if self.place.gpus else []),
            *("--restarts", str(self.place.restarts)),
            *("--grace", str(self.grace)),
            *(["--preflight"] if self.place.preflight else []),
            *("--module", self.module),
            *("--job", str(self.file)),
        ]


def make(
    *,
    name: str,
    action: Action,
    run_dir: Path,
    nproc: int,
    values: Mapping[str, Any] | None = None,
    module: str = "trainer",
    grace: int = 60,
    nodes: int = 1,
    place: Place | None = None,
    env: Mapping[str, str] | None = None,
    config: str | None = None,
    detached: bool = False,
    max_restarts: int = 0,
) -> Job:
    """A job with its threads and environment filled in.

    A rank gets an equal share of a node's CPUs: of those that `place` asks for, or else of all that are there, which a
    submitted job counts on its nodes (launch/node.py); unless OMP_NUM_THREADS is set by the user. `python -m` in the
    ranks finds our packages and not the ones of the same names that may lie in the working directory or in
    site-packages.
    env: what the user adds; it stands above everything that is chosen here.
    """
    place = place or Place()
    cpus = place.cpus or machine.cores()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cpus // nproc))
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT)]
    path = str(IMAGE_ROOT) if place.image else os.pathsep.join([str(ROOT), *given])
    chosen = {
        **process.environment(threads=threads),
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves Python's stack in the log
        "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorBoard looks for TensorFlow
    }
    if (detached or config) and place.cpus is None and "OMP_NUM_THREADS" not in os.environ:
        del chosen["OMP_NUM_THREADS"]
    if place.gpus:
        chosen |= gpu.SETTINGS
    return Job(
        name=name,
        action=action,
        run_dir=run_dir if config else run_dir.resolve(),
        nproc=nproc,
        nodes=nodes,
        threads=threads,
        grace=grace,
        env=chosen | dict(env or {}),
        values=values or {},
        module=module,
        place=place,
        config=config,
        detached=detached,
        max_restarts=max_restarts,
    )


def python(job: Job) -> str:
    """The interpreter that the job's nodes start: this one, or the one of the image."""
    return "python" if job.place.image else sys.executable


def resuming(job: Job) -> Job:
    """The same job, whose ranks go on from the run folder's newest checkpoint where there is one."""
    return replace(job, values={"resume": "auto", **job.values})


def moved(job: Job, run_dir: Path) -> Job:
    """The same job in another run folder, whose name it takes."""
    return replace(job, run_dir=run_dir, name=run_dir.name)
