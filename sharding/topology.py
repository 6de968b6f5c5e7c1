"""What a cluster offers: the numbers that the planner weighs.  No torch here: a plan for any cluster is made anywhere.

    parse("h100-80gb:16x8") -> Topology        16 hosts of 8 ranks each, one device a rank
    detect(world_size=..., ...) -> Topology    this machine, as often as there are hosts in the job
    load_profiles("my.toml") -> {name: Topology}

A profile is one host; its numbers are of one rank unless the field says host.  Rates of built-in profiles are the
vendor's peaks, and `sources` says whose; what of a peak is reached stands beside them as an efficiency.  Every number
can be set in TOML, as text with its unit:

    [profiles.my-h100]
    like = "h100-80gb"
    device_memory = "79GiB"
    inter_bandwidth = "200Gb/s"
"""

import math
import os
import platform
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache as cached
from pathlib import Path
from typing import Any

from kernels import registry
from kernels.errors import UserError

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
# quantity -> (an example for messages, unit -> factor)
UNITS: dict[str, tuple[str, dict[str, float]]] = {
    "bytes": ("80GiB", {f"{p}B": f for p, f in (_PREFIX | _BINARY).items()}),
    "bytes/s": (
        "3.35TB/s",
        {f"{p}B/s": f for p, f in (_PREFIX | _BINARY).items()} | {f"{p}b/s": f / 8 for p, f in _PREFIX.items()},
    ),
    "FLOP/s": ("494TFLOP/s", {f"{p}FLOP/s": f for p, f in _PREFIX.items()}),
    "s": ("5us", {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}),
    "share": ("70%", {"%": 0.01}),
}


def quantity(text: Any, kind: str, *, where: str) -> float:
    """ "3.35TB/s" -> 3.35e12.  UserError naming `where` for a number without a unit, another unit, or a value <= 0."""
    example, units = UNITS[kind]
    match = re.fullmatch(r"\s*(-?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ%/]*)\s*", str(text))
    if isinstance(text, bool) or match is None:
        raise UserError(f"{where} = {text!r}: needs a number with its unit, such as {example!r}")
    number, unit = match.groups()
    if not unit:
        raise UserError(f"{where} = {text!r}: a number without a unit; write it with one, such as {example!r}")
    if unit not in units:
        raise UserError(
            f"{where} = {text!r}: {unit!r} is not a unit of {kind}; {registry.nearest(unit, list(units))}, "
            f"for example {example!r}"
        )
    value = float(number.replace("_", "")) * units[unit]
    if value <= 0:
        raise UserError(f"{where} = {text!r}: must be above zero")
    if not math.isfinite(value):
        raise UserError(f"{where} = {text!r}: must be finite; {example!r} is an example")
    return value


