"""Kubernetes with Volcano, through TorchX's scheduler, whose Volcano job is completed here.

What TorchX 0.7.0 leaves out or gets wrong: /dev/shm has no size limit, so it counts against nothing until the node runs
out of memory; no time to save when a pod is stopped; pods run as root; a failed pod ends nothing by a policy, and a
stopped one is not started again; finished jobs stay for ever; and no node selector or toleration but the machine type.

Volcano's `svc` plugin makes the headless service by which the nodes find node 0 (VC_TRAINER_0_HOSTS), and gang
scheduling (minAvailable) lets no pod wait for the others on a GPU of its own.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, KubernetesScheduler, sanitize_for_serialization
from torchx.specs import AppDef, AppDryRunInfo, runopts

from kernels.errors import UserError
from launch import job as jobs
from launch.job import Job
from launch.schedulers.base import State
from launch.torchx_kind import TorchxKind

USER = 1000  # of docker/Dockerfile
STOP_SECONDS = 120  # from SIGTERM to SIGKILL: to save in
KEEP_SECONDS = 7 * 24 * 3600  # a finished job and its logs stay that long
MAX_REQUEUES = 100  # of stops after a checkpoint; failures are counted by launch/node.py
OPTIONS = {
    "node_selector": "labels of the nodes to run on, KEY:VALUE,...",
    "tolerate": "taints to tolerate, such as nvidia.com/gpu",
    "shm": "size of /dev/shm, such as 8Gi; default: half the memory limit, or 1Gi",
    "pull_secret": "name of the secret that the image is pulled with",
    "env_secret": "name of a secret whose keys become environment variables, such as an object store's credentials",
}


class Kubernetes(KubernetesScheduler):
    """TorchX's `kubernetes`, as `torchx run` gets it too."""

    def _run_opts(self) -> runopts:
        opts = super()._run_opts()
        for name, text in OPTIONS.items():
            kind: Any = {"node_selector": dict[str, str], "tolerate": list[str]}.get(name, str)
            opts.add(name, type_=kind, default=None, help=text)
        return opts

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        if app_id.count(":") != 1:
            raise UserError(f"{app_id!r}: kubernetes' jobs are called NAMESPACE:NAME, as in default:quickstart-abc")
        return super().describe(app_id)

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[KubernetesJob]:
        made = super()._submit_dryrun(app, cfg).request
        resource: Any = sanitize_for_serialization(made.resource)
        spec = resource["spec"]
        spec |= {
            "minAvailable": len(spec["tasks"]),
            "maxRetry": MAX_REQUEUES,
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "policies": [
                {"event": "PodEvicted", "action": "RestartJob"},  # the node was drained, or is lost
                {"exitCode": 75, "action": "RestartJob"},  # stopped after a checkpoint
                {"event": "PodFailed", "action": "AbortJob"},
            ],
        }
        for task in spec["tasks"]:
            _complete(task["template"], app, cfg)
        return AppDryRunInfo(KubernetesJob(images_to_push=made.images_to_push, resource=resource), repr)


def _complete(pod: dict[str, Any], app: AppDef, cfg: Any) -> None:
    """A pod template as it should be, in place."""
    spec = pod["spec"]
    spec["terminationGracePeriodSeconds"] = STOP_SECONDS
    spec["securityContext"] = {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER, "runAsNonRoot": True}
    if cfg.get("node_selector"):
        spec["nodeSelector"] = spec.get("nodeSelector", {}) | cfg["node_selector"]
    if cfg.get("tolerate"):
        spec["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in cfg["tolerate"]]
    if cfg.get("pull_secret"):
        spec["imagePullSecrets"] = [{"name": cfg["pull_secret"]}]
    memory_mb = app.roles[0].resource.memMB
    shm = cfg.get("shm") or (f"{memory_mb // 2}Mi" if memory_mb > 0 else "1Gi")
    for volume in spec["volumes"]:
        if volume["name"] == "dshm":
            volume["emptyDir"]["sizeLimit"] = shm
    (container,) = spec["containers"]
    if any(mount.dst_path == str(jobs.VOLUME) for mount in app.roles[0].mounts):
        container["workingDir"] = str(jobs.VOLUME)
    if cfg.get("env_secret"):
        container["envFrom"] = [{"secretRef": {"name": cfg["env_secret"]}}]
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def create_scheduler(session_name: str, **kwargs: Any) -> Kubernetes:
    return Kubernetes(session_name)


class Scheduler(TorchxKind):
    name = "kubernetes"
    torchx_name = "kubernetes"
    needs_image = True
    shares_files = False

    def backend(self) -> Kubernetes:
        return Kubernetes("tablemesh")

    def options(self, job: Job) -> dict[str, Any]:
        job = replace(job, place=replace(job.place, options={"queue": "default", **job.place.options}))
        return super().options(job)

    def check(self, job: Job) -> None:
        super().check(job)
        if not any(mount.target == str(jobs.VOLUME) for mount in job.place.mounts):
            raise UserError(
                f"--on kubernetes keeps data and runs on a volume: name its claim with --mount CLAIM:{jobs.VOLUME}"
                " (docs/launch.md has one)"
            )
        if len(job.name) > 40 or not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job.name):
            raise UserError(
                f"--name {job.name!r}: Kubernetes makes a host name of it, so it has small letters, digits "
                "and hyphens, 40 at most"
            )

    def submit(self, job: Job) -> str:
        with _words_of_the_cluster():
            return super().submit(job)

    def status(self, id: str) -> State:
        with _words_of_the_cluster():
            return super().status(id)

    def detail(self, id: str) -> str:
        with _words_of_the_cluster():
            return super().detail(id)

    def logs(self, id: str, run_dir: Path | None) -> Iterator[str]:
        with _words_of_the_cluster():
            yield from super().logs(id, run_dir)

    def cancel(self, id: str) -> None:
        with _words_of_the_cluster():
            super().cancel(id)


@contextmanager
def _words_of_the_cluster() -> Iterator[None]:
    """UserError with what the API server said, or that none answers."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a missing kubeconfig, which the error then tells
            yield
    except ApiException as error:
        try:
            said = json.loads(error.body)["message"]
        except (TypeError, ValueError, KeyError):
            said = error.reason
        way = "; is Volcano installed (kubectl get crd jobs.batch.volcano.sh)?" if error.status == 404 else ""
        raise UserError(f"kubernetes: {said}{way}") from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"no Kubernetes API server answers: {error}\n`kubectl cluster-info` tells; KUBECONFIG names the cluster"
        ) from error
