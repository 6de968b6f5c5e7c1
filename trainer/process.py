"""The environment that a training process has to be started with: what is read before Python runs.

OMP_WAIT_POLICY=PASSIVE: torch's OpenMP threads sleep between two operators instead of spinning, which would hold the
cores that the reader's threads, the network's and the other ranks' need.
GOMP_SPINCOUNT: but GNU's spin for some ten microseconds first, which is as long as most gaps between operators are.
MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_: freed memory stays with the process.  By default glibc gives every block
above 32 MiB back to the system, and a step then takes a page fault for each 4 KiB of its largest tensors again.

Only the standard library is imported here.
"""

import os
from collections.abc import Mapping

KEPT_BYTES = 1 << 30

DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
}


def environment(*, threads: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for a rank whose torch has `threads` threads; what the user has set stays as it is."""
    found = {name: given.get(name, value) for name, value in DEFAULTS.items()}
    if "OMP_WAIT_POLICY" in given and "GOMP_SPINCOUNT" not in given:
        del found["GOMP_SPINCOUNT"]  # it would overrule the policy
    return found | {"OMP_NUM_THREADS": str(threads)}