def _of(kind: str, default: float | None = None) -> Any:
    """A field that is a quantity of this kind."""
    return field(metadata={"kind": kind}, **({} if default is None else {"default": default}))


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A cluster of equal hosts.  Bytes, seconds, bytes/s, FLOP/s.

    device: "cuda" or "cpu"; a CPU rank's device memory is its share of the host's.
    row_seconds, row_bandwidth: reading n table rows of b bytes from memory takes n * (row_seconds + b / row_bandwidth);
        cached_*: the same for rows in the device's cache; update_*: for reading, changing and writing back a row and
        its optimizer state; id_seconds: sorting an id and adding up its gradient.
    matrix_efficiency, fp32_efficiency: what of the rate matrix products reach, in bf16 and in float32.
    op_seconds: what an operation costs beside its work (a kernel launch); vector_bandwidth: bytes that elementwise
        operations read and write; step_seconds: host work of a step whatever its tables, which the device waits for.
    launch_seconds: what the host needs to launch a whole step, beside the device's work: no step is shorter
        (sharding/simulate.py; no plan changes it, so the planner leaves it out).
    feature_seconds: host and launch work of a feature, forward and backward, on each rank; part_seconds: of a feature
        on a rank that holds a part of its table; rows_seconds: what a feature of a row-wise table adds for each part
        that its ids are divided into; bucket_seconds: of dividing an id.
    group_seconds: of a sharding type in use, beside its collectives: its modules, its input and output distribution.
    replica_seconds: of the look-up and the update of a data_parallel table, beside its bytes; replica_id_seconds: of
        adding the gradient of one of its ids to a dense gradient; replica_row_seconds: of taking a touched row out of
        it, changing it and putting it back, beside its bytes.
    update_dense_bandwidth: bytes that a dense optimizer step and the averaging of gradients read and write.
    bag_seconds: of moving one pooled vector into its place after the all-to-all.
    link_efficiency: what of a link's rate an all-to-all reaches; reduce_efficiency: what of that an all-reduce reaches.
    intra_*, inter_*: of one rank to ranks of its host, to other hosts, each way; peer_seconds: what each further rank
        adds to the latency of a collective.
    overlap: whether ids travel, and batches are copied, while the device computes.
    sources: field -> where its number comes from.
    """

    name: str
    device: str
    hosts: int = 1
    ranks_per_host: int = 8
    device_memory: float = _of("bytes")
    cache: float = _of("bytes")
    memory_bandwidth: float = _of("bytes/s")
    matrix_fp32: float = _of("FLOP/s")
    matrix_bf16: float = _of("FLOP/s")
    host_memory: float = _of("bytes")
    host_bandwidth: float = _of("bytes/s")
    pcie_bandwidth: float = _of("bytes/s")
    intra_bandwidth: float = _of("bytes/s")
    intra_latency: float = _of("s")
    inter_bandwidth: float = _of("bytes/s")
    inter_latency: float = _of("s")
    peer_seconds: float = _of("s")
    ssd_memory: float = _of("bytes")
    ssd_bandwidth: float = _of("bytes/s")
    matrix_efficiency: float = _of("share")
    fp32_efficiency: float = _of("share", 1.0)
    link_efficiency: float = _of("share")
    reduce_efficiency: float = _of("share", 1.0)
    row_seconds: float = _of("s")
    row_bandwidth: float = _of("bytes/s")
    cached_row_seconds: float = _of("s")
    cached_row_bandwidth: float = _of("bytes/s")
    update_row_seconds: float = _of("s")
    update_row_bandwidth: float = _of("bytes/s")
    id_seconds: float = _of("s")
    vector_bandwidth: float = _of("bytes/s")
    update_dense_bandwidth: float = _of("bytes/s")
    op_seconds: float = _of("s")
    step_seconds: float = _of("s")
    launch_seconds: float = _of("s", 0.0)
    feature_seconds: float = _of("s")
    part_seconds: float = _of("s")
    rows_seconds: float = _of("s")
    bucket_seconds: float = _of("s")
    bag_seconds: float = _of("s")
    group_seconds: float = _of("s")
    replica_seconds: float = _of("s")
    replica_id_seconds: float = _of("s")
    replica_row_seconds: float = _of("s")
    overlap: bool = True
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def host_memory_per_rank(self) -> float:
        return self.host_memory / self.ranks_per_host

    @property
    def title(self) -> str:
        return f"{self.name}:{self.hosts}x{self.ranks_per_host}"

    @property
    def estimates(self) -> list[str]:
        """The numbers that no data sheet gives, no run has measured and no file has set."""
        return [name for name in QUANTITIES if re.search(r"(^|\()estimate\b", self.sources.get(name, ""))]

    @property
    def guessed(self) -> bool:
        """Whether all of them are estimates, as the built-in CPU's are."""
        return len(self.estimates) == len(QUANTITIES)

    def sized(self, *, hosts: int, ranks_per_host: int) -> "Topology":
        """The same hosts, another number of them; on a CPU a rank's memory is its share of the host's.

        The compute rates stay those of a rank: for a CPU they hold for the ranks per host they were measured with.
        """
        assert hosts >= 1 and ranks_per_host >= 1
        memory = self.host_memory / ranks_per_host if self.device == "cpu" else self.device_memory
        return replace(self, hosts=hosts, ranks_per_host=ranks_per_host, device_memory=memory)


