"""What the machine offers: the numbers that the planner weighs."""

import os
from pathlib import Path

import torch
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, Topology, TopologyFactory, TrainerConfig


def detect(*, world_size: int, local_world_size: int, device: torch.device) -> Topology:
    """TorchRec's topology for this job: memory as found here, bandwidths as TorchRec assumes them.

    world_size ranks, local_world_size of them on each node, every node like this one.
    """
    host = host_memory_bytes() // local_world_size
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        hardware_config=HardwareConfig(hbm_cap_bytes=hbm, ddr_cap_bytes=host),
        kernel_config=KernelConfig(compute_device=device.type),
    )


def host_memory_bytes() -> int:
    """Memory of this host, or what its container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total
