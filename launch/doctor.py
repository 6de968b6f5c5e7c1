"""`tablemesh doctor`: is this machine, with what is installed on it, fit to train?

`examine()` gives one Check per question. A check takes what it looks at as arguments, so that a test can hand it
another machine.
"""

import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import machine
from launch.job import ROOT
from launch.progress import size

OURS = ("kernels", "trainer", "sharding", "launch")
TORCHMETRICS_OF = {"1.8": "1.0.3"}  # torchrec -> the one torchmetrics it accepts, from its metadata
NEEDED = (
    *("torch", "torchrec", "torchmetrics", "torchx", "tensordict"),
    *("numba", "pyarrow", "numpy", "pydantic", "typer", "rich"),
)

SHM_BYTES = 64 << 20  # docker's default is 64 MB; NCCL and gloo need more between the ranks of one machine
SHM_WANTED = 1 << 30
DISK_PROBLEM, DISK_WANTED = 1 << 30, 10 << 30
FILES_PROBLEM, FILES_WANTED = 256, 1024  # a rank holds row groups, shard files and a socket per peer open


@dataclass(frozen=True, kw_only=True)
class Check:
    """state: ok | note (works, could be better) | problem (fix it first). A fix comes with everything but ok."""

    group: str
    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """Every check of this machine, in the order in which they are shown."""
    versions = installed()
    checks: list[Check] = []
    for probe in (
        lambda: [python(sys.version_info[:3])],
        lambda: packages(versions),
        lambda: ours(origins()),
        lambda: [loads()],
        lambda: processor(*machine.cpu()),
        lambda: threads(len(os.sched_getaffinity(0)), machine.cpu_quota(), os.environ),
        lambda: [memory(machine.memory_total(), machine.memory_limit())],
        lambda: [shared_memory(shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0)],
        lambda: [disk(shutil.disk_usage(Path.cwd()).free)],
        lambda: [open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))],
        lambda: hosts(socket.gethostname(), socket.gethostbyname),
        lambda: gpus(nvidia_smi(), versions),
    ):
        checks += probe()
    return checks


