"""Stands in for a rank that marks its steps, until one does what PULSE names; no torch, so it starts at once."""

import os
import signal
import sys
import time
from pathlib import Path

from trainer import __main__ as trainer
from trainer import pulse, restarts


def main() -> int:
    run_dir, rank, mode = Path(sys.argv[1]).parent, int(os.environ["RANK"]), os.environ["PULSE"]
    signal.signal(signal.SIGINT, trainer._peer_failed)
    watch = trainer._watch({}, run_dir, rank)
    last = int(os.environ["WORLD_SIZE"]) - 1
    if mode == "once" and restarts.attempt():
        return 0
    try:
        for step in range(1, 5):
            for phase in ("data", "forward", "backward", "optimizer"):
                pulse.mark(phase, step)
        # The last rank comes last to where it stays, and alone has a limit: the others may have started long before.
        while rank == last and any(r.rank != last and (r.step, r.phase) != (5, "forward") for r in watch.seen()):
            time.sleep(0.01)
        if rank == last and mode in ("hang", "stop"):
            watch.pulse.set_limits(hang_seconds=1, first_seconds=1)
        pulse.mark("data", 5)
        if rank != last:
            pulse.mark("forward", 5)
        elif mode != "hang":
            os.kill(os.getpid(), signal.SIGSTOP if mode == "stop" else signal.SIGKILL)
        while True:
            time.sleep(0.05)
    except trainer.PeerFailed:
        return trainer._leave_for_peer(watch, run_dir, rank, "another rank failed")


if __name__ == "__main__":
    sys.exit(main())