QUANTITIES = {f.name: f.metadata["kind"] for f in fields(Topology) if f.metadata}

# What is the same for all GPUs here.  The rates of kernels are estimates with the source they rest on: nothing of this
# has been measured on each of these devices.
_GPU: dict[str, Any] = {
    "device": "cuda",
    "matrix_efficiency": 0.45,
    "fp32_efficiency": 0.9,
    "link_efficiency": 0.8,
    "cached_row_seconds": 0.0,
    "update_row_seconds": 0.0,
    "id_seconds": 60e-12,
    "op_seconds": 5e-6,
    "step_seconds": 300e-6,
    "launch_seconds": 8.9e-3,
    "feature_seconds": 2e-6,
    "part_seconds": 2e-6,
    "rows_seconds": 50e-9,
    "bucket_seconds": 20e-12,
    "bag_seconds": 0.0,
    "group_seconds": 60e-6,
    "replica_seconds": 150e-6,
    "replica_id_seconds": 60e-12,
    "replica_row_seconds": 0.0,
    "intra_latency": 10e-6,
    "inter_latency": 20e-6,
    "peer_seconds": 0.3e-6,
}
# A row costs as much as this many bytes more: TorchRec's planner charges rows of 256 bytes 1.15 times, of 128 bytes
# 1.75 times the time per byte of rows of 512 (planner/constants.py: HALF_BLOCK_PENALTY, QUARTER_BLOCK_PENALTY).
ROW_OVERHEAD_BYTES = 100
_GPU_SOURCES = {
    "row_seconds": "TorchRec's penalties for rows below 512 bytes (planner/constants.py), as bytes a row",
    "feature_seconds": "estimate",
    "part_seconds": "estimate",
    "rows_seconds": "estimate",
    "bucket_seconds": "FBGEMM's block_bucketize_sparse_features reads and writes an id a few times (estimate)",
    "vector_bandwidth": "80% of the memory's rate, what streaming kernels reach (estimate)",
    "update_dense_bandwidth": "80% of the memory's rate, what streaming kernels reach (estimate)",
    "matrix_efficiency": "estimate: large MLPs in bf16 reach 40 to 60% of the dense peak",
    "fp32_efficiency": "estimate without a source, and never measured: what large float32 products reach of the peak",
    "reduce_efficiency": "estimate: an all-reduce reaches the bus bandwidth of an all-to-all",
    "link_efficiency": "estimate: NCCL's bus bandwidth is about 80% of a link's rate for messages above 1 MB",
    "row_bandwidth": "70% of the memory's rate, what FBGEMM's table-batched kernels reach on wide rows (estimate)",
    "update_row_bandwidth": "70% of the memory's rate, each row read and written (estimate)",
    "cached_row_bandwidth": "the L2 cache gives about 2.5 times the memory's rate (estimate)",
    "id_seconds": "radix sort of 64-bit keys, about 16 G keys/s (estimate from CUB's published rates on A100)",
    "op_seconds": "a kernel launch (estimate)",
    "step_seconds": "host work of a TorchRec pipeline step that the device waits for (estimate)",
    "launch_seconds": "fitted to two published throughputs of TorchRec's DLRM with 26 features (docs/scaling.md)",
    "replica_seconds": "a dozen launches and one wait of the host for the device (estimate)",
    "replica_id_seconds": "FBGEMM sorts the ids of a dense gradient too: as id_seconds (estimate)",
    "group_seconds": "splits, permutes and the autograd functions of one sharding type (estimate)",
    "intra_latency": "NCCL over NVLink (estimate)",
    "inter_latency": "NCCL over InfiniBand (estimate)",
    "peer_seconds": "sends of an all-to-all are issued one by one (estimate)",
}


