"""Examine every rank's machine before training: `python -m launch.preflight JOB.json`, started like the ranks.

Each rank looks at its own machine and tells all others; then all move data around. Every rank comes to the same verdict
from the same figures; rank 0 writes it to preflight.json in the run folder, and as errors/rank_0.json when a node is
bad, which ends the job before its first step.

- data: dataset.json and every Parquet file of the splits are there and their first and last bytes can be read
- disk, shared memory: as much as `tablemesh doctor` wants at least
- clocks: within CLOCK_SECONDS of rank 0's, over a barrier (logs and failures of nodes are put in order by time)
- GPUs: every rank has one, or none has, and all are of one kind
- network: each rank sends PAYLOAD_BYTES to the next one; a rank whose two links are both slower than SLOW_SHARE of the
  median, or below MIN_GBPS, is named. All-reduce and all-to-all bandwidths are measured and shown.
"""

import json
import os
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.doctor import DISK_PROBLEM, SHM_BYTES
from launch.progress import size
from trainer import config as configs
from trainer import quiet
from trainer.world import World

CLOCK_SECONDS = 5.0  # NTP keeps nodes within milliseconds; a clock that nobody sets is off by more
PAYLOAD_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
REPEATS = 5
SLOW_SHARE = 0.25  # of the median of all links; gloo on a busy host varies by a factor of two
MIN_GBPS = 0.05  # gigabits a second: below it is a broken link, not a slow one


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


def slow(hosts: list[str], gbps: list[float]) -> list[str]:
    """Ranks whose links are slow. gbps[r]: from rank r to rank r + 1 (the last one's to rank 0), gigabits a second.

    A slow link alone does not say which of its ends is at fault; two of them that share an end do.
    >>> slow(["a", "b", "c", "d"], [10.0, 1.0, 1.0, 10.0])
    ['rank 2 on c: 1.00 and 1.00 Gbit/s to its neighbours, the median link has 5.50']
    """
    if len(gbps) < 2:
        return []
    median = statistics.median(gbps)
    bad = [speed < max(MIN_GBPS, SLOW_SHARE * median) for speed in gbps]
    count = len(gbps)
    return [
        f"rank {r} on {hosts[r]}: {gbps[r - 1]:.2f} and {gbps[r]:.2f} Gbit/s to its neighbours, "
        f"the median link has {median:.2f}"
        for r in range(count)
        if bad[r] and bad[r - 1] and (count == 2 or not (bad[r - 2] and bad[(r + 1) % count]) or all(bad))
    ]


def links(world: World) -> list[float]:
    """Gigabits a second from each rank to the next one, one link after the other."""
    if world.size < 2:
        return []
    buffer = torch.zeros(PAYLOAD_BYTES[world.device.type], dtype=torch.uint8, device=world.device)
    mine = 0.0
    for sender in range(world.size):
        receiver = (sender + 1) % world.size
        dist.barrier()
        if world.rank not in (sender, receiver):
            continue
        move = dist.send if world.rank == sender else dist.recv
        peer = receiver if world.rank == sender else sender
        seconds = _median_seconds(lambda move=move, peer=peer: move(buffer, peer), world.device)
        if world.rank == sender:
            mine = buffer.numel() * 8 / 1e9 / seconds
    return _gather(mine, world)


def collectives(world: World) -> dict[str, float]:
    """Gigabytes a second of each rank in an all-reduce and an all-to-all: bus bandwidth, as NCCL's tests count."""
    if world.size < 2:
        return {}
    numel = PAYLOAD_BYTES[world.device.type] // 4 // world.size * world.size
    buffer = torch.ones(numel, device=world.device)
    out = torch.empty_like(buffer)
    share = (world.size - 1) / world.size
    reduce_s = _median_seconds(lambda: dist.all_reduce(buffer), world.device)
    exchange_s = _median_seconds(lambda: dist.all_to_all_single(out, buffer), world.device)
    bytes_ = numel * 4
    return {
        "all_reduce_gb_s": 2 * share * bytes_ / reduce_s / 1e9,
        "all_to_all_gb_s": share * bytes_ / exchange_s / 1e9,
    }


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):  # the first one sets up connections
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


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
    lines = complaints(found)
    gbps = links(world)
    lines += slow([rank["host"] for rank in found], gbps)
    figures = {"ok": not lines, "complaints": lines, "ranks": found, "links_gbit_s": gbps, **collectives(world)}
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
