"""Choosing a checkpoint to go on from, comparing it with the config, and loading it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import UserError
from trainer.checkpoint.agree import from_first, together
from trainer.checkpoint.chain import Chain, open_chain
from trainer.checkpoint.compare import differences
from trainer.checkpoint.manifest import Damaged, Manifest
from trainer.checkpoint.place import Place, step_of
from trainer.config import Config

AUTO = "auto"


def place_of(run_dir: Path, configured: str | None) -> Place:
    """Where a run's checkpoints are: RUN/checkpoints, or the folder NAME of checkpoint.dir."""
    return Place(run_dir / "checkpoints" if configured is None else f"{str(configured).rstrip('/')}/{run_dir.name}")


def split(path: str) -> tuple[Place, str]:
    """A checkpoint's path or URL -> (place, name)."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if not name.startswith("step_") or not name[5:].isdigit():
        raise UserError(f"{path}: not a checkpoint: its folder is named step_N, such as runs/NAME/checkpoints/step_40")
    return Place(parent or "."), name


@dataclass(frozen=True)
class Chosen:
    """chain: the checkpoint; None to start from the beginning.  passed_over: newer ones, and why not they."""

    chain: Chain | None
    passed_over: tuple[str, ...] = ()


def newest(place: Place) -> Chain:
    """The newest checkpoint with a whole manifest, on this process alone; UserError when there is none."""
    reasons = []
    for name in reversed(place.names()):
        try:
            return open_chain(place, name)
        except Damaged as damage:
            reasons.append(str(damage))
    more = ":\n" + "\n".join(reasons) if reasons else "; train the run first"
    raise UserError(f"{place}: no whole checkpoint{more}")


def resume(where: str, place: Place, load: Callable[[Chain], None], check: Callable[[Manifest], None]) -> Chosen:
    """Load the checkpoint that `where` asks for, all ranks together: "auto" for the newest valid one, or its path.

    load(chain): raises Damaged on some ranks.  check(manifest): raises UserError for one that does not fit.
    With "auto" a damaged checkpoint is passed over for the one before it; where there is none at all the run starts
    from the beginning, and where all are damaged UserError is raised.  A path that is damaged is an error.
    """
    if where != AUTO:
        place, name = split(where)
        chain = from_first(lambda: open_named(place, name, where))
        check(chain.manifest)
        together(lambda: load(chain))
        return Chosen(chain)
    passed: list[str] = []
    from_first(place.recover)
    names = from_first(place.names)
    for name in reversed(names):
        try:
            chain = from_first(lambda name=name: open_chain(place, name))
            check(chain.manifest)
            together(lambda chain=chain: load(chain))
            return Chosen(chain, tuple(passed))
        except Damaged as damage:
            passed.append(f"{name}: {damage}")
    if names:
        raise UserError(
            f"{place}: all {len(names)} checkpoints are damaged:\n"
            + "\n".join(passed)
            + "\nto start again from the beginning, train without --resume"
        )
    return Chosen(None)


def open_named(place: Place, name: str, where: str) -> Chain:
    """The checkpoint that somebody asked for by `where`.  UserError when there is none, Damaged."""
    if not place.sizes(name):
        raise UserError(f"{where}: no such checkpoint; there are {', '.join(place.names()) or 'none'} in {place}")
    return open_chain(place, name)


def set_aside_after(place: Place, step: int) -> list[str]:
    """Take the checkpoints of later steps out of the line: they belong to a history that is left now."""
    later = [name for name in place.names() if step_of(name) > step]
    for name in later:
        place.set_aside(name)
    return later


def check_same(manifest: Manifest, saved: Config, now: Config, fingerprint: str, *, where: str) -> list[str]:
    """UserError with the differences that make the state mean something else; the harmless ones otherwise."""
    fatal, reported = differences(saved, now)
    if manifest.position.data_fingerprint != fingerprint:
        fatal.append(f"the data's fingerprint: {manifest.position.data_fingerprint} -> {fingerprint}")
    if fatal:
        raise UserError(
            f"{where} cannot be continued with this config; it differs in\n"
            + "\n".join(fatal)
            + "\nput these back, or start a new run from its weights with --init-from"
        )
    return reported
