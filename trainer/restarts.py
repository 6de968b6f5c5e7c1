"""Restarts of a job's ranks: the agent notes each in errors/attempt_K/restart.json, the report lists them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ATTEMPT = "TABLEMESH_ATTEMPT"  # environment of the ranks: 0, or the number of the restart


def attempt() -> int:
    """How often this job's ranks have been restarted; more than 0 means to resume from the newest valid checkpoint."""
    return int(os.environ.get(ATTEMPT, "0"))


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Why attempt `number` was needed. `rank`, `kind` and `message` are the failure's (launch/failure.py)."""

    number: int
    of: int  # the budget
    rank: int | None
    kind: str
    message: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, errors: Path) -> None:
        (errors / f"attempt_{self.number}" / "restart.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The restarts of a run's last job so far, in order."""
    notes = (run_dir / "errors").glob("attempt_*/restart.json")
    return sorted((json.loads(note.read_text()) for note in notes), key=lambda found: found["number"])
