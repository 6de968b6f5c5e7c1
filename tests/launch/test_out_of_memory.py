"""The kernel's out-of-memory killer takes a rank of a real training (`make test-memory`; needs root and a cgroup)."""

import json
import os
import subprocess
import sys

import pytest

from tests.launch import memory_group
from tests.launch.test_chaos import CONFIG, ROOT

pytestmark = pytest.mark.cluster
WHERE = "in forward of step 6 (5 completed): memory ran out (the kernel counts an out-of-memory kill)"


def train(folder, *words, **env):
    words = [sys.executable, "-m", "launch.cli", "train", "tiny.toml", *words, "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_rank_that_the_kernel_kills_for_memory_is_named_and_the_run_goes_on(tmp_path):
    if why := memory_group.missing():
        pytest.skip(why)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    hungry = ("--module", "tests.launch.hungry_rank")
    with memory_group.MemoryGroup(64 << 20) as group:
        done = train(tmp_path, *hungry, "--max-restarts", "1", MEMORY_GROUP=str(group.folder))
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        (restart,) = report["restarts"]
        assert restart["message"].startswith(f"rank 1 was killed by SIGKILL {WHERE}")
        assert report["status"] == "finished" and report["resumed"]["step"] == 4 and report["samples_seen"] == 1600
        ended = train(tmp_path, *hungry, MEMORY_GROUP=str(group.folder))
        assert ended.returncode == 1 and f"rank 1 was killed by SIGKILL {WHERE}" in ended.stderr
