"""What is to be started, told to a scheduler: one frozen value, the same for every kind of scheduler."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch import machine
from trainer import process

Action = Literal["train", "eval", "predict"]

ROOT = Path(__file__).resolve().parent.parent  # the folder that holds launch/, trainer/, sharding/, kernels/


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
) -> Job:
    """A job of one node, with its threads and environment filled in from this machine.

    A rank gets an equal share of the cores, unless OMP_NUM_THREADS is set by the user. `python -m` in the ranks finds
    our packages and not the ones of the same names that may lie in the working directory or in site-packages.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, machine.cores() // nproc))
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT)]
    path = os.pathsep.join([str(ROOT), *given])
    env = {
        **process.environment(threads=threads),
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves Python's stack in the log
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the ranks' store must not live in the agent
        "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorBoard looks for TensorFlow
    }
    return Job(
        name=name,
        action=action,
        run_dir=run_dir.resolve(),
        nproc=nproc,
        threads=threads,
        grace=grace,
        env=env,
        values=values or {},
        module=module,
    )
