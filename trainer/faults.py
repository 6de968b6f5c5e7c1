"""Faults on order: `tablemesh chaos` has a rank die or hang at a chosen point, and this is the one place that does it.

JOB.json of such a run has "faults": a list of {"step", "phase", "rank", "signal", "delay_ms"}; fault number k is for
attempt k of the job, so that every restart meets the next one. It strikes once, at the rank's first mark
(trainer/pulse.py) of that phase at or after that step, delay_ms later: in the middle of whatever the rank then does.
A rank that ends sooner is not struck, so that NOTE says what was delivered, and NOTE.due what was to come.
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


def due_of(note: Path) -> Path:
    return note.with_name(f"{note.name}.due")


class Strike:
    """One fault of this rank. `on_mark` is trainer.pulse's; `note` is a file of "PHASE STEP", named so when it strikes
    and note.due until then."""

    def __init__(self, fault: Fault, note: Path) -> None:
        self._fault, self._note, self._due = fault, note, due_of(note)
        self._waiting = True

    def on_mark(self, phase: str, step: int) -> None:
        fault = self._fault
        if not self._waiting or phase != fault.phase or step < fault.step:
            return
        self._waiting = False
        self._due.write_text(f"{phase} {step}\n")
        if fault.signal == HANG:
            time.sleep(fault.delay_ms / 1e3)
            self._strike(f"{phase} of step {step}")
            while True:
                time.sleep(3600)
        if fault.delay_ms:
            timer = threading.Timer(fault.delay_ms / 1e3, self._strike, (f"{phase} of step {step}",))
            timer.daemon = True
            timer.start()
        else:
            self._strike(f"{phase} of step {step}")

    def _strike(self, where: str) -> None:
        signal_ = self._fault.signal
        print(f"fault: {signal_} in {where}", file=sys.stderr, flush=True)
        self._due.rename(self._note)
        if signal_ != HANG:
            os.kill(os.getpid(), signal.Signals[f"SIG{signal_}"])
