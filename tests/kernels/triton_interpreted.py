"""The id map in Triton's interpreter beyond its suite: states, training, checkpoints, its benchmark.

No test file by its name: tests/kernels/test_triton_id_map.py runs it in a process whose Triton interprets.
"""

import json
import random
import sys

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from benchmarks.id_map import Bench, main
from kernels.id_map import IdMap, owner_of, reshard
from kernels.id_maps.base import Policy
from sharding.by_id import figures, id_map_choices
from sharding.plan import embeddings_of
from tests.kernels.test_id_map import awkward_ids, happen, ids_of
from tests.models import build_sharded, train_sharded
from tests.sharding.test_by_id import FEATURES, MODEL, OPTIMIZERS, SEED, batches_of, tables_of
from tests.trainer import runs


@pytest.fixture(scope="module")
def one_rank():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            patch.setenv(name, str(value))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize("evict", ["lru", "lfu"])
def test_maps_go_on_from_each_others_states(evict):
    """cpu to triton to cpu, cut into ranks and joined on the way, beside the reference that goes the same way."""
    rng = random.Random(5)
    policy = Policy(limit=60, admit_after=2, evict=evict)
    ways = {"ours": ["cpu", "triton", "cpu", "triton"], "reference": ["reference"] * 4}
    ids = awkward_ids(rng) + [rng.getrandbits(63) - 2**62 for _ in range(100)]
    maps, clock, old_ranks = {}, 0, 1
    for place, ranks in enumerate((1, 1, 2, 1)):
        for name, kinds in ways.items():
            made = [IdMap(policy, rank=r, ranks=ranks, backend=kinds[place]) for r in range(ranks)]
            if place:
                states = [one.state_dict() for one in maps[name]]
                if ranks != old_ranks:
                    states = [found.state for found in reshard(states, policy=policy, ranks=ranks)]
                for one, state in zip(made, states, strict=True):
                    one.load_state_dict(state)
            maps[name] = made
        old_ranks = ranks
        for _ in range(2):
            clock += 1
            batch = ids_of(*rng.choices(ids[: 60 + 12 * clock], k=60))
            owner_N = owner_of(batch, ranks=ranks, seed=0)
            events = [("expire", 1)] * (clock % 4 == 0) + ["admit", "find"]
            for rank, (ours, expected) in enumerate(zip(*maps.values(), strict=True)):
                for event in events:
                    event = (event, batch[owner_N == rank].tolist()) if isinstance(event, str) else event
                    assert happen(ours, clock, *event) == happen(expected, clock, *event), (clock, event)
    counts = maps["ours"][0].counts
    assert counts.evicted and counts.expired and counts.defaulted and counts.admitted > 60


MADE = {torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}
ON_HOST = {"figures", "state"}


class Placed(TorchFunctionMode):
    """On a GPU a tensor that is made on no device in particular is on the wrong one.  met: (file, function) of all."""

    def __init__(self):
        super().__init__()
        self.met = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_code
        if function in MADE and caller.co_filename.endswith(("sharding/by_id.py", "id_maps/triton.py")):
            self.met.add(caller.co_filename.rpartition("/")[2])
            assert caller.co_name in ON_HOST or "device" in (kwargs or {}), (function, caller)
        return function(*args, **(kwargs or {}))


def test_training_is_the_same_with_either_map(one_rank):
    """Losses and rows, bit for bit, with ids that wait and expire."""
    results = []
    for kind in ("cpu", "triton"):
        made = build_sharded(
            tables_of("row_wise"), FEATURES, MODEL, OPTIMIZERS["adagrad"], dense=4, kernel="cpu", seed=SEED, id_map=kind
        )
        embeddings = embeddings_of(made.dmp.module)
        assert id_map_choices(embeddings) == {kind: "asked for"}
        with Placed() as placed:
            losses = train_sharded(made, batches_of(tables_of())[:6])
        assert placed.met >= ({"triton.py"} if kind == "triton" else {"by_id.py"})
        rows = [given.weights_ED.tolist() for kernel in embeddings.ebc_by_id.kernels for given in kernel.rows]
        happened = figures(embeddings)
        assert happened["brief"]["expired"] and happened["third"]["defaulted"]
        results.append([losses, happened, rows])
    assert results[0] == results[1]


def test_a_run_goes_on_with_the_other_map(one_rank, tmp_path):
    """Stopped twice: Triton's map, the CPU's, Triton's again; deltas in between; bit for bit as with one."""
    data = runs.write_data(tmp_path / "data")
    given = {"rows": 256, "admit_after": 2, "expire_steps": 3, "evict": "lfu"}
    tables = {"override": [{"match": "d", "kind": "collisionless", "options": given}]}
    train = {"batch_size": 32, "max_steps": 7, "log_every": 1}
    saves = {"every_steps": 2, "deltas": 2}

    def config_of(name, id_map):
        sections = {"tables": tables, "train": train, "checkpoint": saves, "kernels": {"id_map": id_map}}
        return runs.write_config(data, tmp_path / name, **sections)

    whole = config_of("whole", "cpu")
    expected = runs.run(whole)
    assert expected["kernels"]["id_map"]["backend"] == "cpu", expected["kernels"]
    config_of("cut", "triton")
    for id_map, stop_after in (("triton", 3), ("cpu", 5), ("triton", None)):
        found = runs.run(config_of("cut", id_map), resume=None if stop_after == 3 else "auto", stop_after=stop_after)
    assert found["kernels"]["id_map"]["backend"] == "triton", found["kernels"]
    assert found["id_maps"] == expected["id_maps"] and expected["id_maps"]["d"]["expired"]
    assert runs.losses(whole) == runs.losses(tmp_path / "cut") and len(runs.losses(whole)) == 7
    ours, theirs = runs.tensors(tmp_path / "cut"), runs.tensors(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_benchmark(capsys):
    assert main(json=True, bench=Bench(backend="triton", rows=600, batch=100, universe=300)) in (0, None)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["find", "admit, known ids", "admit, new ids", "admit after 10"]
    assert all(row["correct"] for row in rows)