def _gpu(name: str, source: str, *, cache: str, hosts_of: int = 8, **values: str) -> Topology:
    """A built-in GPU profile; `values` are the vendor's numbers with their units, `source` says whose."""
    numbers = {key: quantity(text, QUANTITIES[key], where=key) for key, text in values.items()}
    bandwidth = numbers["memory_bandwidth"]
    return Topology(
        name=name,
        ranks_per_host=hosts_of,
        cache=quantity(cache, "bytes", where="cache"),
        row_seconds=ROW_OVERHEAD_BYTES / (0.7 * bandwidth),
        row_bandwidth=0.7 * bandwidth,
        update_row_bandwidth=0.7 * bandwidth,
        cached_row_bandwidth=2.5 * bandwidth,
        vector_bandwidth=0.8 * bandwidth,
        update_dense_bandwidth=0.8 * bandwidth,
        sources=_GPU_SOURCES | dict.fromkeys([*values, "cache"], source),
        **numbers,
        **_GPU,
    )


@cached
def profiles() -> dict[str, Topology]:
    """The built-in ones, one host each."""
    dgx_a100 = {
        "matrix_fp32": "19.5TFLOP/s", "matrix_bf16": "312TFLOP/s", "host_bandwidth": "409.6GB/s",
        "pcie_bandwidth": "32GB/s",
        "intra_bandwidth": "300GB/s", "inter_bandwidth": "200Gb/s", "ssd_bandwidth": "25GB/s",
    }  # fmt: skip
    dgx_h100 = {
        "matrix_fp32": "66.9TFLOP/s", "matrix_bf16": "989.4TFLOP/s", "host_memory": "2TB",
        "host_bandwidth": "614.4GB/s",
        "pcie_bandwidth": "64GB/s", "intra_bandwidth": "450GB/s", "inter_bandwidth": "400Gb/s",
        "ssd_memory": "30.7TB", "ssd_bandwidth": "50GB/s",
    }  # fmt: skip
    found = [
        _gpu(
            "a100-40gb", "NVIDIA A100 40GB SXM data sheet (float32, bf16 dense); DGX A100 data sheet: 8 GPUs, "
            "NVLink 600 GB/s both ways, 8 x 200 Gb/s, 16 x DDR4-3200",
            device_memory="39.4GiB", memory_bandwidth="1555GB/s", cache="40MB", host_memory="1TB",
            ssd_memory="15TB", **dgx_a100,
        ),
        _gpu(
            "a100-80gb", "NVIDIA A100 80GB SXM data sheet (float32, bf16 dense); DGX A100 data sheet: 8 GPUs, "
            "NVLink 600 GB/s both ways, 8 x 200 Gb/s, 16 x DDR4-3200",
            device_memory="79.2GiB", memory_bandwidth="2039GB/s", cache="40MB", host_memory="2TB",
            ssd_memory="30TB", **dgx_a100,
        ),
        _gpu(
            "h100-80gb", "NVIDIA H100 SXM data sheet (float32, bf16 without sparsity); DGX H100 data sheet: 8 GPUs, "
            "NVLink 900 GB/s both ways, 8 x 400 Gb/s, 16 x DDR5-4800",
            device_memory="79.1GiB", memory_bandwidth="3.35TB/s", cache="50MB", **dgx_h100,
        ),
        _gpu(
            "h200", "NVIDIA H200 SXM data sheet; host as DGX H100",
            device_memory="140GiB", memory_bandwidth="4.8TB/s", cache="50MB", **dgx_h100,
        ),
        _gpu(
            "b200", "NVIDIA DGX B200 data sheet, an eighth of the system: 1,440 GB and 64 TB/s of HBM3e, NVLink "
            "14.4 TB/s both ways, bf16 36 PFLOP/s with sparsity (HGX B200: 600 TFLOP/s in float32); 8 x 400 "
            "Gb/s, 16 x DDR5-5600",
            device_memory="180GB", memory_bandwidth="8TB/s", cache="126MB", matrix_fp32="75TFLOP/s",
            matrix_bf16="2.25PFLOP/s", host_memory="2TB", host_bandwidth="716.8GB/s", pcie_bandwidth="64GB/s",
            intra_bandwidth="900GB/s", inter_bandwidth="400Gb/s", ssd_memory="30.7TB", ssd_bandwidth="50GB/s",
        ),
        _gpu(
            "l4", "NVIDIA L4 data sheet (float32, bf16 without sparsity); 8 on one host over PCIe 4, 100 Gb/s a host",
            device_memory="22.5GiB", memory_bandwidth="300GB/s", cache="48MB", matrix_fp32="30.3TFLOP/s",
            matrix_bf16="121TFLOP/s", host_memory="384GiB", host_bandwidth="204.8GB/s", pcie_bandwidth="32GB/s",
            intra_bandwidth="20GB/s", inter_bandwidth="12.5Gb/s", ssd_memory="3TB", ssd_bandwidth="5GB/s",
        ),
        CPU_HOST,
    ]  # fmt: skip
    return {t.name: t for t in found}


