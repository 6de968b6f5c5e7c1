"""`python -m trainer` under a wall clock that is set to another day at every look."""

import itertools
import sys
import time

_days, _now = itertools.cycle([400, -300, 0, 900, -1]), time.time
time.time = lambda: _now() + 86400 * next(_days)

from trainer.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
