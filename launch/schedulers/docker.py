"""Docker on this machine, one container a node, through TorchX's local_docker.

What is different from TorchX 0.7.0's: an image that is not here ends the submission before anything is started, with
the command that makes it, instead of a warning and docker's own error; what was started is removed when a later
container cannot be; processes run as the user, so that the run folder stays the user's; there is an init process that
passes signals on; shared memory is 1 GB where no memory limit says otherwise; and a cancelled job has time to save.
"""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import yaml
from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.docker_scheduler import DockerJob, DockerScheduler, ensure_network
from torchx.specs import AppDef, AppDryRunInfo

from kernels.errors import UserError
from launch import app as apps
from launch.job import Job
from launch.torchx_kind import TorchxKind

SHM_SIZE = "1g"
STOP_SECONDS = 90  # from SIGTERM to SIGKILL: more than a rank takes to save


class Request(DockerJob):
    def __str__(self) -> str:
        """The containers as YAML, as docker-py's `containers.run` gets them."""
        shown = [{"image": c.image, "command": c.command, **c.kwargs} for c in self.containers]
        return yaml.safe_dump([_plain(container) for container in shown], sort_keys=False, width=1000)

    __repr__ = __str__


class Docker(DockerScheduler):
    """TorchX's `local_docker`, as `torchx run` gets it too."""

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[DockerJob]:
        made = super()._submit_dryrun(app, cfg)
        for container in made.request.containers:
            options = container.kwargs
            options["init"] = True
            options["user"] = user()
            options.setdefault("shm_size", SHM_SIZE)
            if apps.RUN_DIR in app.metadata:
                options["working_dir"] = str(Path(app.metadata[apps.RUN_DIR]).parent)
        return AppDryRunInfo(Request(made.request.app_id, made.request.containers), repr)

    def schedule(self, dryrun_info: AppDryRunInfo[DockerJob]) -> str:
        import docker

        job = dryrun_info.request
        for image in {container.image for container in job.containers}:
            self.find(image)
        client = daemon(self)
        ensure_network(client)
        started = []
        try:
            for container in job.containers:
                started.append(client.containers.create(container.image, container.command, **container.kwargs))
                started[-1].start()
        except BaseException as error:  # Ctrl-C, too, and a daemon that has gone
            for container in started:
                with contextlib.suppress(docker.errors.DockerException, OSError):
                    container.remove(force=True)
            if isinstance(error, docker.errors.APIError):
                raise UserError(f"docker: {error.explanation}") from error
            if isinstance(error, (docker.errors.DockerException, OSError)):
                raise UserError(f"docker: {error}; `docker info` tells whether its daemon still runs") from error
            raise
        return job.app_id

    def find(self, image: str) -> None:
        """UserError when no docker daemon answers, or it has no such image."""
        import docker

        try:
            daemon(self).images.get(image)
        except docker.errors.ImageNotFound:
            raise UserError(
                f"--image {image}: docker has no such image here; `docker pull {image}`, or make ours: "
                f"docker build -f docker/Dockerfile --target cpu -t {image} ."
            ) from None

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        found = super().describe(app_id) if self._get_containers(app_id) else None
        if found:
            found.msg = ", ".join(sorted({container.status for container in self._get_containers(app_id)}))
        return found

    def _get_containers(self, app_id: str) -> list[Any]:
        daemon(self)
        return super()._get_containers(app_id)

    def _cancel_existing(self, app_id: str) -> None:
        for container in self._get_containers(app_id):
            if container.status == "running":
                container.kill("SIGTERM")  # all of them at once, since the ranks save together
        for container in self._get_containers(app_id):
            container.stop(timeout=STOP_SECONDS)


def create_scheduler(session_name: str, **kwargs: Any) -> Docker:
    return Docker(session_name)


class Scheduler(TorchxKind):
    name = "docker"
    torchx_name = "local_docker"
    needs_image = True

    def backend(self) -> Docker:
        return Docker("tablemesh")

    def reach(self, job: Job) -> None:
        self._backend().find(job.place.image)

    def detail(self, id: str) -> str:
        return f"containers {super().detail(id)}"


def daemon(scheduler: Docker) -> Any:
    """The docker client. UserError when no daemon answers it."""
    import docker

    where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        if where.startswith("unix://"):  # docker's client leaves a socket open where nobody answers
            with socket.socket(socket.AF_UNIX) as knock:
                knock.connect(where.removeprefix("unix://"))
        client = scheduler._docker_client
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise UserError(
            f"no docker daemon answers at {where}: {error}\n"
            "start it (systemctl start docker), or be in the group docker; `docker info` tells"
        ) from error
    return client


def user() -> str:
    """The user that the container's processes are: whoever submits, so that what they write is theirs."""
    return f"{os.getuid()}:{os.getgid()}"


def _plain(value: Any) -> Any:
    """docker's Mount and DeviceRequest are dicts of a class of their own."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
