"""`python -m trainer` whose steps take half a second, from the eleventh on, where SLOW is set: who waits for the first
figures and then acts finds it training."""

import os
import sys
import time

from trainer import pulse

_mark = pulse.mark


def mark(phase: str, step: int) -> None:
    _mark(phase, step)
    if phase == "data" and step > 10 and "SLOW" in os.environ:
        time.sleep(0.5)


pulse.mark = mark

from trainer.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
