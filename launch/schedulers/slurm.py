"""Slurm, through TorchX's scheduler with its request, status and logs replaced.

Why not TorchX 0.7.0's own: it makes one heterogeneous job of N parts out of N nodes, which lists as several jobs; its
request has no signal before the time limit and writes its logs to the working directory; the first node's *name* is the
meeting point, resolvable or not; and its status needs slurmdbd and fails on "CANCELLED by 0". Here a job is one batch
script with one task a node, that a plain `sbatch` could take, and the states come from squeue and, where there is
accounting, from sacct.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse
from torchx.schedulers.slurm_scheduler import SlurmScheduler
from torchx.specs import AppDef, AppState, ReplicaStatus, Role, RoleStatus, macros, runopts

from kernels.errors import UserError
from launch import app as apps
from launch.job import Job
from launch.schedulers.base import Forgotten, State
from launch.torchx_kind import TorchxKind

# https://slurm.schedmd.com/squeue.html, "JOB STATE CODES"
STATES = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"), State.WAITING),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"), State.RUNNING),
    **dict.fromkeys(("RESV_DEL_HOLD", "SPECIAL_EXIT"), State.WAITING),
    "COMPLETED": State.SUCCEEDED,
    "CANCELLED": State.CANCELLED,
    **dict.fromkeys(("BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"), State.FAILED),
    **dict.fromkeys(("PREEMPTED", "REVOKED", "TIMEOUT"), State.FAILED),
}
LOG = "slurm-%j.log"
_TORCHX_STATES = {
    State.WAITING: AppState.PENDING,
    State.RUNNING: AppState.RUNNING,
    State.SUCCEEDED: AppState.SUCCEEDED,
    State.FAILED: AppState.FAILED,
    State.CANCELLED: AppState.CANCELLED,
}
SBATCH_OPTIONS = {
    "account": "account that the job is charged to",
    "qos": "quality of service",
    "reservation": "reservation to run in",
    "nodelist": "nodes to run on",
    "exclude": "nodes not to run on",
    "gres": "generic resources of each node, where gpus-per-node is not what the cluster knows",
}

EARLY_SECONDS = 60  # that Slurm may send its signal before the time asked for (sbatch(1), --signal)
SRUN = ("--kill-on-bad-exit=0", "--wait=60", "--unbuffered")
_SCRIPT = """\
#!/bin/bash
{directives}
set -uo pipefail

{exports}
# The nodes meet at the first one's address (its name need not resolve), at a port of this job's own.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
TABLEMESH_HEAD=$(scontrol --oneliner show node "$head" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
export TABLEMESH_HEAD=${{TABLEMESH_HEAD:-$head}}
export TABLEMESH_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Every node ends by itself, when it has saved; 60 s after the first one the rest is killed. Since Slurm 22.05 srun does
# not take over --cpus-per-task.
srun {options} \\
  {command}
code=$?
echo "run ${{SLURM_RESTART_COUNT:-0}} ended with exit code $code" >&2
if [ "$code" -eq 75 ]; then  # stopped after a checkpoint
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass
class Script:
    """What sbatch gets: its words, and the text on its stdin."""

    directives: list[str]
    env: dict[str, str]
    command: list[str]
    srun: list[str] = field(default_factory=list)  # options besides SRUN
    sbatch: list[str] = field(default_factory=lambda: ["sbatch", "--parsable"])
    run_dir: str | None = None

    def text(self) -> str:
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {shlex.quote(f'--{line}')}" for line in self.directives),
            exports="\n".join(f"export {key}={_quoted(value)}" for key, value in sorted(self.env.items())) + "\n",
            options=" ".join([*SRUN, *self.srun]),
            command=" ".join(shlex.quote(word) for word in self.command),
        )

    def __repr__(self) -> str:
        return f"{shlex.join(self.sbatch)} <<'SCRIPT'\n{self.text()}SCRIPT\n"