# Two ranks of one thread each, gloo between them.
CPU_HOST = Topology(
    name="cpu",
    device="cpu",
    ranks_per_host=2,
    device_memory=8 * 2.0**30,
    cache=2 * 2.0**20,
    memory_bandwidth=10e9,
    matrix_fp32=100e9,
    matrix_bf16=150e9,
    host_memory=16 * 2.0**30,
    host_bandwidth=20e9,
    pcie_bandwidth=10e9,
    intra_bandwidth=1.2e9,
    intra_latency=150e-6,
    inter_bandwidth=1.0e9,
    inter_latency=200e-6,
    peer_seconds=30e-6,
    ssd_memory=100e9,
    ssd_bandwidth=1e9,
    matrix_efficiency=1.0,
    link_efficiency=1.0,
    row_seconds=15e-9,
    row_bandwidth=10e9,
    cached_row_seconds=5e-9,
    cached_row_bandwidth=40e9,
    update_row_seconds=30e-9,
    update_row_bandwidth=8e9,
    id_seconds=12e-9,
    vector_bandwidth=6e9,
    update_dense_bandwidth=4e9,
    op_seconds=8e-6,
    step_seconds=3e-3,
    feature_seconds=40e-6,
    part_seconds=20e-6,
    rows_seconds=50e-6,
    bucket_seconds=4e-9,
    bag_seconds=10e-9,
    group_seconds=1e-3,
    replica_seconds=300e-6,
    replica_id_seconds=100e-9,
    replica_row_seconds=300e-9,
    overlap=False,
    sources=dict.fromkeys(
        QUANTITIES, "estimate for two cores of a current server CPU, a rank on each, gloo between them"
    ),
)


def parse(text: str, known: Mapping[str, Topology] | None = None) -> Topology:
    """ "h100-80gb:16x8" is 16 hosts of 8 ranks; "h100-80gb:16" 16 hosts as the profile has them; "h100-80gb" one.

    known: profiles beside the built-in ones.  UserError for an unknown profile or numbers that make no cluster.
    """
    found = profiles() | dict(known or {})
    name, _, shape = text.partition(":")
    if name not in found:
        raise UserError(f"cluster {text!r}: no profile {name!r}; {registry.nearest(name, list(found))}")
    profile = found[name]
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", shape or "1")
    if match is None:
        raise UserError(f"cluster {text!r}: {shape!r} is not HOSTSxRANKS, such as {name}:16x8")
    hosts, ranks = int(match[1]), int(match[2] or profile.ranks_per_host)
    if hosts < 1 or ranks < 1:
        raise UserError(f"cluster {text!r}: {hosts} hosts of {ranks} ranks; there must be at least one of each")
    return profile.sized(hosts=hosts, ranks_per_host=ranks)


