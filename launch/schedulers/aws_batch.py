"""AWS Batch through TorchX's own scheduler: the request for a multi-node parallel job, printed and not sent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from launch import job as jobs
from launch.job import Job
from launch.schedulers.base import State
from launch.torchx_kind import TorchxKind


class Scheduler(TorchxKind):
    name = "aws_batch"
    torchx_name = "aws_batch"
    needs_image = True
    shares_files = False

    def backend(self) -> Any:
        from torchx.schedulers.aws_batch_scheduler import create_scheduler

        return create_scheduler("tablemesh")

    def check(self, job: Job) -> None:
        super().check(job)
        if not job.place.memory_mb:
            raise UserError("--on aws_batch: name the memory of a node, such as --memory 60G; AWS Batch wants it")
        if not any(mount.target == str(jobs.VOLUME) for mount in job.place.mounts):
            raise UserError(
                f"--on aws_batch keeps data and runs on a file system: --mount FS:{jobs.VOLUME}, FS being its EFS id"
            )

    def submit(self, job: Job) -> str:
        self.check(job)
        raise UserError(
            "--on aws_batch: nothing is sent from here, since it could not be tried; --dry-run prints the job "
            "definition for `aws batch register-job-definition`"
        )

    def status(self, id: str) -> State:
        raise UserError(f"aws_batch: {id} was not sent from here; `aws batch describe-jobs` tells of it")

    def logs(self, id: str, run_dir: Path | None) -> Iterator[str]:
        raise UserError(f"aws_batch: {id} was not sent from here; its output is in CloudWatch, under /aws/batch/job")