class Slurm(SlurmScheduler):
    """TorchX's `slurm`, as `torchx run` gets it too."""

    def _run_opts(self) -> runopts:
        opts = runopts()
        for name, option in super()._run_opts():
            if name != "job_dir":  # where TorchX would put its script, which needs no file here
                opts.add(name, type_=option.opt_type, default=option.default, help=option.help)
        for name, text in SBATCH_OPTIONS.items():
            opts.add(name, type_=str, default=None, help=text)
        return opts

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[Script]:
        if len(app.roles) != 1:
            raise ValueError(f"one role per job, got {len(app.roles)}")
        role = macros.Values(
            img_root=app.roles[0].image,
            app_id="$SLURM_JOB_ID",
            replica_id="$SLURM_NODEID",
            rank0_env="TABLEMESH_HEAD",
        ).apply(app.roles[0])
        run_dir = app.metadata.get(apps.RUN_DIR)
        logs = Path(run_dir, "logs") if run_dir else Path.cwd()
        resource = role.resource
        lines = [
            f"job-name={app.name}",
            f"nodes={role.num_replicas}",
            "ntasks-per-node=1",
            *([f"cpus-per-task={resource.cpu}"] if resource.cpu > 0 else []),
            *([f"mem={resource.memMB}M"] if resource.memMB > 0 else []),
            *([f"gpus-per-node={resource.gpu}"] if resource.gpu > 0 else []),
            *(f"{key}={value}" for key, value in cfg.items() if value is not None),
            "requeue",  # after the loss of a node, too
            "open-mode=append",
            f"output={logs}/{LOG}",
            f"signal=USR1@{apps.CHECKPOINT_SECONDS}",  # so long before the time limit: save, and be queued again
        ]
        script = Script(
            directives=lines,
            env=dict(role.env),
            command=[role.entrypoint, *role.args],
            srun=[f"--cpus-per-task={resource.cpu}"] if resource.cpu > 0 else [],
            run_dir=run_dir,
        )
        return AppDryRunInfo(script, repr)

    def schedule(self, dryrun_info: AppDryRunInfo[Script]) -> str:
        script = dryrun_info.request
        run_dir = Path(script.run_dir) if script.run_dir else None
        ours = run_dir is not None and not run_dir.exists()  # with `torchx run`: node 0 would make it
        if run_dir:
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its output
        try:
            # 123, or 123;cluster
            return _call(script.sbatch, stdin=script.text()).strip().split(";")[0]
        except UserError:
            if run_dir and ours:
                shutil.rmtree(run_dir)
            raise

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        found = look_up(app_id)
        if found is None:
            return None
        state = _TORCHX_STATES[found.state]
        replicas = [
            ReplicaStatus(id=node, role=apps.ROLE, state=state, hostname=name) for node, name in enumerate(found.nodes)
        ]
        return DescribeAppResponse(
            app_id=app_id,
            roles=[Role(name=apps.ROLE, image="", num_replicas=max(1, len(found.nodes)))],
            roles_statuses=[RoleStatus(apps.ROLE, replicas)],
            state=state,
            msg=found.words,
        )

    def _cancel_existing(self, app_id: str) -> None:
        _call(["scancel", app_id])

    def list(self) -> list[ListAppResponse]:
        lines = _call(["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]).splitlines()
        pairs = [line.split() for line in lines]
        return [ListAppResponse(app_id=id, state=_TORCHX_STATES[state_of(state)]) for id, state in pairs]

    def log_iter(self, app_id: str, role_name: str, k: int = 0, *args: Any, **kwargs: Any) -> Iterator[str]:
        """The batch script's output, which holds the nodes' too; TorchX's name for a stream is not looked at."""
        path = log_file(app_id)
        if path is None:
            raise Forgotten(f"slurm has forgotten job {app_id}, and where it writes; see logs/ in its run folder")
        if path.exists():
            yield from path.read_text(errors="replace").splitlines()


def create_scheduler(session_name: str, **kwargs: Any) -> Slurm:
    return Slurm(session_name)


class Scheduler(TorchxKind):
    name = "slurm"
    torchx_name = "slurm"
    port = "$TABLEMESH_PORT"

    def backend(self) -> Slurm:
        return Slurm("tablemesh")

    def check(self, job: Job) -> None:
        super().check(job)
        if job.place.image:
            raise UserError("--image: slurm runs what is installed on its nodes, not images; leave it out")
        if job.place.mounts:
            raise UserError("--mount: slurm starts no containers; its nodes see the folders that they share")
        if job.place.time_minutes and job.place.time_minutes * 60 <= apps.CHECKPOINT_SECONDS + EARLY_SECONDS:
            raise UserError(
                f"--time {job.place.time_minutes}m: {apps.CHECKPOINT_SECONDS} s before the limit, or up to "
                f"{EARLY_SECONDS} s earlier, the job saves and is queued again; it needs more time than that"
            )

    def options(self, job: Job) -> dict[str, Any]:
        limit = {"time": str(job.place.time_minutes)} if job.place.time_minutes else {}
        return limit | super().options(job)

    def reach(self, job: Job) -> None:
        _call(["sinfo", "--noheader"])

    def logs(self, id: str, run_dir: Path | None) -> Iterator[str]:
        """From the run folder, too, when Slurm has forgotten the job, which it does minutes after the end."""
        path = run_dir / "logs" / LOG.replace("%j", id) if run_dir else None
        if path is not None and path.exists():
            yield from path.read_text(errors="replace").splitlines()
        else:
            yield from self._backend().log_iter(id, apps.ROLE)


@dataclass(frozen=True)
class Found:
    """A job as Slurm tells of it. words: state, and why, for people."""

    state: State
    words: str
    nodes: tuple[str, ...] = ()


def look_up(id: str) -> Found | None:
    """From squeue while the job is queued or running or has just ended, then from sacct; None for an unknown id."""
    line = _call(["squeue", "--noheader", "--states=all", f"--jobs={id}", "--format=%T|%r|%N"], unknown="").strip()
    if line:
        state, reason, nodes = line.splitlines()[0].split("|")
        said = state if reason in ("None", "") else f"{state} ({reason})"
        return Found(state_of(state), said, tuple(_expand(nodes)))
    words = ["sacct", "--noheader", "--parsable2", "-X", f"--jobs={id}", "--format=State,ExitCode,NodeList"]
    line = _call(words, unknown="").strip()
    if line:
        state, code, nodes = line.splitlines()[-1].split("|")
        said = state if code in ("0:0", "") else f"{state}, exit code and signal {code}"
        return Found(state_of(state), said, tuple(_expand(nodes)))
    return None


def state_of(text: str) -> State:
    """ "CANCELLED by 0" and "CANCELLED+" are CANCELLED."""
    word = re.split(r"[ +]", text.strip(), maxsplit=1)[0]
    return STATES.get(word, State.WAITING)


def log_file(id: str) -> Path | None:
    found = re.search(r" StdOut=(\S+)", _call(["scontrol", "--oneliner", "show", "job", id], unknown=""))
    return Path(found[1].replace("%j", id)) if found else None


def _expand(nodes: str) -> list[str]:
    """ "n[1-2]" -> ["n1", "n2"]"""
    if not nodes or nodes.startswith(("(", "None")):
        return []
    return _call(["scontrol", "show", "hostnames", nodes], unknown=nodes).split()


def _quoted(value: str) -> str:
    """For the shell; the job's id is filled in by it."""
    return '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part else "" for part in value.split("$SLURM_JOB_ID")) or "''"


def _call(words: list[str], *, stdin: str | None = None, unknown: str | None = None) -> str:
    """stdout of one of Slurm's commands. UserError with its own words when it fails.

    unknown: what to return instead when it fails because it does not know the job, or has no accounting.
    """
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError:
        raise UserError(
            f"there is no `{words[0]}` here; submit from a machine of the cluster, or use --on local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"`{words[0]}` does not answer within 120 s; is slurmctld up? `sinfo` tells") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or f"exit code {done.returncode}"
    if unknown is not None and re.search(r"Invalid job id|accounting storage is disabled|Slurm accounting", said):
        return unknown
    raise UserError(f"slurm: {said}{_way_out(said)}")


_WAYS_OUT = {
    r"invalid partition": "`sinfo` lists the partitions; choose one with --option partition=NAME",
    r"[Ii]nvalid account|Invalid qos": "`sacctmgr show assoc user=$USER` lists yours; --option account=NAME, qos=NAME",
    r"Requested node configuration|More processors|Invalid generic resource": "`sinfo -N -o '%N %c %m %G'` shows what "
    "the nodes have; lower --cpus, --memory or --gpus-per-node",
    r"Node count specification invalid|PartitionNodeLimit": "`sinfo` shows how many nodes there are; lower --nodes",
    r"[Tt]ime limit": "`sinfo -o '%P %l'` shows the limits; lower --time",
    r"Unable to contact|connect": "is slurmctld up? `sinfo` tells",
    r"configuration source": "this machine belongs to no cluster: submit from one that does, or name the cluster's "
    "slurm.conf in SLURM_CONF",
}


def _way_out(said: str) -> str:
    return next((f"\n{way}" for pattern, way in _WAYS_OUT.items() if re.search(pattern, said)), "")
