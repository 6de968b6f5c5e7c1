"""Tables with rows of int8 in checkpoints: exact resume, deltas, and other column parts."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer import runs
from trainer.checkpoint import restore, scaled

KEEP = {"every_steps": 4, "keep": 100}


def tables(sharding):
    rest = {"match": ["a", "b", "d"], "row_type": "int8", "sharding": sharding}
    return {"override": [rest, {"match": "c", "sharding": "data_parallel"}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def stop_at(run_dir, step):
    return runs.run(run_dir, stop_after=step)


def go_on(run_dir, step):
    return runs.run(run_dir, resume="auto", stop_after=step)


def values(run_dir):
    chain = restore.newest(restore.place_of(run_dir, None))
    return {n: scaled.values(chain, n) for n in chain.tensors if n.startswith("tables/") and n.endswith("/weight")}


def test_resumed_and_written_as_deltas_it_is_the_same_run(data, tmp_path):
    whole = runs.write_config(data, tmp_path / "whole", tables=tables("column_wise"), checkpoint=KEEP)
    cut = runs.write_config(data, tmp_path / "cut", tables=tables("column_wise"), checkpoint=KEEP | {"deltas": 3})
    run_ranks(runs.run, 2, whole)
    run_ranks(stop_at, 2, cut, 13)
    run_ranks(go_on, 2, cut, None)
    expected, found = runs.tensors(whole), runs.tensors(cut)
    assert {t.dtype for n, t in expected.items() if n in ("tables/a/weight", "tables/d/weight")} == {torch.int8}
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_parts_by_columns_are_joined(data, tmp_path):
    whole = runs.write_config(data, tmp_path / "whole", tables=tables("column_wise"), checkpoint=KEEP)
    cut = runs.write_config(data, tmp_path / "cut", tables=tables("column_wise"), checkpoint=KEEP)
    run_ranks(runs.run, 2, whole)
    run_ranks(stop_at, 2, cut, 13)
    runs.write_config(data, cut, tables=tables("table_wise"), checkpoint=KEEP)
    run_ranks(go_on, 2, cut, None)
    assert runs.losses(cut) == pytest.approx(runs.losses(whole), abs=0.03)
    assert {"tables/a/scale:0-8"} == {n for n in runs.tensors(cut) if n.startswith("tables/a/scale")}


def test_a_run_begins_with_weights_of_another_row_type(data, tmp_path):
    """int8 -> float32 -> int8, each time trained with steps of 1e-30: the values stay, to the last bit but for that."""
    narrow = runs.write_config(data, tmp_path / "narrow", tables=tables("table_wise"))
    run_ranks(runs.run, 1, narrow)
    still = {"optim": {"sparse": {"kind": "sgd", "lr": 1e-30}, "dense": {"kind": "sgd", "lr": 1e-30}}}
    still["train"] = {"max_steps": 1}
    before, source = values(narrow), narrow
    for name, kinds in (("wide", {"override": None}), ("again", tables("table_wise"))):
        run_dir = runs.write_config(data, tmp_path / name, tables=kinds, checkpoint={"init_from": str(source)}, **still)
        run_ranks(runs.run, 1, run_dir)
        found = values(run_dir)
        for table in ("a", "b", "d"):
            name_of = f"tables/{table}/weight"
            torch.testing.assert_close(found[name_of], before[name_of], rtol=0, atol=1e-25, msg=f"{name}, {table}")
        source = run_dir
