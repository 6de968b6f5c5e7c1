"""The examples of docs/extend.md, run as they stand: written to a package outside the project, named in a config."""

import re
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.trainer.test_trainer import data, make_config  # noqa: F401  (data is a fixture)
from trainer import config as configs
from trainer.trainer import train
from trainer.world import World

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    blocks = re.findall(r"```python title=(\S+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert {name for name, _ in blocks} == {"mine/fm.py", "mine/double_hash.py"}
    for name, code in blocks:
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    (tmp_path / "site" / "mine" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def run(site, run_dir):
    import sys

    sys.path.insert(0, str(site))
    report = train(configs.load(run_dir / "config.toml"), run_dir, World.from_env())
    return report["eval"]["auc"]


def test_a_model_and_a_table_kind_from_outside_the_package(mine, data, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    make_config(
        data,
        run_dir,
        model={"kind": "mine.fm", "bottom": None, "top": None},
        tables={"override": [{"match": "c1", "kind": "mine.double_hash", "options": {"rows": 60}}]},
    )
    first, second = run_ranks(run, 2, mine, run_dir)
    assert first == second and 0.6 < first < 1.0
