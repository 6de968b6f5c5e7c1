"""Handles of submitted jobs, `KIND://tablemesh/ID`, as TorchX writes them, and which run folder belongs to which.

A run folder keeps its job's handle in submitted.json. The other way round there is one file of the user's, a line
a submission: $XDG_STATE_HOME/tablemesh/jobs.jsonl. Without it everything works but finding the run folder by handle.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import UserError

_SHAPE = re.compile(r"(?P<kind>[A-Za-z_][\w.]*)://(?P<session>[^/]*)/(?P<id>.+)")


@dataclass(frozen=True)
class Submitted:
    kind: str  # of launch/schedulers/
    id: str  # the scheduler's
    run_dir: Path | None  # where this machine can see it

    @property
    def handle(self) -> str:
        return make(self.kind, self.id)


def make(kind: str, id: str) -> str:
    return f"{kind}://tablemesh/{id}"


def record(kind: str, id: str, run_dir: Path) -> str:
    """Note a submission in its run folder, where it is here, and in the user's list; returns the handle."""
    handle = make(kind, id)
    line = {"handle": handle, "run_dir": str(run_dir), "time": time.time()}
    if run_dir.is_dir():
        (run_dir / "submitted.json").write_text(json.dumps(line, indent=1) + "\n")
    path = _list()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    return handle


def find(text: str) -> Submitted:
    """The job that a handle, or a run folder, names. UserError when it is neither."""
    folder = Path(text)
    if "://" not in text:
        try:
            line = json.loads((folder / "submitted.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"{text!r} is neither a handle such as slurm://tablemesh/123 nor the folder of a submitted run; "
                f"`tablemesh submit` prints the handle, and {_list()} lists all"
            ) from None
        kind, id = _parse(line["handle"])
        return Submitted(kind, id, folder.resolve())
    kind, id = _parse(text)
    known = Path(id) if kind == "local" else _run_dir(text)
    return Submitted(kind, id, known if known and known.is_dir() else None)


def _parse(handle: str) -> tuple[str, str]:
    match = _SHAPE.fullmatch(handle)
    if match is None:
        raise UserError(f"{handle!r} is not a handle; it looks like slurm://tablemesh/123")
    return match["kind"], match["id"]


def _run_dir(handle: str) -> Path | None:
    """The newest run folder of this handle: a cluster that is set up anew counts from 1 again."""
    try:
        lines = [json.loads(line) for line in _list().read_text().splitlines()]
    except FileNotFoundError:
        return None
    return next((Path(line["run_dir"]) for line in reversed(lines) if line["handle"] == handle), None)


def _list() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state, "tablemesh", "jobs.jsonl")
