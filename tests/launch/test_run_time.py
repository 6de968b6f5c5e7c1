"""What locks/dev.txt adds is of no use to a run: without it `tablemesh` trains as ever; the CPU image relies on it."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.launch import small
from tests.launch.test_install import lock
from tests.launch.test_submit import CASES

ROOT = Path(__file__).resolve().parent.parent.parent

# Every Python runs it when it starts: what lies in site-packages under these names is not there.
HIDE = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {names!r}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""

IMPORT_ALL = """
import importlib, importlib.util, pkgutil
import docker, kubernetes, tensorboard.main

print(importlib.util.find_spec("triton"))

for package in ("kernels", "sharding", "trainer", "launch", "benchmarks"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if "_triton" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """The environment of a Python that has what locks/cpu.txt names, and nothing that locks/dev.txt names."""
    folder = tmp_path_factory.mktemp("hide")
    names = {
        name
        for name, owners in metadata.packages_distributions().items()
        if {owner.lower().replace("_", "-") for owner in owners} <= lock("dev").keys()
    }
    assert {"triton", "pytest", "pandas", "sklearn", "jsonschema"} <= names
    (folder / "sitecustomize.py").write_text(HIDE.format(names=names))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "TRITON"))}
    return env | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "XDG_STATE_HOME": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(env, tmp_path):
    """run(*words): (stdout, stderr) of `python WORDS` in an empty folder; it must end well and miss nothing aloud."""

    def run(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.search("warn|triton|No module", done.stderr, re.IGNORECASE), done.stderr
        return done.stdout

    return run


def test_all_modules_but_tritons_kernels_load(run):
    assert run("-W", "ignore", "-c", IMPORT_ALL) == "None\n"


def test_the_doctor_is_content(run):
    assert json.loads(run("-m", "launch.cli", "doctor", "--json"))["ok"]


def test_it_trains(run, tmp_path):
    config = small.write(tmp_path, name="lean", data=tmp_path / "data")
    words = ("train", config, "--nproc", "2", "--set", "run.tensorboard=true", "--json")
    report = json.loads(run("-m", "launch.cli", *words))
    assert (report["status"], report["world_size"]) == ("finished", 2)
    assert (tmp_path / "runs/lean/report.html").stat().st_size > 0
    assert list((tmp_path / "runs/lean").rglob("events.out.tfevents*"))


def test_it_submits(run, tmp_path):
    config = small.write(tmp_path, name="lean", data=tmp_path / "data")
    assert "launch.node" in run("-m", "launch.cli", "submit", config, *CASES["kubernetes"], "--dry-run")
