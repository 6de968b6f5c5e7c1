"""The examples of docs/extend.md, run as they stand: written to a package outside the project, named in a config."""

import re
from pathlib import Path

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels import registry
from sharding.embeddings import build_embeddings
from sharding.tables.base import Table
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


def vectors_of(bags_of):
    """Of the example kind: pooled vectors of the bags, the physical rows, and the table."""
    table = Table(name="t", features=("f",), rows=2**31, dim=4, kind="mine.double_hash", options={"rows": 7})
    embeddings = build_embeddings(tables=(table,), features=("f",)).to_empty(device="cpu")
    with torch.no_grad():
        weights = {config.name: embeddings.ebc.embedding_bags[config.name].weight for config in embeddings.physical}
        for seed, rows_ED in enumerate(weights.values()):
            rows_ED.copy_(torch.randn(rows_ED.shape, generator=torch.Generator().manual_seed(seed)))
        lengths = torch.tensor([len(bag) for bag in bags_of])
        ids = KeyedJaggedTensor(keys=["f"], values=torch.tensor([i for bag in bags_of for i in bag]), lengths=lengths)
        return embeddings(ids), {name: rows_ED.clone() for name, rows_ED in weights.items()}, table


def test_the_table_kind_does_what_its_reference_says(mine):
    bags = [[3, 10**9 + 7], [], [2**31 - 1], [3, 3, 5]]
    pooled_BX, weights, table = vectors_of(bags)
    reference = registry.load("sharding.tables", "mine.double_hash").reference
    for bag, found_X in zip(bags, pooled_BX, strict=True):
        expected_X = sum((reference(table, "f", id, weights) for id in bag), torch.zeros(4))
        torch.testing.assert_close(found_X, expected_X)
