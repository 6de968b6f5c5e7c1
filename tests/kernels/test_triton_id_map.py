"""The id map in Triton: its suite and whole training steps in Triton's interpreter, and which map a device gets.

Triton decides when it is imported whether kernels are interpreted: what needs the interpreter has a process of its own.
"""

import json
import subprocess
import sys

import pytest
import torch

from kernels.choice import choose
from kernels.errors import UserError
from kernels.id_map import BACKENDS, IdMap
from kernels.id_maps.base import Policy
from tests.kernels.test_triton import ROOT, python

CUDA = torch.device("cuda")


def test_the_common_suite_in_the_interpreter():
    chosen = "triton and not threads and not errs"  # it has one thread; what a filter errs follows from its equality
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen, "-W", "ignore::RuntimeWarning")
    out = python("-m", "pytest", *options, "tests/kernels/test_id_map.py", TRITON_INTERPRET="1")
    assert " skipped" not in out and int(out.rsplit(" passed", 1)[0].split()[-1]) > 10


def test_maps_go_on_from_each_others_states():
    """cpu to triton to cpu, cut into ranks and joined on the way, beside the reference that goes the same way."""
    assert python("-W", "ignore", "-c", STATES, TRITON_INTERPRET="1").split() == ["lru", "lfu"]


STATES = """
import random
from kernels.id_map import IdMap, owner_of, reshard
from kernels.id_maps.base import Policy
from tests.kernels.test_id_map import awkward_ids, happen, ids_of

rng = random.Random(5)
for evict in ("lru", "lfu"):
    policy = Policy(limit=300, admit_after=2, evict=evict)
    ways = {"ours": ["cpu", "triton", "cpu", "triton"], "reference": ["reference"] * 4}
    ids = awkward_ids(rng) + [rng.getrandbits(63) - 2**62 for _ in range(500)]
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
        for _ in range(3):
            clock += 1
            batch = ids_of(*rng.choices(ids[: 100 + 40 * clock], k=150))
            owner_N = owner_of(batch, ranks=ranks, seed=0)
            events = [("expire", 6)] * (clock % 4 == 0) + ["admit", "find"]
            for rank, (ours, expected) in enumerate(zip(*maps.values(), strict=True)):
                for event in events:
                    event = (event, batch[owner_N == rank].tolist()) if isinstance(event, str) else event
                    assert happen(ours, clock, *event) == happen(expected, clock, *event), (evict, clock, event)
    counts = maps["ours"][0].counts
    assert counts.evicted and counts.expired and counts.defaulted and counts.admitted > 300
    print(evict)
"""


def test_training_is_the_same_with_either_map():
    """Losses and rows, bit for bit, with ids that wait and expire."""
    out = python("-W", "ignore", "-c", TRAINING, TRITON_INTERPRET="1")
    cpu, triton = out.splitlines()
    assert json.loads(cpu) == json.loads(triton)


TRAINING = """
import json
import sys
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from sharding.by_id import figures, id_map_choices
from sharding.plan import embeddings_of
from tests.models import build_sharded, train_sharded
from tests.sharding.test_by_id import FEATURES, MODEL, OPTIMIZERS, SEED, batches_of, tables_of

MADE = {torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}
ON_HOST = {"figures", "state"}
met = set()


class Placed(TorchFunctionMode):  # on a GPU a tensor that is made on no device in particular is on the wrong one
    def __torch_function__(self, function, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_code
        if function in MADE and caller.co_filename.endswith(("sharding/by_id.py", "id_maps/triton.py")):
            met.add((caller.co_filename[-9:], caller.co_name))
            assert caller.co_name in ON_HOST or "device" in (kwargs or {}), (function, caller)
        return function(*args, **(kwargs or {}))


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for kind in ("cpu", "triton"):
    made = build_sharded(
        tables_of("row_wise"), FEATURES, MODEL, OPTIMIZERS["adagrad"], dense=4, kernel="cpu", seed=SEED, id_map=kind
    )
    embeddings = embeddings_of(made.dmp.module)
    assert id_map_choices(embeddings) == {kind: "asked for"}
    with Placed():
        losses = train_sharded(made, batches_of(tables_of())[:6])
    assert {file for file, _ in met} >= ({"triton.py"} if kind == "triton" else {"/by_id.py"})
    rows = [given.weights_ED.tolist() for kernel in embeddings.ebc_by_id.kernels for given in kernel.rows]
    happened = figures(embeddings)
    assert happened["brief"]["expired"] and happened["third"]["defaulted"]
    print(json.dumps([losses, happened, rows]))
"""


def test_which_map_a_device_gets(monkeypatch):
    policy = Policy(limit=3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choice = choose(policy, CUDA, package=BACKENDS)
    assert (choice.name, choice.why) == ("triton", "the fastest on cuda that supports the case")
    assert choose(policy, torch.device("cpu"), package=BACKENDS).name == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    choice = choose(policy, CUDA, package=BACKENDS)
    assert choice.name == "cpu" and "not triton: needs a GPU of compute capability 8.0 or newer" in choice.why
    with pytest.raises(UserError, match='"triton" cannot serve this: needs a GPU of compute capability 8'):
        choose(policy, CUDA, "triton", package=BACKENDS)
    with pytest.raises(UserError, match='"triton" cannot serve this: runs on a GPU; on CPU tensors only in Triton'):
        IdMap(policy, backend="triton")


def test_the_benchmark_in_the_interpreter():
    rows = json.loads(python("-W", "ignore", "-c", TINY, TRITON_INTERPRET="1").splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["find", "admit, known ids", "admit, new ids", "admit after 10"]
    assert all(row["correct"] for row in rows)


TINY = """
from benchmarks.id_map import Bench, main

raise SystemExit(main(json=True, bench=Bench(backend="triton", rows=600, batch=100, universe=300)))
"""


def test_the_benchmark_without_a_gpu_says_so():
    command = [sys.executable, "-m", "launch.cli", "bench", "idmap", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "error: no GPU" in done.stderr, done.stderr
