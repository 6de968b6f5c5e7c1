"""The triton backend beyond the common suite: the suite in Triton's interpreter, compilation for GPUs, split runs.

Triton decides when it is imported whether kernels are interpreted: each of these has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.backends import triton as backend
from kernels.ops import Optimizer, Spec, Table

ROOT = Path(__file__).resolve().parents[2]


def python(*words: str, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_the_common_suite_in_the_interpreter():
    chosen = "triton and not threads"  # the interpreter has one thread
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen, "-W", "ignore::RuntimeWarning")
    suites = "tests/kernels/test_backends.py", "tests/kernels/test_interaction.py"
    out = python("-m", "pytest", *options, *suites, TRITON_INTERPRET="1")
    assert " skipped" not in out and int(out.rsplit(" passed", 1)[0].split()[-1]) > 60


def test_long_runs_of_one_row_are_split():
    """Runs around the sizes of a piece and of a piece of pieces, on rows of two widths, against the reference."""
    out = python("-c", SPLIT, TRITON_INTERPRET="1")
    assert out.split() == ["sum", "mean"]


SPLIT = """
import torch
from kernels.backends._triton_update import PIECE, PIECES
from kernels.ops import Optimizer, Spec, Table
from tests.kernels.cases import Batch, assert_close

lengths = [1, PIECE - 1, PIECE, 2 * PIECE + 1, 2 * PIECE * PIECES + 3 * PIECE + 5, 7]
for pooling in ("sum", "mean"):
    spec = Spec(
        tables=(Table(rows=9, dim=4), Table(rows=9, dim=3)),
        pooling=pooling,
        weighted=pooling == "sum",
        optimizer=Optimizer(kind="sgd", lr=0.001, max_gradient=1.0),
    )
    rng = torch.Generator().manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    bags = 64
    per_table = len(ids) // bags * bags
    ids_N = torch.cat([ids[torch.randperm(len(ids), generator=rng)[:per_table]] for _ in spec.tables])
    batch = Batch(
        ids_N=ids_N,
        offsets=torch.arange(2 * bags + 1) * (per_table // bags),
        weights_N=torch.rand(len(ids_N), generator=rng) if spec.weighted else None,
        grad=torch.randn(bags, 7, generator=rng),
    )
    assert_close("triton", spec, [batch])
    print(pooling)
"""


@pytest.mark.parametrize("capability", [90])
def test_every_kernel_compiles_for_a_gpu(tmp_path, capability):
    """To machine code, for what the host passes; rows of 16 bytes or more are read 16 bytes at a time."""
    out = python("-m", "tests.kernels.ptx", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    lines = [json.loads(line) for line in out.splitlines()]
    kernels = {
        "look_up",
        "weight_gradients",
        "make_keys",
        "find_runs",
        "fold",
        "fold_pieces",
        "update",
        "dots",
        "gradients",
        "find",
        "bound_uses",
        "put",
        "count",
    }
    assert {line["kernel"] for line in lines} == kernels
    for line in lines:
        if line["spec"].endswith(" 64") and line["kernel"] in ("look_up", "fold", "fold_pieces", "update"):
            assert "ld.global.v4.b32" in line["loads"], line


def test_what_it_refuses(monkeypatch):
    spec = Spec(tables=(Table(rows=3, dim=4),), optimizer=Optimizer())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "only in Triton's interpreter" in backend.supports(spec, torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if "triton" in sys.modules:
        assert "only in Triton's interpreter" in backend.supports(spec, torch.device("cpu"))
    assert "not on meta" in backend.supports(spec, torch.device("meta"))