def load_profiles(path: str | Path) -> dict[str, Topology]:
    """The [profiles.NAME] of a TOML file.  UserError naming file, profile and key for what is wrong."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    sections = values.pop("profiles", None)
    if values or not isinstance(sections, dict):
        raise UserError(f"{path}: profiles stand in sections [profiles.NAME]; found {', '.join(values) or 'none'}")
    found: dict[str, Topology] = {}
    for name, section in sections.items():
        found[name] = _profile(name, section, profiles() | found, where=f"{path}: profiles.{name}")
    return found


def _profile(name: str, section: Mapping[str, Any], known: Mapping[str, Topology], *, where: str) -> Topology:
    given = dict(section)
    like = given.pop("like", None)
    if like not in known:
        raise UserError(f"{where}.like = {like!r}: names the profile to start from; it is one of {', '.join(known)}")
    base, changes = known[like], {}
    for key, value in given.items():
        if key == "ranks_per_host":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{where}.{key} = {value!r}: must be a whole number above zero")
            changes[key] = value
        elif key == "overlap":
            if not isinstance(value, bool):
                raise UserError(f"{where}.{key} = {value!r}: must be true or false")
            changes[key] = value
        elif key in QUANTITIES:
            changes[key] = quantity(value, QUANTITIES[key], where=f"{where}.{key}")
            if QUANTITIES[key] == "share" and key != "reduce_efficiency" and changes[key] > 1:
                raise UserError(
                    f"{where}.{key} = {value!r}: is a share of a peak, at most 100%; raise the peak instead"
                )
        else:
            raise UserError(
                f"{where}.{key}: unknown key; {registry.nearest(key, [*QUANTITIES, 'ranks_per_host', 'overlap'])}"
            )
    sources = {**base.sources, **dict.fromkeys(changes, where)}
    return replace(base, name=name, sources=sources, **changes)


def detect(
    *, world_size: int, local_world_size: int, device: str, known: Mapping[str, Topology] | None = None
) -> Topology:
    """This machine, world_size ranks of it, local_world_size on each host.

    A GPU gets the profile that its name fits, with the memory found; a GPU of no profile the nearest by memory rate.
    A CPU gets the "cpu" in `known`, else what `tablemesh bench calibrate` stored for this many ranks on a host, else
    the built-in "cpu".  Memory is what this host, or its container, has.
    """
    hosts = world_size // local_world_size
    found = profiles() | dict(known or {})
    memory = float(host_memory_bytes())
    if device == "cpu":
        own = None if "cpu" in (known or {}) else calibrated(local_world_size)
        profile = replace(own or found["cpu"], host_memory=memory)
        return profile.sized(hosts=hosts, ranks_per_host=local_world_size)
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    profile = _by_name(properties.name, properties.total_memory, found)
    profile = replace(profile, host_memory=memory, device_memory=float(properties.total_memory))
    return profile.sized(hosts=hosts, ranks_per_host=local_world_size)


def calibration_file(ranks: int) -> Path:
    """Where the measured profile of this kind of machine is kept, for this many ranks on a host.

    Below TABLEMESH_CACHE, else XDG_CACHE_HOME/tablemesh, else ~/.cache/tablemesh; named after the CPU, since the folder
    may be shared by machines that differ.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("TABLEMESH_CACHE") or Path(cache) / "tablemesh")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return folder / "calibrated" / f"{_cpu_slug()}-{cores}-cores-{ranks}-ranks.toml"


def calibrated(ranks: int) -> Topology | None:
    """The profile in `calibration_file`; None where there is none.  UserError where it cannot be read."""
    file = calibration_file(ranks)
    if not file.is_file():
        return None
    try:
        (profile,) = load_profiles(file).values()
    except (UserError, ValueError) as error:
        raise UserError(f"{error}\nremove {file}, or run `tablemesh bench calibrate` again") from error
    return profile


def _cpu_slug() -> str:
    """ "Intel(R) Xeon(R) Platinum 8488C" -> "intel-r-xeon-r-platinum-8488c"."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = named[1] if named else model
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def _by_name(name: str, memory: float, known: Mapping[str, Topology]) -> Topology:
    """ "NVIDIA H100 80GB HBM3" -> h100-80gb: of the profiles whose model the name has, the nearest in memory."""
    gpus = [t for t in known.values() if t.device == "cuda"]
    words = re.split(r"[\s\-]+", name.lower())
    same = [t for t in gpus if t.name.split("-")[0] in words]
    return min(same or gpus, key=lambda t: abs(t.device_memory - memory))


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
