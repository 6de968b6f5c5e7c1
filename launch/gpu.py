"""Ranks and GPUs: the settings of NCCL that a job gets, and the CPUs that are near a rank's GPU.

A rank's device is the GPU of its local rank (trainer/world.py). Its threads should run on the CPUs of the same NUMA
node: a copy from host memory crosses the link between the sockets otherwise. Network cards need no setting of ours:
NCCL reads the PCI topology and gives every GPU the card nearest to it; `NCCL_IB_HCA` (by `--env`) narrows the choice.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")

# What a job with GPUs gets in its environment; `tablemesh submit --env NAME=VALUE` overrides each of them.
# docs/launch.md lists what else to try.
SETTINGS = {
    "NCCL_DEBUG": "WARN",  # NCCL says nothing of a broken network otherwise
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # after a timeout each rank writes down which collectives it was in
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # the ids of a batch vary in number, which fragments the memory
}


@dataclass(frozen=True)
class Numa:
    """cpus: node -> its CPUs, of those this process may use. gpus: NUMA node of each GPU, -1 where none is known."""

    cpus: dict[int, tuple[int, ...]]
    gpus: tuple[int, ...] = ()


def near(local_rank: int, local_size: int, numa: Numa) -> tuple[int, ...]:
    """The CPUs of one rank: those of its GPU's NUMA node, or, without GPUs, of the node whose turn it is.

    Ranks of one NUMA node share all of its CPUs: the kernel balances them better than a cut would. With one node, or
    fewer ranks than nodes, () leaves a rank where it may already be.

    >>> near(2, 4, Numa({0: (0, 1), 1: (2, 3)}, gpus=(0, 0, 1, 1)))
    (2, 3)
    >>> near(1, 4, Numa({0: (0, 1), 1: (2, 3)}))
    (0, 1)
    """
    nodes = sorted(node for node, cpus in numa.cpus.items() if cpus)
    if len(nodes) < 2:
        return ()
    if local_rank < len(numa.gpus):
        return numa.cpus.get(numa.gpus[local_rank], ())
    return numa.cpus[nodes[local_rank * len(nodes) // local_size]] if local_size >= len(nodes) else ()


def several_numa_nodes(sys: Path = SYS) -> bool:
    return len(list((sys / "devices/system/node").glob("node[0-9]*"))) > 1


def numa(allowed: set[int], bus_ids: list[str], sys: Path = SYS) -> Numa:
    """The NUMA nodes as the kernel lists them. bus_ids: of the GPUs, as nvidia-smi prints them."""
    cpus = {}
    for folder in sorted((sys / "devices/system/node").glob("node[0-9]*")):
        listed = _cpus((folder / "cpulist").read_text())
        cpus[int(folder.name.removeprefix("node"))] = tuple(cpu for cpu in listed if cpu in allowed)
    return Numa(cpus, tuple(_numa_node(bus_id, sys) for bus_id in bus_ids))


def bus_ids() -> list[str]:
    """PCI addresses of this process' GPUs, in the order of their local ranks; [] where there are none.

    nvidia-smi counts by PCI address and knows nothing of CUDA_VISIBLE_DEVICES, which is read here; of a list of UUIDs,
    or of slices of GPUs, nothing is concluded.
    """
    query = ["nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = sorted(done.stdout.split()) if done.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    chosen = visible.split(",")
    return [found[int(i)] for i in chosen] if all(i.isdigit() and int(i) < len(found) for i in chosen) else []


def _numa_node(bus_id: str, sys: Path) -> int:
    """ "00000000:1B:00.0", as nvidia-smi has it, is 0000:1b:00.0 in /sys."""
    domain, rest = bus_id.lower().split(":", 1)
    try:
        return int((sys / f"bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text())
    except OSError:
        return -1


def _cpus(text: str) -> list[int]:
    """ "0-2,8" -> [0, 1, 2, 8]"""
    found = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found
