"""`python -m trainer` whose rank 1 enters a small memory cgroup in step 6, once, and grows until it is killed."""

import os
import sys
from pathlib import Path

from trainer import pulse, restarts

_mark = pulse.mark


def mark(phase: str, step: int) -> None:
    _mark(phase, step)
    if (phase, step, os.environ["RANK"], restarts.attempt()) == ("forward", 6, "1", 0):
        Path(os.environ["MEMORY_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
        eaten = []
        while True:
            eaten.append(b"x" * (8 << 20))


pulse.mark = mark

from trainer.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
