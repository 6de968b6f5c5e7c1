"""docker/: the Dockerfile is one that hadolint accepts and copies what is there; compose.yaml says what it should."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch import containers

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "docker/Dockerfile"


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert {f"!{source}", f"!{source.split('/')[0]}"} & set(ignored)
    for package in ("kernels", "sharding", "trainer", "launch", "benchmarks"):
        assert f"COPY {package} {package}\n" in DOCKERFILE.read_text()
    assert DOCKERFILE.read_text().count("COPY --from=code /opt/tablemesh ./\n") == 2, "in both targets"


def test_both_targets_have_their_lock_file_and_no_root():
    text = DOCKERFILE.read_text()
    for target in ("cpu", "cuda"):
        assert f"FROM packages-{target} AS {target}\n" in text and f"--requirement locks/{target}.txt" in text
    assert text.count("USER 1000:1000") == 2 and text.count("&& tablemesh doctor") == 2


def test_what_no_run_loads_stays_out():
    text = DOCKERFILE.read_text()
    installs = re.findall(r"^RUN .*?[^\\]\n", text.replace("\\\n", " "), flags=re.MULTILINE)
    installs = [line for line in installs if "pip install" in line and "--editable" not in line]
    assert len(installs) == 4 and all(line.endswith("&& slim\n") for line in installs)
    assert "locks/dev.txt" not in "".join(installs) and "COPY locks/dev.txt" not in text


def test_slim_takes_out_tests_headers_and_static_libraries(tmp_path):
    packages = tmp_path / "site-packages"
    go = (
        "numba/tests/a.py",
        "torch/include/c.h",
        "torch/test/b",
        "torch/bin/protoc",
        "x/lib/y.a",
        "pyarrow/include/z.h",
    )
    stay = (
        "numba/testing.py",
        "jinja2/tests.py",
        "pyre_extensions/tests/a.py",
        "torch/bin/torch_shm_manager",
        "triton/backends/nvidia/include/cuda.h",
    )
    for name in (*go, *stay):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
    python = tmp_path / "python3"  # that says where its packages lie
    python.write_text(f"#!/bin/sh\necho {packages}\n")
    python.chmod(0o755)
    subprocess.run([ROOT / "docker/slim"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    left = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    assert left == set(stay)


def test_compose_trains_the_quickstart_and_shows_it():
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert set(services) == {"folders", "train", "tensorboard"}
    assert services["train"]["build"]["dockerfile"] == "docker/Dockerfile"
    assert "${CONFIG:-configs/quickstart.toml}" in services["train"]["command"]
    for service in services.values():
        assert "../runs:/workspace/runs" in service["volumes"]


def test_compose_accepts_it():
    words = containers.compose()
    if words is None:
        pytest.skip("neither docker-compose nor `docker compose` is installed")
    words += ["-f", str(ROOT / "docker/compose.yaml")]
    for more in ([], ["-f", str(ROOT / "docker/compose.cuda.yaml")]):
        done = subprocess.run([*words, *more, "config"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        train = yaml.safe_load(done.stdout)["services"]["train"]
        assert train["command"][:2] == ["tablemesh", "train"] and ("deploy" in train) == bool(more)
