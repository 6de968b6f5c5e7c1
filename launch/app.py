"""A job as TorchX's AppDef: one role, one replica of it a node, each of which runs launch/node.py."""

from typing import Any

from torchx import specs

from launch import job as jobs
from launch.job import Job

ROLE = "trainer"
RUN_DIR = "tablemesh/run_dir"  # key of the AppDef's metadata
CHECKPOINT_SECONDS = 120  # from the signal before a time limit to the limit


def make(job: Job, *, port: int | str = jobs.PORT) -> specs.AppDef:
    """port: of the roll call; a text with `$NAME` is resolved on the node (several jobs may share a node there)."""
    place = job.place
    role = specs.Role(
        name=ROLE,
        image=place.image,
        entrypoint=jobs.python(job),
        args=job.node_args(
            node_rank=specs.macros.replica_id, head=specs.macros.rank0_env, run_id=specs.macros.app_id, port=port
        ),
        env=dict(job.env) | ({"TABLEMESH_CONFIG": job.config} if job.config else {}),
        num_replicas=job.nodes,
        resource=specs.Resource(cpu=place.cpus or -1, gpu=place.gpus, memMB=place.memory_mb or -1),
        mounts=[_mount(mount) for mount in place.mounts],
        max_retries=0,  # launch/node.py starts again by itself, and knows which failures are worth it
    )
    return specs.AppDef(name=job.name, roles=[role], metadata={RUN_DIR: str(job.run_dir)})


def _mount(mount: jobs.Mount) -> Any:
    if mount.is_volume:
        return specs.VolumeMount(src=mount.source, dst_path=mount.target, read_only=mount.read_only)
    return specs.BindMount(src_path=mount.source, dst_path=mount.target, read_only=mount.read_only)
