"""This machine as the launcher and `doctor` see it: the kernel's files, no library."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = _CGROUP) -> int:
    """CPUs this process may use: its affinity mask, cut by the cgroup's quota."""
    return usable(len(os.sched_getaffinity(0)), cpu_quota(cgroup))


def usable(cores: int, quota: float | None) -> int:
    """Whole cores out of an affinity mask's and a quota's: (8, 2.5) -> 2."""
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """The cgroup's limit in CPUs (2.0 = two whole ones), or None where there is none."""
    v2 = _read(cgroup / "cpu.max").split()
    if len(v2) == 2 and v2[0] != "max":
        return int(v2[0]) / int(v2[1])
    quota, period = _read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return None


def memory_limit(cgroup: Path = _CGROUP) -> int | None:
    """The cgroup's memory limit in bytes, or None where there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(cgroup / name)
        if text.isdigit() and int(text) < 1 << 60:  # cgroup v1 writes a number near 2**63 for "no limit"
            return int(text)
    return None


def memory_total() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def oom_kills() -> int:
    """How often the kernel has killed a process here because memory ran out (since boot)."""
    for line in _read(Path("/proc/vmstat")).splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def cpu() -> tuple[str, frozenset[str]]:
    """Model name and feature flags, as /proc/cpuinfo has them."""
    name, flags = "unknown", frozenset[str]()
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and name == "unknown":
            name = value.strip()
        if key.strip() in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return name, flags


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
