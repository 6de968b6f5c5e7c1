"""The command line inside the test's process, and a config for it."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """command(*words) -> (exit code, stdout, stderr) of `tablemesh WORDS` in an empty folder, with its own jobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tablemesh", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def config(tmp_path) -> Path:
    """The quickstart's config, with its data set in place as far as the command line looks at it."""
    (tmp_path / "data/quickstart").mkdir(parents=True)
    (tmp_path / "data/quickstart/dataset.json").write_text("{}")
    path = tmp_path / "config.toml"
    path.write_text((ROOT / "configs/quickstart.toml").read_text())
    return path
