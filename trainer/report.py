"""A run's report: `report.json` for programs, `report.html` for people.

`report.html` is made from what the run folder holds (config.toml, plan.json, metrics.jsonl, report.json, errors/), so
it can be written again at any time, also for a run that failed or is still going.
"""

import errno
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from kernels.errors import UserError

PACKAGES = (
    "tablemesh",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchmetrics",
    "torchx",
    "triton",
    "numba",
    "pyarrow",
    "numpy",
    "pydantic",
)


def versions() -> dict[str, str]:
    """What ran: Python and the installed packages that matter, without importing any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What it ran on: {"cpu", "cores" (usable by this process), "memory_bytes", "gpus", "system"}."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    return platform.processor() or platform.machine()


def write_json(run_dir: str | Path, report: dict[str, Any], *, name: str = "report.json") -> Path:
    """Write RUN/report.json (or another file of the run) in one move, so that a reader sees the old one or the new one.

    NaN and infinity become null. On a full disk the old file is overwritten where it stands, if it is large enough: a
    run that failed must not look as if it were going on.
    UserError when the disk is full or the folder cannot be written; the old file is then still there.
    """
    text = json.dumps(plain(report), indent=2, allow_nan=False) + "\n"
    return _write(Path(run_dir) / name, text)


def read(run_dir: str | Path) -> dict[str, Any]:
    """RUN/report.json.  UserError when there is none or it is broken."""
    path = Path(run_dir) / "report.json"
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; a run writes it when it starts: is this a run?") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); it was not written by tablemesh, or changed since") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object is needed, this is a {type(found).__name__}")
    return found


def write_html(run_dir: str | Path) -> Path:
    """Write RUN/report.html from what the run folder holds; what is missing there is left out of the page.

    UserError when the folder does not exist or the disk is full.
    """
    from trainer import report_page

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    return _write(run_dir / "report.html", report_page.render(run_dir))


def write_text(path: Path, text: str) -> Path:
    """Write a file in one move.  UserError when the disk is full or the folder cannot be written."""
    return _write(path, text)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity are None, paths text, numpy and torch scalars numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        return plain(value.tolist())
    return str(value)


def _write(path: Path, text: str) -> Path:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and _overwrite(path, text):
            return path
        raise UserError(f"{path}: cannot be written: {error.strerror or error}{_space(path)}") from error
    return path


def _overwrite(path: Path, text: str) -> bool:
    """Write `text` into the room that the old file has on the disk; False where there is none or it is too small."""
    data = text.encode()
    if not path.is_file() or len(data) > 512 * path.stat().st_blocks:
        return False
    try:
        with open(path, "r+b") as file:
            file.write(data)
            file.truncate()
    except OSError:
        return False
    return True


def _space(path: Path) -> str:
    """How much room is left, as a way out of a full disk."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return ""
    return f" ({free / 2**20:,.0f} MiB free on this disk; free some, or set run.dir to another one)"
