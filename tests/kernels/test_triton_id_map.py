"""The id map in Triton: all of it in Triton's interpreter, and which map a device gets.

Triton decides when it is imported whether kernels are interpreted: what needs the interpreter has a process of its own.
"""

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


def test_its_suite_training_and_checkpoints_in_the_interpreter():
    chosen = "triton and not threads and not errs"  # it has one thread; what a filter errs follows from its equality
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen, "-W", "ignore::RuntimeWarning")
    suites = "tests/kernels/test_id_map.py", "tests/kernels/triton_interpreted.py"
    out = python("-m", "pytest", *options, *suites, TRITON_INTERPRET="1")
    assert " skipped" not in out and int(out.rsplit(" passed", 1)[0].split()[-1]) >= 18


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


def test_the_benchmark_without_a_gpu_says_so():
    command = [sys.executable, "-m", "launch.cli", "bench", "idmap", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "error: no GPU" in done.stderr, done.stderr
