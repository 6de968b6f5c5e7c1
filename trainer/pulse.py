"""Where every rank is: the board that the ranks of one host share, and the judgement of who keeps the others waiting.

    with Board.create(path, ranks) as board          the agent's, one row a rank, in a small file mapped by all
    start(board_file, index, ...)                    this process writes its row from now on
    mark("forward", step)                            the main thread goes on to this phase; about a microsecond
    touch("save")                                    it is still in it and gets on: a long save after each piece
    judge(seen) -> Verdict | None                    which ranks have died or hang

All ranks make the same marks in the same order, since their work is the same; so whoever has made fewer marks than the
others is the one they wait for. A mark's limit follows progress, not the clock alone: FIRST_TIMES of a phase (kernels
compile, files are opened) may take `first_seconds`, later ones `hang_seconds` or SLACK times the longest so far.
Times are CLOCK_MONOTONIC, which is one clock for all processes of a host and does not jump when the date is set.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# In the order of a run. data .. logging belong to the step they name; eval, save and finishing come after it.
PHASES = ("starting", "building", "data", "forward", "backward", "optimizer", "logging", "eval", "save", "finishing")
DONE = len(PHASES)  # as a phase: this rank needs nobody any more
_IN_STEP = ("data", "forward", "backward", "optimizer", "logging")

BOARD_FILE = "TABLEMESH_BOARD"  # environment: the board's file, in which LOCAL_RANK is the row
FIRST_TIMES = 3
SLACK = 3
SILENT_SECONDS = 5.0  # a process whose watching thread has not run for this long is frozen, or was stopped

_COLUMNS = ("pid", "marks", "step", "phase", "since_ns", "alive_ns", "limit_ns", "ended", "waits")
_PID, _MARKS, _STEP, _PHASE, _SINCE, _ALIVE, _LIMIT, _ENDED, _WAITS = range(len(_COLUMNS))
_WIDTH = 16  # int64 a row: two cache lines, so that no two ranks write to the same one
_FOREVER = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of one rank now."""

    rank: int
    marks: int  # made so far; 0 before the first
    step: int
    phase: str  # of PHASES, or "done"
    age: float  # seconds since its last mark or touch
    silent: float  # seconds since its watching thread last ran
    limit: float  # seconds this mark may take; infinite when hangs are not looked for
    ended: int = 0  # exit code, or minus the signal, where the agent saw it end badly
    waits: bool = False  # its main thread stands in a collective
    far: bool = False  # on another host, heard of over the network

    @property
    def where(self) -> str:
        if self.phase in _IN_STEP:
            return f"in {self.phase} of step {self.step} ({self.step - 1} completed)"
        return f"in {self.phase}" + (f" after step {self.step}" if self.step else "")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    kind: str  # "ended": these ranks died; "hang": these ranks make no progress
    ranks: tuple[Seen, ...]

    def message(self, name_of_end: Callable[[int], str] = str) -> str:
        """One sentence for people; name_of_end turns an exit code into words."""
        said = []
        for r in self.ranks:
            if self.kind == "ended":
                said.append(f"rank {r.rank} ended ({name_of_end(r.ended)}) {r.where}")
            elif r.silent > SILENT_SECONDS:
                frozen = "is frozen, or the network to its host is down" if r.far else "is frozen"
                said.append(f"rank {r.rank} {frozen}: nothing heard of it for {r.silent:.0f} s, {r.where}")
            else:
                said.append(f"rank {r.rank} hangs: no progress for {r.age:.0f} s, {r.where}")
        return "; ".join(said)


def judge(seen: Iterable[Seen]) -> Verdict | None:
    """Who is to blame when work cannot go on; None while it can.

    Ranks that have ended badly come first. Otherwise nothing is wrong until the rank with the fewest marks is over its
    limit: the others may be over theirs, they wait. Then the blame falls on processes that are frozen; without any, on
    late ones that compute; if all late ones stand in a collective, on whoever does not; if all do, on the late ones.

    Where a host that is heard of no more really is, nobody knows: its last row, old by the time, holds nobody back.
    """
    working = [r for r in seen if r.phase != "done" and r.marks]
    ended = tuple(r for r in working if r.ended)
    if ended:
        return Verdict(kind="ended", ranks=ended)
    late = _late(working) or _late([r for r in working if not (r.far and r.silent > SILENT_SECONDS)])
    if not late:
        return None
    named = (
        [r for r in working if r.silent > SILENT_SECONDS]
        or [r for r in late if not r.waits]
        or [r for r in working if not r.waits]
        or late
    )
    return Verdict(kind="hang", ranks=tuple(named))


def _late(working: list[Seen]) -> list[Seen]:
    """Of the ranks that all others wait for those that are over their limits."""
    fewest = min((r.marks for r in working), default=0)
    return [r for r in working if r.marks == fewest and r.age > r.limit]


