"""Examine every rank's machine before training: `python -m launch.preflight JOB.json`, started like the ranks.

Each rank looks at its own machine and tells all others; then all move data around. Every rank comes to the same verdict
from the same figures; rank 0 writes it to preflight.json in the run folder, and as errors/rank_0.json when a node is
bad, which ends the job before its first step.

- data: dataset.json and every Parquet file of the splits are there and their first and last bytes can be read
- disk, shared memory: as much as `tablemesh doctor` wants at least
- clocks: within CLOCK_SECONDS of rank 0's, over a barrier (logs and failures of nodes are put in order by time)
- GPUs: every rank has one, or none has, and all are of one kind
- network: launch/bandwidth.py
"""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch import bandwidth
from launch.doctor import DISK_PROBLEM, SHM_BYTES
from launch.progress import size
from sharding import topology
from trainer import config as configs
from trainer import planning, quiet
from trainer.world import World

CLOCK_SECONDS = 5.0  # NTP keeps nodes within milliseconds; a clock that nobody sets is off by more


def look(folder: Path, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """What one rank finds on its machine."""
    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "disk_bytes": shutil.disk_usage(run_dir).free,
        "shm_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        "unreadable": unreadable(folder),
    }


def unreadable(folder: Path) -> str | None:
    """Why the dataset cannot be read here, or None. The first and last bytes of a Parquet file are its magic."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        return f"{folder}: no Parquet file"
    for path in files:
        try:
            with open(path, "rb") as file:
                first = file.read(4)
                file.seek(-4, os.SEEK_END)
                if (first, file.read(4)) != (b"PAR1", b"PAR1"):
                    return f"{path}: not a whole Parquet file"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


def complaints(found: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the ranks' machines, a line each; [] when nothing is."""
    lines = []
    devices = [rank["device"] for rank in found]
    usual = max(devices, key=devices.count)
    for number, rank in enumerate(found):
        who = f"rank {number} on {rank['host']}"
        if rank["unreadable"]:
            lines.append(f"{who}: cannot read the data: {rank['unreadable']}")
        if rank["disk_bytes"] < DISK_PROBLEM:
            lines.append(f"{who}: {size(rank['disk_bytes'])} left on the disk of the run folder")
        if rank["shm_bytes"] < SHM_BYTES:
            lines.append(f"{who}: /dev/shm has {size(rank['shm_bytes'])}; docs/launch.md says how to give it more")
        if abs(rank["time"] - found[0]["time"]) > CLOCK_SECONDS:
            off = rank["time"] - found[0]["time"]
            lines.append(f"{who}: its clock is {off:+.0f} s off rank 0's; is NTP running there?")
        if rank["device"] != usual:
            lines.append(f"{who}: computes on {rank['device']}, most others on {usual}")
    return list(dict.fromkeys(lines))


def _promised(config: configs.Config, world: World) -> bandwidth.Expected | None:
    """By the planner's profile of this cluster. None where that is the built-in guess at a CPU's network."""
    on_cpu = world.device.type == "cpu"
    if world.size < 2 or (on_cpu and config.plan.profiles is None and topology.calibrated(world.local_size) is None):
        return None
    cluster = planning.cluster_of(
        config, world_size=world.size, local_world_size=world.local_size, device=world.device.type
    )
    return bandwidth.expected(cluster, bandwidth.PAYLOAD_BYTES[world.device.type])


def _gather(value: Any, world: World) -> list[Any]:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def main(job_file: str) -> int:
    quiet.install()
    run_dir = Path(json.loads(Path(job_file).read_text())["run_dir"])
    config = configs.load(run_dir / "config.toml")
    world = World.from_env()
    world.connect(config.run.timeout_seconds)
    dist.barrier()  # the clocks are read at one moment
    found = _gather(look(config.data.path, run_dir, world.device), world)
    network = bandwidth.measure(world, [rank["host"] for rank in found], _gather(_promised(config, world), world)[0])
    lines = complaints(found) + network.pop("complaints")
    figures = {"ok": not lines, "complaints": lines, "ranks": found, **network}
    if world.is_first:
        (run_dir / "preflight.json").write_text(json.dumps(figures, indent=1) + "\n")
        if lines:
            (run_dir / "errors").mkdir(exist_ok=True)
            error = {"rank": 0, "time": time.time(), "kind": "user", "message": "preflight: " + "\n".join(lines)}
            (run_dir / "errors" / "rank_0.json").write_text(json.dumps(error, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    return 2 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
