"""The cache of compiled loops: who compiles at the same time as another process spoils nothing for either."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _njit

ROOT = Path(__file__).resolve().parents[2]


def test_a_signature_is_found_with_what_was_compiled_for_it(tmp_path, monkeypatch):
    """The second process looks into the index before the first has written it, and writes while the first does."""
    one, two = (_njit.Files(str(tmp_path), "loop", "stamp of the source") for _ in range(2))
    monkeypatch.setattr(two, "_load_index", dict)
    write = one._save_data

    def write_after_two(name, data):
        two.save(("int64", 8), "eight")
        write(name, data)

    monkeypatch.setattr(one, "_save_data", write_after_two)
    one.save(("int64", 4), "four")
    later = _njit.Files(str(tmp_path), "loop", "stamp of the source")
    assert later.load(("int64", 4)) == "four" and later.load(("int64", 8)) in ("eight", None)
    later.save(("int64", 8), "eight again")
    assert later.load(("int64", 4)) == "four" and later.load(("int64", 8)) == "eight again"
    assert _njit.Files(str(tmp_path), "loop", "another stamp").load(("int64", 4)) is None


@pytest.mark.parametrize("package", ["kernels", "sharding", "trainer"])
def test_every_loop_that_is_kept_is_kept_so(package):
    kept = [file for file in (ROOT / package).rglob("*.py") if "cache=True" in file.read_text()]
    assert kept == ([ROOT / "kernels/_njit.py"] if package == "kernels" else [])


COMPILE = """
from numba import types
from kernels.backends._loops import mix

entry = mix.compile((types.uint64,))
print(sum(mix.stats.cache_hits.values()), type(mix._cache._cache_file).__module__, entry(1))
"""


def test_the_next_process_reads_what_was_compiled(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said[0].split()[:2] == ["0", "kernels._njit"] and said[1] == said[0].replace("0", "1", 1)
    assert len(list(tmp_path.rglob("*.nbc"))) == 1