class Board:
    """Rows of int64 in a mapped file; every row is written by one rank alone, `ended` by the agent."""

    def __init__(self, memory: mmap.mmap, ranks: int) -> None:
        self._memory = memory
        self.cells = memoryview(memory).cast("q")
        self.ranks = ranks

    @classmethod
    def create(cls, path: Path, ranks: int) -> "Board":
        """A new file of zeros: written and not left sparse, as a full disk would else kill whoever touches it."""
        path.unlink(missing_ok=True)  # ranks of an earlier attempt may still map the old one
        path.write_bytes(bytes(8 * _WIDTH * ranks))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "Board":
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        return cls(memory, len(memory) // (8 * _WIDTH))

    @classmethod
    def private(cls) -> "Board":
        """Of one rank that no agent watches."""
        return cls(mmap.mmap(-1, 8 * _WIDTH), 1)

    def pid(self, index: int) -> int:
        return self.cells[index * _WIDTH + _PID]

    def set_ended(self, index: int, exit_code: int) -> None:
        self.cells[index * _WIDTH + _ENDED] = exit_code

    def seen(self, first_rank: int = 0) -> list[Seen]:
        """All rows as they are now, for the ranks first_rank, first_rank + 1, ..."""
        now = time.monotonic_ns()
        return [self._seen(index, first_rank + index, now) for index in range(self.ranks)]

    def _seen(self, index: int, rank: int, now: int) -> Seen:
        row = self.cells[index * _WIDTH : index * _WIDTH + len(_COLUMNS)].tolist()
        return Seen(
            rank=rank,
            marks=row[_MARKS],
            step=row[_STEP],
            phase="done" if row[_PHASE] == DONE else PHASES[row[_PHASE]],
            age=(now - row[_SINCE]) / 1e9,
            silent=(now - row[_ALIVE]) / 1e9,
            limit=row[_LIMIT] / 1e9 if row[_LIMIT] < _FOREVER else float("inf"),
            ended=row[_ENDED],
            waits=bool(row[_WAITS]),
        )


class Pulse:
    """Writes one row of a board. `mark` and `done` are for the main thread, the rest for any."""

    def __init__(self, board: Board, index: int, *, hang_seconds: float, first_seconds: float) -> None:
        self.board, self.index = board, index
        self._cells, self._at = board.cells, index * _WIDTH
        self._began, self._phase = time.monotonic_ns(), 0
        self._longest, self._times = [0] * (DONE + 1), [0] * (DONE + 1)  # by phase; ns
        self.set_limits(hang_seconds=hang_seconds, first_seconds=first_seconds)
        self.on_mark: Callable[[str, int], None] | None = None
        self._cells[self._at + _PID] = os.getpid()
        self.alive()
        self._write(0, 0)

    def set_limits(self, *, hang_seconds: float, first_seconds: float) -> None:
        """hang_seconds: 0 for no look at hangs at all."""
        self._hang_ns = int(hang_seconds * 1e9)
        self._first_ns = int(max(first_seconds, hang_seconds) * 1e9)

    def mark(self, phase: str, step: int) -> None:
        self._write(PHASES.index(phase), step)
        if self.on_mark is not None:
            self.on_mark(phase, step)

    def done(self) -> None:
        self._write(DONE, self._cells[self._at + _STEP])

    def touch(self, phase: str) -> None:
        if self._phase == PHASES.index(phase):
            self._cells[self._at + _SINCE] = time.monotonic_ns()

    def alive(self, *, waits: bool = False) -> None:
        self._cells[self._at + _WAITS] = waits
        self._cells[self._at + _ALIVE] = time.monotonic_ns()

    def _write(self, phase: int, step: int) -> None:
        now, old = time.monotonic_ns(), self._phase
        if self._times[old]:  # the very first one says nothing about the next
            self._longest[old] = max(self._longest[old], now - self._began)
        self._times[old] += 1
        if not self._hang_ns:
            limit = _FOREVER
        elif self._times[phase] < FIRST_TIMES:
            limit = self._first_ns
        else:
            limit = max(self._hang_ns, SLACK * self._longest[phase])
        self._began, self._phase = now, phase
        cells, at = self._cells, self._at
        cells[at + _STEP], cells[at + _PHASE] = step, phase
        cells[at + _LIMIT], cells[at + _SINCE] = limit, now
        cells[at + _MARKS] += 1


_pulse: Pulse | None = None


def start(*, hang_seconds: float, first_seconds: float) -> Pulse:
    """Have this process write its row: of the board that the agent's environment names, or of a private one."""
    global _pulse
    path = os.environ.get(BOARD_FILE)
    board = Board.open(Path(path)) if path else Board.private()
    index = int(os.environ.get("LOCAL_RANK", "0")) if path else 0
    _pulse = Pulse(board, index, hang_seconds=hang_seconds, first_seconds=first_seconds)
    return _pulse


def mark(phase: str, step: int) -> None:
    """The main thread begins this phase (of PHASES) of this step. Without `start` it does nothing."""
    if _pulse is not None:
        _pulse.mark(phase, step)


def touch(phase: str) -> None:
    """Work of this phase gets on, though it takes minutes; nothing while the main thread is in another. Any thread."""
    if _pulse is not None:
        _pulse.touch(phase)
