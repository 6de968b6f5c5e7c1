"""Faults on order: `tablemesh chaos` has a rank die or hang at a chosen point, and this is the one place that does it.

JOB.json of such a run has "faults": a list of {"step", "phase", "rank", "signal", "delay_ms"}; fault number k is for
attempt k of the job, so that every restart meets the next one. It strikes once, at the rank's first mark
(trainer/pulse.py) of that phase at or after that step, delay_ms later: in the middle of whatever the rank then does.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

HANG = "HANG"  # besides the signals: the main thread stops where it is and never goes on


@dataclass(frozen=True, kw_only=True)
class Fault:
    step: int
    phase: str  # of trainer.pulse.PHASES
    rank: int
    signal: str  # KILL, TERM, STOP, ... or HANG
    delay_ms: float = 0.0


class Strike:
    """One fault of this rank. `on_mark` is trainer.pulse's; `note` is the file in which it says that it struck."""

    def __init__(self, fault: Fault, note: Path) -> None:
        self._fault, self._note = fault, note
        self._waiting = True

    def on_mark(self, phase: str, step: int) -> None:
        fault = self._fault
        if not self._waiting or phase != fault.phase or step < fault.step:
            return
        self._waiting = False
        print(f"fault: {fault.signal} in {phase} of step {step}", file=sys.stderr, flush=True)
        self._note.write_text(f"{phase} {step}\n")
        if fault.signal == HANG:
            time.sleep(fault.delay_ms / 1e3)
            while True:
                time.sleep(3600)
        number = signal.Signals[f"SIG{fault.signal}"]
        if fault.delay_ms:
            timer = threading.Timer(fault.delay_ms / 1e3, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        else:
            os.kill(os.getpid(), number)
