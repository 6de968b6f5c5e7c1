"""The commands of docs/launch.md, as far as they go without the clusters: submissions as dry runs, make's targets."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/launch.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "" for line in text.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("tablemesh submit")])
def test_a_submission_can_be_made(line, command, config, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.toml").write_text(config.read_text())
    large = config.read_text().replace("[data]\n", "[data]\nstreams = 64\n")  # for the ranks of a cluster
    (tmp_path / "my.toml").write_text(large)
    words = shlex.split(line)[1:]
    code, out, err = command(*words, *([] if "--dry-run" in words else ["--dry-run"]))
    assert (code, err) == (0, "") and out
    assert not (tmp_path / "runs").exists()


def test_other_commands_are_ours_or_known(command):
    code, out, _ = command("--help")
    assert code == 0
    for line in COMMANDS:
        words = line.split()
        assert words[0] in ("tablemesh", "torchx", "docker"), line
        if words[0] == "tablemesh":
            assert re.search(rf"\b{words[1]}\b", out), line
        if "configs/quickstart.toml" in words or "docker/compose.yaml" in words or "docker/Dockerfile" in words:
            assert all((ROOT / word).is_file() for word in words if word.startswith(("configs/", "docker/")))


def test_makes_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z-]+)`", PAGE))
    assert {"test", "test-slurm", "test-network", "test-image"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_manifests_are_valid():
    import kubernetes_validate

    found = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    assert {manifest["kind"] for manifest in found} == {"PersistentVolumeClaim"}
    for manifest in found:
        kubernetes_validate.validate(manifest, "1.32", strict=True)
