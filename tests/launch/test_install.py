"""The lock files, the Makefile and what the project says about itself."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch import doctor
from tests.test_imports import imported

ROOT = Path(__file__).resolve().parent.parent.parent
# import name -> distribution, where they differ
DISTRIBUTION = {
    "fbgemm_gpu": "fbgemm-gpu-cpu",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "_pytest": "pytest",
    "xdist": "pytest-xdist",
}


def lock(name: str) -> dict[str, str]:
    lines = (ROOT / f"locks/{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", pin), f"not one exact version: {pin!r}"
    names = [pin.split("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    return dict(pin.split("==") for pin in pins)


def test_the_targets_differ_in_fbgemm_and_triton_alone():
    cpu, cuda = lock("cpu"), lock("cuda")
    assert cpu.pop("fbgemm-gpu-cpu") == cuda.pop("fbgemm-gpu")
    assert cuda.pop("triton") == lock("dev")["triton"]
    assert cpu == cuda and not cpu.keys() & lock("dev").keys()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_versions_fit_each_other(target):
    assert {check.state for check in doctor.packages(lock(target))} == {"ok"}
    assert tuple(map(int, lock(target)["urllib3"].split("."))) < (1, 27)


def unlocked(packages: set[str], pins: set[str]) -> dict[str, list[str]]:
    """What the modules of these packages import that is not among the pins: name -> files."""
    ours, missing = {"kernels", "sharding", "trainer", "launch", "benchmarks", "tests"}, {}
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            for name in imported(file.read_text(), package) - ours - set(sys.stdlib_module_names):
                if DISTRIBUTION.get(name, name.lower().replace("_", "-")) not in pins:
                    missing.setdefault(name, []).append(str(file.relative_to(ROOT)))
    return missing


def test_everything_imported_is_locked():
    """tests/launch/test_run_time.py trains without what is in locks/dev.txt alone."""
    ours = {"kernels", "sharding", "trainer", "launch", "benchmarks"}
    missing = unlocked(ours, lock("cpu").keys())
    assert missing.keys() == {"triton"}
    assert all("triton" in file or file == "benchmarks/gpu_kernels.py" for file in missing["triton"]), missing
    assert not unlocked(ours | {"tests"}, lock("cpu").keys() | lock("dev").keys())


@pytest.mark.parametrize("names", [("cpu",), ("cpu", "dev")])
def test_what_a_package_needs_is_locked(names):
    """pip installs all of them with --no-deps, so a dependency that no lock file names would be missing."""
    pins = {name for part in names for name in lock(part)} | {"fbgemm-gpu"}  # TorchRec's word for either build
    for name in pins - {"fbgemm-gpu", "torch"}:  # a CUDA wheel of torch brings what it alone needs
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = re.sub(r"[-_.]+", "-", requirement.name).lower()
                assert needed in pins, f"{name} needs {needed}"


def test_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "tablemesh"
    assert project["scripts"] == {"tablemesh": "launch.cli:main"}
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project["requires-python"] == ">=3.11"


def dry(*words: str) -> str:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_installs_torch_first_and_the_rest_alone(tmp_path):
    out = dry("train", f"VENV={tmp_path}/v", "TARGET=cpu")
    torch, rest = out.index("--constraint locks/cpu.txt 'torch==2.13.0'"), out.index("--requirement locks/cpu.txt")
    assert torch < rest < out.index("--editable .") < out.index("tablemesh train configs/quickstart.toml")
    assert "--no-deps --requirement locks/cpu.txt --requirement locks/dev.txt" in out


def test_make_from_an_index_of_cpu_wheels(tmp_path):
    out = dry("test", f"VENV={tmp_path}/v", "TARGET=cpu", "TORCH_INDEX=some-index")
    assert "--no-deps --index-url 'some-index' 'torch==2.13.0'" in out
    assert out.rstrip().splitlines()[-1].startswith(f"{tmp_path}/v/bin/python -m pytest")


def test_make_does_no_work_twice(tmp_path):
    venv = tmp_path / "v"
    first = dry("install", f"VENV={venv}", "TARGET=cpu")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").touch()
    stamps = re.findall(r"^touch (\S+)$", first, flags=re.MULTILINE)
    assert len(stamps) == 2
    for stamp in stamps:
        Path(stamp).touch()
    assert "pip" not in dry("install", f"VENV={venv}", "TARGET=cpu")
    assert "locks/cuda.txt" in dry("install", f"VENV={venv}", "TARGET=cuda")


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo Python 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    command = ["make", "install", f"VENV={tmp_path}/v", f"PYTHON={old}", "TARGET=cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"error: no Python >= 3.11 found (looked for: {old}); install one" in done.stderr
    assert not (tmp_path / "v").exists()


def test_no_tracked_file_names_a_package_host():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    host = re.compile(
        r"\b(pypi|files|download)\." + r"(org|pythonhosted|pytorch)\b|index-url[ =]+https?:", re.IGNORECASE
    )
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".toml", ".txt", ".md", ".html", ".j2", ".css", "", ".yml"}:
            found += [f"{name}: {line}" for line in path.read_text(errors="replace").splitlines() if host.search(line)]
    assert not found
