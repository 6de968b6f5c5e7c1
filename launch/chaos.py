"""`tablemesh chaos`: train a config undisturbed, train it again while ranks die, and compare what comes out.

The disturbed run is real: ranks under the real agent, signals to real processes (trainer/faults.py), restarts by the
agent's own budget, or, where the number of ranks changes or the signal is one that asks for a checkpoint, by a second
`--resume auto`. Compared are every tensor of the final checkpoints, bit for bit, and the rows of every step of the
history that the final weights come from (trainer/rowlog.py): each row once in an epoch, the same as undisturbed.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from launch import follow, job, rundir
from launch.failure import Failure
from launch.progress import Display
from launch.schedulers.base import Scheduler
from trainer import rowlog
from trainer.config import Config
from trainer.data.parquet import open_dataset
from trainer.faults import HANG, Fault, due_of

DURING = {"data": ("data",), "step": ("forward", "backward", "optimizer"), "eval": ("eval",), "save": ("save",)}
SAVING = ("TERM", "USR1")  # signals after which the run saves itself and ends with exit code 75
HANGING = ("STOP", HANG)  # after which the watching threads have to notice
SIGNALS = ("KILL", "SEGV", "ABRT", *SAVING, *HANGING)
# Of numbers that more or fewer ranks add up in another order; relative to the largest number of the tensor.
WORLD_TOLERANCE = 1e-3
IDLE_RUNS = 5  # of a soak, one after the other, in which no rank was struck: the run is too short
_ORDER = ("data", "forward", "backward", "optimizer", "eval", "save")  # within a step
_HANG = {"hang_seconds": 10, "timeout_seconds": 60}  # of runs whose ranks are made to hang


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """Ranks before and after the disturbance."""

    before: int
    after: int

    @classmethod
    def parse(cls, text: str | None, default: int) -> "Worlds":
        """ "2->1", "2" or None."""
        if text is None:
            return cls(before=default, after=default)
        match = re.fullmatch(r"\s*(\d+)\s*(?:->\s*(\d+)\s*)?", text)
        if match is None or 0 in (sizes := [int(n) for n in match.groups() if n]):
            raise UserError(f"--world {text!r}: write 2->1 for 2 ranks that go on as 1, or 2 for 2 that stay 2")
        return cls(before=sizes[0], after=sizes[-1])

    @property
    def change(self) -> bool:
        return self.before != self.after


@dataclass(kw_only=True)
class Outcome:
    """What one disturbed run came to."""

    kills: list[dict[str, Any]]  # the faults, with "struck" and "due": "PHASE STEP" or null
    run_dir: Path
    restarts: int = 0
    rows: int = 0  # counted, over all steps
    identical: bool = False
    largest_difference: float = 0.0  # relative to the tensor's largest number
    difference: str | None = None  # the first one that is too much
    details: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.difference is None

    @property
    def struck(self) -> int:
        return sum(kill["struck"] is not None for kill in self.kills)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"run_dir": str(self.run_dir), "ok": self.ok}


def check_options(
    config: Config,
    worlds: Worlds,
    *,
    signal: str,
    during: str | None = None,
    kill_at: int | None = None,
    rank: int | None = None,
    kills: int | None = None,
    each: int | None = None,
) -> None:
    """UserError for what can be known to be wrong before anything is trained."""
    if signal not in SIGNALS:
        raise UserError(f"--signal {signal}: it can be {', '.join(SIGNALS)}")
    if during is not None and during not in DURING:
        raise UserError(f"--during {during}: it can be {', '.join(DURING)}")
    if rank is not None and not 0 <= rank < worlds.before:
        raise UserError(f"--rank {rank}: there are the ranks 0 to {worlds.before - 1}")
    for size in (worlds.before, worlds.after):
        config.check_world_size(size)
    if kills is None:
        if each is not None:
            raise UserError(f"--each {each}: is for --soak N, which strikes more than once")
        return
    drawn = {"--kill-at": kill_at, "--during": during, "--rank": rank}
    if given := [option for option, value in drawn.items() if value is not None]:
        raise UserError(f"--soak draws the points by --seed; leave {' and '.join(given)} out")
    if each is not None and each > 1 and goes_on_by_hand(worlds, signal):
        why = f"--signal {signal}" if signal in SAVING else "another --world"
        raise UserError(
            f"--each {each}: with {why} a run is struck once and goes on by --resume auto; leave --each out"
        )


def goes_on_by_hand(worlds: Worlds, signal: str) -> bool:
    """Whether the struck run goes on by a second `--resume auto`, and not by a restart of its ranks."""
    return worlds.change or signal in SAVING


class Chaos:
    """One config, trained undisturbed once and disturbed as often as asked for."""

    def __init__(self, config: Config, worlds: Worlds, scheduler: Scheduler, display: Display, *, signal: str) -> None:
        check_options(config, worlds, signal=signal)
        self.worlds, self.signal = worlds, signal
        self._scheduler, self._display = scheduler, display
        self.config = _with_checkpoints(config, display)
        if signal in HANGING:
            self.config = self.config.model_copy(update={"run": config.run.model_copy(update=_HANG)})
        self._parent = config.run.dir / "chaos"
        self.undisturbed = self._train_undisturbed()
        self.report = rundir.report(self.undisturbed)
        self._events = _events(self.undisturbed)
        self.steps = self.report["steps"]
        self._expected = rowlog.read(self.undisturbed / "rows")

    def fault(self, *, step: int, during: str, rng: random.Random, rank: int | None = None) -> Fault:
        """A fault at a random moment of the phase, and, where it is not given, of a random rank."""
        if not 1 <= step <= self.steps:
            raise UserError(f"--kill-at {step}: the run has the steps 1 to {self.steps}")
        if during == "eval" and not any(event["event"] == "eval" for event in self._events):
            raise UserError("--during eval: the config evaluates nothing; the data has no valid or test split")
        phase = rng.choice(DURING[during])
        drawn = rng.randrange(self.worlds.before)
        return Fault(
            step=step,
            phase=phase,
            rank=drawn if rank is None else rank,
            signal=self.signal,
            delay_ms=round(rng.uniform(0, self._milliseconds(phase)), 3),
        )

    def disturb(self, faults: list[Fault]) -> Outcome:
        """Train with these faults, one for each attempt, and compare."""
        run_dir = self._start("disturbed")
        outcome = Outcome(kills=[], run_dir=run_dir)
        by_hand = goes_on_by_hand(self.worlds, self.signal)
        failure = self._train(run_dir, self.worlds.before, faults, 0 if by_hand else len(faults), start=0)
        start = 0
        while by_hand and failure is not None and start < len(faults):
            start += 1
            failure = self._train(run_dir, self.worlds.after, faults[start:], 0, start=start)
        for number, fault in enumerate(faults):
            note = run_dir / (f"rows/{number}.fault_0" if by_hand else f"rows/0.fault_{number}")
            outcome.kills.append(asdict(fault) | {"struck": _text(note), "due": _text(due_of(note))})
        restarts = [event for event in _events(run_dir) if event["event"] == "restart"]
        outcome.details = [event["message"] for event in restarts]
        outcome.restarts = start if by_hand else len(restarts)
        if failure is not None:
            outcome.difference = f"the disturbed run did not finish: {failure.message}"
        else:
            self._compare(run_dir, outcome)
        return outcome

    def remove(self, outcome: Outcome) -> None:
        shutil.rmtree(outcome.run_dir)

    def draw(self, count: int, rng: random.Random) -> list[Fault]:
        """Faults at random points, in the order of a run, so that each lies ahead of where the last one leaves it."""
        kinds = [name for name in DURING if name != "eval" or any(event["event"] == "eval" for event in self._events)]
        faults = [self.fault(step=rng.randint(1, self.steps), during=rng.choice(kinds), rng=rng) for _ in range(count)]
        found: list[Fault] = []
        for fault in sorted(faults, key=lambda f: (self._strikes_at(f), _ORDER.index(f.phase))):
            if not found or self._strikes_at(fault) > self._strikes_at(found[-1]):
                found.append(fault)
        return found

    def _strikes_at(self, fault: Fault) -> int:
        """The step at or after which there is such a phase."""
        every = {"eval": self.config.eval.every, "save": self.config.checkpoint.every_steps}.get(fault.phase, 1)
        return min(self.steps, -(-fault.step // every) * every) if every else self.steps

    def _milliseconds(self, phase: str) -> float:
        """How long the phase takes, from its mark on, in the undisturbed run."""
        if phase in ("save", "eval"):
            kind = "checkpoint" if phase == "save" else "eval"
            seconds = [event["seconds"] for event in self._events if event["event"] == kind]
            return 1e3 * max(seconds, default=0.0)
        return self.report["train"]["step_ms"]["p50"] or 0.0

    def _train_undisturbed(self) -> Path:
        run_dir = self._start("undisturbed")
        failure = self._train(run_dir, self.worlds.before, [], 0, start=0)
        if failure is not None:
            raise UserError(f"the undisturbed run failed, so there is nothing to compare with: {failure.message}")
        return run_dir

    def _start(self, kind: str) -> Path:
        run_dir = rundir.create(self._parent, f"{self.config.name}-{kind}")
        (run_dir / "config.toml").write_text(self.config.located().to_toml())
        return run_dir

    def _train(self, run_dir: Path, nproc: int, faults: list[Fault], restarts: int, *, start: int) -> Failure | None:
        values: dict[str, Any] = {"rows": str(run_dir / "rows" / str(start))}
        values["faults"] = [asdict(fault) for fault in faults]
        if start:
            values["resume"] = "auto"
        work = job.make(
            name=run_dir.name,
            action="train",
            run_dir=run_dir,
            nproc=nproc,
            values=values,
            max_restarts=restarts,
            grace=self.config.run.grace_seconds,
        )
        return follow.run(work, self._scheduler, self._display)

    def _compare(self, run_dir: Path, outcome: Outcome) -> None:
        found = rowlog.read(run_dir / "rows")
        outcome.rows = sum(len(rows) for rows in found.values())
        start = next(event for event in self._events if event["event"] == "start")
        outcome.difference = rowlog.first_fault(
            self._expected, found, rows=start["train_rows"], steps_per_epoch=start["steps_per_epoch"]
        )
        samples = rundir.report(run_dir)["samples_seen"]
        if outcome.ok and samples != self.report["samples_seen"]:
            outcome.difference = f"samples seen: {self.report['samples_seen']} undisturbed, {samples} disturbed"
        if outcome.ok:
            from launch.chaos_compare import compare  # with torch, which the command line does without otherwise
            from trainer.checkpoint import restore

            tolerance = WORLD_TOLERANCE if self.worlds.change else 0.0
            where = self.config.checkpoint.dir
            chains = [restore.newest(restore.place_of(folder, where)) for folder in (self.undisturbed, run_dir)]
            same = compare(*chains, tolerance=tolerance)
            outcome.identical, outcome.largest_difference = same.identical, same.largest
            outcome.difference = same.difference


def why_not_struck(outcome: Outcome, step: int, during: str) -> str:
    """Of a run with one fault, which was not delivered."""
    (kill,) = outcome.kills
    if kill["due"] is None:
        return f"--kill-at {step} --during {during}: the run had no {during} at or after this step"
    phase, number = kill["due"].split()
    return (
        f"--kill-at {step} --during {during}: the run ended before the {kill['signal']} that was due "
        f"{kill['delay_ms']:.0f} ms into {phase} of step {number}; choose an earlier step or another --seed"
    )


def soak(
    chaos: Chaos, kills: int, *, seed: int, each: int | None, note: Callable[[Outcome, int], None]
) -> list[Outcome]:
    """Disturbed runs at random points until so many kills have struck, or a run differs.

    each: kills in one run at most; None: 5, or 1 where a run goes on by hand.  note: called after each run with the
    kills so far.  Runs that agree are removed.
    """
    each = each or (1 if goes_on_by_hand(chaos.worlds, chaos.signal) else 5)
    rng, outcomes, struck, idle = random.Random(seed), [], 0, 0
    while struck < kills:
        outcome = chaos.disturb(chaos.draw(min(each, kills - struck), rng))
        outcomes.append(outcome)
        struck += outcome.struck
        idle = 0 if outcome.struck else idle + 1
        note(outcome, struck)
        if not outcome.ok:
            break
        if idle == IDLE_RUNS:
            raise UserError(
                f"--soak: {struck} of {kills} kills so far, and none in the last {idle} runs, which ended before "
                "their moments; train more steps, or save and evaluate more often"
            )
        chaos.remove(outcome)
    return outcomes


def summary(chaos: Chaos, outcomes: list[Outcome]) -> dict[str, Any]:
    """What `chaos --json` prints."""
    return {
        "ok": all(outcome.ok for outcome in outcomes),
        "identical": all(outcome.identical for outcome in outcomes),
        "kills": sum(outcome.struck for outcome in outcomes),
        "restarts": sum(outcome.restarts for outcome in outcomes),
        "first_difference": next((outcome.difference for outcome in outcomes if not outcome.ok), None),
        "largest_difference": max(outcome.largest_difference for outcome in outcomes),
        "tolerance": WORLD_TOLERANCE if chaos.worlds.change else 0.0,
        "world": [chaos.worlds.before, chaos.worlds.after],
        "steps": chaos.steps,
        "rows": sum(len(rows) for rows in chaos._expected.values()),
        "undisturbed": str(chaos.undisturbed),
        "disturbed": [outcome.as_json() for outcome in outcomes],
    }


def show(found: dict[str, Any], console: Any) -> None:
    """The summary for people."""
    for outcome in found["disturbed"]:
        for kill in outcome["kills"] if len(found["disturbed"]) == 1 else ():
            where = "{} of step {}".format(*kill["struck"].split()) if kill["struck"] else "nothing"
            console.print(f"{kill['signal']} to rank {kill['rank']} in {where}", highlight=False)
    kills = f"{found['kills']} {'kill' if found['kills'] == 1 else 'kills'}"
    if not found["ok"]:
        console.print(f"[bold red]differs[/bold red] after {kills}: ", end="")
        console.print(found["first_difference"], markup=False, highlight=False, soft_wrap=True)
        console.print(f"undisturbed: {found['undisturbed']}", markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"disturbed:   {found['disturbed'][-1]['run_dir']}", markup=False, highlight=False, soft_wrap=True
        )
        return
    rows = f"each of the {found['rows']:,} rows of {found['steps']} steps counted once"
    if found["identical"]:
        said = "weights and optimizer state identical to the last bit"
    else:
        said = (
            f"weights and optimizer state within {found['largest_difference']:.1e} of the largest number of each tensor"
        )
    console.print(f"[bold green]ok[/bold green] after {kills}: {said}; {rows}", highlight=False, soft_wrap=True)


def sentence(outcome: Outcome) -> str:
    """One disturbed run in a line."""
    struck = ", ".join(f"{kill['struck']} on rank {kill['rank']}" for kill in outcome.kills if kill["struck"])
    return f"{'identical' if outcome.identical else outcome.difference} ({struck})"


def _with_checkpoints(config: Config, display: Display) -> Config:
    """The config, with checkpoints where it asks for none: else every restart would begin at the beginning."""
    if config.checkpoint.every_steps is not None or config.checkpoint.every_minutes is not None:
        return config
    steps = config.train.max_steps
    if steps is None:
        dataset = open_dataset(config.data.path, config.data.features)
        steps = config.train.epochs * -(-dataset.split("train").rows // config.train.batch_size)
    every = max(1, steps // 8)
    display.line(f"the config asks for no checkpoints: both runs save every {every} steps", "yellow")
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every_steps": every})})


def _events(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # a rank was killed in the middle of it
            continue
    return found


def _text(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None
