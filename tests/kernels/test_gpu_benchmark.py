"""benchmarks/gpu_kernels.py at a tiny size in Triton's interpreter: its logic and its check, not its figures."""

import json
import subprocess
import sys

from tests.kernels.test_triton import ROOT, python

TINY = """
from benchmarks.gpu_kernels import Size, main

size = Size(tables=2, bytes=1 << 16, ids=120, copied=1 << 12, dims=(32,), lengths=(1, 10))
raise SystemExit(main(as_json=True, size=size, device="cpu"))
"""


def test_its_rows_and_its_check():
    found = json.loads(python("-c", TINY, TRITON_INTERPRET="1").splitlines()[-1])
    assert set(found) == {"bench", "hardware", "versions", "rows"}
    assert len(found["rows"]) == 2 * 2 * 2
    for row in found["rows"]:
        assert row["correct"] and row["baseline_name"] == "copy" and row["ours"] > 0, row
    assert [row["name"] for row in found["rows"][:2]] == [
        "d=32 L=1 uniform forward",
        "d=32 L=1 uniform backward + update",
    ]


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu_kernels"]
    hidden = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and "error: no GPU" in done.stderr
