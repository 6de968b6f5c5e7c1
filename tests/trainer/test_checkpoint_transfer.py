"""A new run that begins with another one's weights."""

import pytest
import torch

from kernels.errors import UserError
from tests.ranks import run_ranks
from tests.trainer import runs
from trainer.checkpoint.session import Session

SMALLER = {"labels": ["click"], "dense": ["x0", "x1"], "categorical": {"a": 40, "b": 50, "c": 70}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


class Begun(Exception):
    pass


def begin_only(run_dir):
    """Save what the run begins with, or return why it does not."""
    begin = Session.begin

    def and_save(self, resume, **given):
        self.finish(begin(self, resume, **given))
        raise Begun

    Session.begin = and_save
    try:
        runs.run(run_dir)
    except Begun:
        return None
    except UserError as error:
        return str(error)
    finally:
        Session.begin = begin


def begin_all(*run_dirs):
    return [begin_only(run_dir) for run_dir in run_dirs]


def test_tables_by_name_grown_and_cut(data, tmp_path):
    first = runs.write_config(data, tmp_path / "first")
    sections = {"data": {"features": SMALLER, "id_policy": "clip"}}
    made: dict[str, dict] = {"plain": {}}
    for rows in ("any", "same", "cut"):
        made[rows] = {"init_from": str(first), "init_rows": rows}
    folders = {name: runs.write_config(data, tmp_path / name, checkpoint=c, **sections) for name, c in made.items()}
    # Another seed, so that equal weights were copied and not drawn alike.
    for folder in folders.values():
        (folder / "config.toml").write_text((folder / "config.toml").read_text().replace("seed = 1", "seed = 2"))
    first_one, *refused = run_ranks(begin_all, 2, first, *folders.values())[0]
    assert first_one is None and refused[:2] == [None, None]
    assert "table 'b' has 64 rows there and 50 here" in refused[2]
    assert "table 'c' has 50 rows there and 70 here" in refused[3]
    source, own, found = (runs.tensors(folder) for folder in (first, folders["plain"], folders["any"]))
    a, b, c = (f"tables/{table}/weight" for table in "abc")
    assert torch.equal(found[a], source[a]) and not torch.equal(own[a], source[a])
    assert torch.equal(found[b], source[b][:50])
    assert torch.equal(found[c][:50], source[c]) and torch.equal(found[c][50:], own[c][50:])
    text = runs.run_as_text(folders["any"])
    for words in ("table 'b' is cut from 64 to 50 rows", "table 'c' is grown from 50 to 70", "begins as a new one"):
        assert words in text
