"""`python -m launch.rank MODULE JOB.json`: become `python -m MODULE JOB.json`, tied to the agent's life.

The agent starts ranks in sessions of their own, so nothing would stop them if it were killed outright. The kernel's
parent-death signal does, and it survives exec; it has to be asked for by the rank itself. So is the affinity to the
CPUs near the rank's GPU (launch/gpu.py), which exec keeps too.
"""

import ctypes
import os
import signal
import sys

from launch import gpu

AGENT = "TABLEMESH_AGENT"  # environment of the ranks: their agent's process number
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Have the kernel send this process `number` when the thread that started it ends. Only Linux has it.

    parent: who started it; as it is now by default, which misses an end before this call.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), number)


def settle() -> None:
    """Keep to the CPUs near this rank's GPU, or to one NUMA node, where the machine has several.

    TABLEMESH_AFFINITY=none leaves it to the kernel, or to whoever bound the job's processes before.
    """
    if os.environ.get("TABLEMESH_AFFINITY") == "none":
        return
    if not gpu.several_numa_nodes():
        return
    found = gpu.numa(os.sched_getaffinity(0), gpu.bus_ids())
    cpus = gpu.near(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), found)
    if cpus:
        os.sched_setaffinity(0, cpus)


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL, int(os.environ.get(AGENT, 0)))
    settle()
    module, job = sys.argv[1:]
    os.execv(sys.executable, [sys.executable, "-m", module, job])
