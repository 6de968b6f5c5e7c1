"""The op's contract: specs, states, and the choice of a backend. What backends compute is in test_backends.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.backends import reference
from kernels.choice import choose
from kernels.errors import UserError
from kernels.ops import Optimizer, Spec, State, Table, TableBatchedEmbeddingBag, check, random_bits

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_the_example_by_hand():
    spec = Spec(
        tables=(Table(rows=100, dim=2), Table(rows=7, dim=1)),
        features=(0, 1, 0),
        optimizer=Optimizer(kind="sgd", lr=1.0),
    )
    bags = TableBatchedEmbeddingBag(spec, backend="reference")
    for t in range(2):
        table = bags.state.tables[t]
        table.copy_(torch.arange(table.shape[0], dtype=torch.float32)[:, None].expand_as(table))
    out = bags(torch.tensor([5, 5, 6, 0, 1, 99]), torch.tensor([0, 2, 2, 3, 4, 5, 6]))
    assert out.tolist() == [[10, 10, 6, 1, 1], [0, 0, 0, 99, 99]]
    out.backward(torch.ones_like(out))
    assert bags.state.tables[0][[5, 1, 99, 7]].tolist() == [[3, 3], [0, 0], [98, 98], [7, 7]]
    assert bags.state.tables[1][:, 0].tolist() == [-1, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Spec(tables=()), "at least one table"),
        (lambda: Spec(tables=(Table(rows=0, dim=4, name="a"),)), "table a: 0 rows"),
        (lambda: Spec(tables=(Table(rows=1, dim=4),), features=(1,)), "feature 0 names table 1"),
        (lambda: Spec(tables=(Table(rows=1, dim=4),), pooling="max"), "pooling = 'max': there are sum, mean, none"),
        (
            lambda: Spec(tables=(Table(rows=1, dim=4), Table(rows=1, dim=8)), pooling="none"),
            r"widths?, there are \[4, 8",
        ),
        (lambda: Optimizer(kind="lamb"), "optimizer.kind = 'lamb'"),
        (lambda: Optimizer(weight_decay=0.1), 'choose "l2" or "decoupled"'),
        (lambda: Optimizer(kind="sgd", weight_decay=0.1, decay="decoupled"), "FBGEMM has none"),
        (lambda: Optimizer(max_norm=0.0), "max_norm = 0.0"),
    ],
)
def test_what_a_spec_refuses(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_a_call_refuses():
    spec = Spec(tables=(Table(rows=3, dim=4), Table(rows=3, dim=4)))
    ids = torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"ids are torch\.float32"):
        check(spec, ids.float(), torch.tensor([0, 1, 2]), None)
    with pytest.raises(UserError, match="4 offsets for 2 features"):
        check(spec, ids, torch.tensor([0, 1, 1, 2]), None)
    with pytest.raises(UserError, match="weights of ids given and weighted = False"):
        check(spec, ids, torch.tensor([0, 1, 2]), torch.ones(2))
    with pytest.raises(UserError, match="one float32 for each of the 2 ids"):
        check(Spec(tables=spec.tables, weighted=True), ids, torch.tensor([0, 1, 2]), torch.ones(3))


def test_views_lie_on_the_flat_buffers():
    spec = Spec(tables=(Table(rows=3, dim=5), Table(rows=2, dim=4)), optimizer=Optimizer(kind="rowwise_adam"))
    state = State(spec)
    for table in state.tables:
        assert table.data_ptr() % 64 == 0
        table.fill_(1.0)
    assert state.weights.sum() == 3 * 5 + 2 * 4
    assert [v.shape for v in state.state_views("momentum1")] == [(3, 5), (2, 4)]
    assert [v.shape for v in state.state_views("momentum2")] == [(3,), (2,)]
    state.state_views("momentum2")[1].fill_(1.0)
    assert state.states["momentum2"].sum() == 2


def test_large_tables_start_as_zeros():
    state = State(Spec(tables=(Table(rows=40_000, dim=32),)))  # large enough for huge pages
    assert not state.weights.any()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about a process's memory")
def test_large_tables_lie_in_private_memory():
    """Python's anonymous maps are shared by default, and the kernel gives shared memory no huge pages."""
    weights = State(Spec(tables=(Table(rows=1 << 18, dim=16),))).weights
    maps = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in where.split("-")), kind) for where, kind in maps]
    assert [kind for first, end, kind in ranges if first <= weights.data_ptr() < end] == ["rw-p"]


def test_random_bits_are_even_and_differ():
    spec = Spec(tables=(Table(rows=1000, dim=64),))
    rows = torch.arange(1000)
    bits = random_bits(spec, step=1, table=0, rows_U=rows, dim=64)
    assert int(bits.min()) >= 0 and int(bits.max()) < 2**32
    for bit in range(32):
        assert abs(((bits >> bit) & 1).double().mean().item() - 0.5) < 0.01
    for other in ({"step": 2, "table": 0}, {"step": 1, "table": 1}):
        assert (bits == random_bits(spec, rows_U=rows, dim=64, **other)).double().mean() < 0.001


def test_stochastic_rounding_in_half_precision_is_unbiased_everywhere():
    for value in (1.0003, 3e-5, 2e-7, -6.1e-5):
        x_UD = torch.full((1, 100_000), value)
        bits_UD = random_bits(Spec(tables=(Table(rows=1, dim=1),)), step=1, table=0, rows_U=torch.zeros(1), dim=100_000)
        rounded = reference.round_at_random(x_UD, bits_UD, torch.float16)
        assert torch.equal(rounded, rounded.half().float())
        assert len(rounded.unique()) == 2
        gap = (rounded.max() - rounded.min()).item()
        assert abs(rounded.double().mean().item() - value) < 0.02 * gap


def test_auto_says_why_and_who_was_refused():
    choice = choose(Spec(tables=(Table(rows=3, dim=4),)), CPU)
    assert "fastest on cpu" in choice.why
    with pytest.raises(UserError, match="not a kind found in kernels/backends/"):
        choose(Spec(tables=(Table(rows=3, dim=4),)), CPU, "fbgem")


def test_it_runs_with_torch_alone():
    """On a machine without Numba, FBGEMM, Triton and TorchRec the reference serves, and says why the others do not."""
    code = """
import sys
for name in ("numba", "llvmlite", "fbgemm_gpu", "triton", "torchrec"):
    sys.modules[name] = None
import torch
from kernels.ops import Spec, Table, TableBatchedEmbeddingBag
bags = TableBatchedEmbeddingBag(Spec(tables=(Table(rows=3, dim=4),)))
bags(torch.tensor([1]), torch.tensor([0, 1])).sum().backward()
print(bags.choice.name, bags.choice.why)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("reference the fastest on cpu")


def test_a_frozen_lookup_changes_nothing():
    bags = TableBatchedEmbeddingBag(Spec(tables=(Table(rows=3, dim=4),)), backend="reference")
    with torch.no_grad():
        out = bags(torch.tensor([1]), torch.tensor([0, 1]))
    assert not out.requires_grad and bags.state.step == 0