def installed() -> dict[str, str]:
    """Versions of the installed distributions, by normalised name."""
    return {
        (d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in metadata.distributions() if d.metadata
    }


def origins() -> dict[str, Path | None]:
    """From which folder each of our packages would be imported."""
    found = {}
    for name in OURS:
        spec = importlib.util.find_spec(name)
        found[name] = Path(spec.origin).resolve().parent if spec and spec.origin else None
    return found


def python(version: tuple[int, int, int]) -> Check:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return _problem("software", "Python", text, "use Python 3.11 or newer: make PYTHON=<program>")
    return _ok("software", "Python", text)


def packages(versions: Mapping[str, str]) -> list[Check]:
    """The versions of the stack against each other."""
    checks = []
    missing = [name for name in NEEDED if name not in versions]
    if missing:
        checks.append(_problem("software", "packages", f"missing: {', '.join(missing)}", "make install"))
    torch = versions.get("torch", "")
    if torch:
        checks.append(_ok("software", "torch", torch))
    cpu, cuda = versions.get("fbgemm-gpu-cpu"), versions.get("fbgemm-gpu")
    if cpu and cuda:
        fix = "both install the same module; rm -rf .venv, then make install TARGET=cpu (or cuda)"
        checks.append(_problem("software", "fbgemm", f"fbgemm-gpu-cpu {cpu} and fbgemm-gpu {cuda}", fix))
    elif not (cpu or cuda):
        checks.append(_problem("software", "fbgemm", "not installed", "make install"))
    else:
        name = "fbgemm-gpu-cpu" if cpu else "fbgemm-gpu"
        checks.append(_goes_with_torch(name, versions[name], torch))
    if "torchrec" in versions:
        checks.append(_goes_with_torch("torchrec", versions["torchrec"], torch))
        wanted = TORCHMETRICS_OF.get(_minor(versions["torchrec"]))
        metrics = versions.get("torchmetrics")
        if metrics and wanted and metrics != wanted:
            fix = f"torchrec {versions['torchrec']} wants {wanted}: pip install --no-deps torchmetrics=={wanted}"
            checks.append(_problem("software", "torchmetrics", metrics, fix))
        elif metrics:
            checks.append(_ok("software", "torchmetrics", metrics))
    for name in ("torchx", "pyarrow"):
        if name in versions:
            checks.append(_ok("software", name, versions[name]))
    return checks


def ours(found: Mapping[str, Path | None], root: Path = ROOT) -> list[Check]:
    """Our four packages are the ones that are imported: PyPI has others named kernels and trainer."""
    wrong = {name: path for name, path in found.items() if path != root / name}
    if not wrong:
        return [_ok("software", "our packages", f"{', '.join(found)} from {root}")]
    return [
        _problem(
            "software",
            f"package {name}",
            f"imported from {path}" if path else "cannot be imported",
            f"should come from {root / name}: pip uninstall {name} if a package of that name is installed, "
            "leave folders and files of that name out of PYTHONPATH, then make install",
        )
        for name, path in wrong.items()
    ]


def loads() -> Check:
    """The compiled parts fit each other: tried in a process of its own, as a misfit may crash it."""
    code = "import torch, fbgemm_gpu, torchrec; torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(3, dtype=int))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return _ok("software", "stack", "torch, torchrec and fbgemm load and run")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return _problem("software", "stack", last, "the versions do not fit each other: rm -rf .venv, then make install")


def processor(name: str, flags: frozenset[str]) -> list[Check]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return [_ok("machine", "CPU", f"{name} ({platform.machine()})")]
    features = {
        "AVX2": "avx2" in flags and "fma" in flags,
        "AVX-512": "avx512f" in flags,
        "bf16": "avx512_bf16" in flags or "amx_bf16" in flags,
        "AMX": "amx_tile" in flags,
    }
    text = ", ".join(f"{feature} {'yes' if there else 'no'}" for feature, there in features.items())
    if not features["AVX2"]:
        return [_problem("machine", "CPU", f"{name}: {text}", "FBGEMM's CPU kernels need AVX2: use another machine")]
    return [_ok("machine", "CPU", f"{name}: {text}")]


def threads(cores: int, quota: float | None, env: Mapping[str, str]) -> list[Check]:
    usable = machine.usable(cores, quota)
    text = f"{cores} cores" + (f", of which the cgroup grants {quota:.1f}" if quota is not None else "")
    asked = env.get("OMP_NUM_THREADS")
    if asked is None:
        return [_ok("machine", "threads", f"{text}; OMP_NUM_THREADS is not set, each rank gets its share")]
    if not asked.isdigit() or int(asked) < 1:
        return [_problem("machine", "threads", f"OMP_NUM_THREADS={asked!r}", "unset it or set a whole number above 0")]
    found = f"{text}; OMP_NUM_THREADS={asked}"
    if int(asked) > usable:
        return [
            _note("machine", "threads", found, "more threads than cores slows torch down 5-30x: unset OMP_NUM_THREADS")
        ]
    return [_ok("machine", "threads", found)]


def memory(total: int, limit: int | None) -> Check:
    text = size(total) + (f", of which the cgroup grants {size(limit)}" if limit is not None and limit < total else "")
    return _ok("machine", "memory", text)


def shared_memory(total: int) -> Check:
    fix = "docker run --ipc=host or --shm-size=1g; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if total < SHM_BYTES:
        return _problem("machine", "shared memory", size(total), fix)
    if total < SHM_WANTED:
        return _note("machine", "shared memory", f"{size(total)}, enough for gloo, little for NCCL", fix)
    return _ok("machine", "shared memory", size(total))


def disk(free: int) -> Check:
    found = f"{size(free)} free here ({Path.cwd()})"
    if free < DISK_PROBLEM:
        return _problem("machine", "disk", found, "make room: data, checkpoints and logs are written here")
    if free < DISK_WANTED:
        return _note("machine", "disk", found, "enough to try things; data and checkpoints of large tables need more")
    return _ok("machine", "disk", found)


def open_files(soft: int, hard: int) -> Check:
    if soft == resource.RLIM_INFINITY or soft >= FILES_WANTED:
        return _ok("machine", "open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at most")
    fix = f"ulimit -n {FILES_WANTED}" + ("" if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED else " (as root)")
    state = "problem" if soft < FILES_PROBLEM else "note"
    return Check(group="machine", name="open files", state=state, found=f"{soft} at most", fix=fix)


def hosts(name: str, resolve: Callable[[str], str]) -> list[Check]:
    """gloo and the rendezvous look these names up."""
    checks = []
    for host, needed in (("localhost", True), (name, False)):
        try:
            found = f"{host} is {resolve(host)}"
        except OSError as error:
            fix = f'add the line "127.0.0.1 {host}" to /etc/hosts'
            if needed:
                checks.append(_problem("machine", "name lookup", f"{host}: {error}", fix))
            else:
                fix = f"gloo falls back to the loopback address, fine on one machine; {fix}"
                checks.append(_note("machine", "name lookup", f"{host}: {error}", fix))
        else:
            checks.append(_ok("machine", "name lookup", found))
    return checks


def nvidia_smi() -> list[tuple[str, str, str]] | None:
    """(name, memory, driver) of each GPU; None when there is no nvidia-smi or it fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.strip().splitlines()]
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def gpus(found: list[tuple[str, str, str]] | None, versions: Mapping[str, str]) -> list[Check]:
    if not found:
        return [_ok("GPU", "GPU", "none; training runs on the CPU")]
    checks = [
        _ok("GPU", f"GPU {i}", f"{name}, {memory}, driver {driver}") for i, (name, memory, driver) in enumerate(found)
    ]
    fix = "make install TARGET=cuda"
    if "fbgemm-gpu-cpu" in versions:
        checks.append(_note("GPU", "fbgemm", "the CPU build is installed, so the GPUs cannot be used", fix))
        return checks
    code = "import torch; print(torch.cuda.is_available(), torch.version.cuda, *torch.cuda.nccl.version())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    if done.returncode != 0 or not words or words[0] != "True":
        said = (done.stderr.strip().splitlines() or ["torch sees no GPU"])[-1]
        checks.append(_problem("GPU", "CUDA", said, f"the driver must fit torch's CUDA; a CPU wheel of torch: {fix}"))
    else:
        checks.append(_ok("GPU", "CUDA", f"{words[1]}, NCCL {'.'.join(words[2:])}"))
    return checks


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"ok": all(c.state != "problem" for c in checks), "checks": [asdict(c) for c in checks]}


def show(checks: list[Check], console: Console) -> None:
    """One table, the problems with their fixes under their lines, a verdict at the end."""
    marks = {"ok": "[green]✓[/green]", "note": "[yellow]•[/yellow]", "problem": "[bold red]✗[/bold red]"}
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for check in checks:
        if check.group != group:
            if group:
                table.add_row()
            group = check.group
        table.add_row(marks[check.state], escape(check.name), escape(check.found))
        if check.fix:
            style = "red" if check.state == "problem" else "yellow"
            table.add_row("", "", f"[{style}]→ {escape(check.fix)}[/{style}]")
    console.print(table, highlight=False)
    problems = sum(c.state == "problem" for c in checks)
    notes = sum(c.state == "note" for c in checks)
    if problems:
        verdict = f"[bold red]{problems} {'problem' if problems == 1 else 'problems'} to fix first[/bold red]"
    else:
        verdict = "[bold green]ready to train[/bold green]"
    console.print(f"\n{verdict}" + (f", {notes} to know about" if notes else ""), highlight=False)


def _goes_with_torch(name: str, version: str, torch: str) -> Check:
    """torchrec and fbgemm 1.X go with torch 2.(X+5)."""
    own, of_torch = _numbers(version), _numbers(torch)
    if len(own) < 2 or own[0] != 1:
        return _note("software", name, version, "no rule known for this version; locks/ has the ones that are tested")
    wanted = f"2.{own[1] + 5}"
    if of_torch[:2] == (2, own[1] + 5):
        return _ok("software", name, f"{version}, goes with torch {wanted}")
    fits = f"{name} 1.{of_torch[1] - 5}" if len(of_torch) > 1 and of_torch[0] == 2 and of_torch[1] > 5 else name
    fix = f"{name} {version} needs torch {wanted}: install that, or {fits}; `make install` installs a set that fits"
    return _problem("software", name, f"{version} with torch {torch or 'missing'}", fix)


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)"""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _minor(version: str) -> str:
    return ".".join(map(str, _numbers(version)[:2]))


def _ok(group: str, name: str, found: str) -> Check:
    return Check(group=group, name=name, state="ok", found=found)


def _note(group: str, name: str, found: str, fix: str) -> Check:
    return Check(group=group, name=name, state="note", found=found, fix=fix)


def _problem(group: str, name: str, found: str, fix: str) -> Check:
    return Check(group=group, name=name, state="problem", found=found, fix=fix)
