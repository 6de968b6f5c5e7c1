"""`metrics.jsonl`: the run's events, one JSON object a line, written by rank 0 as they happen.

Every event has "event" and "time" (unix seconds); the kinds and their keys:
    start       run, world_size, device, steps_total, steps_per_epoch, epochs, batch_size, train_rows, tables,
                table_bytes, bayes
    phase       name: what the ranks are doing now (building, training, evaluating, saving)
    train       epoch, step, samples, loss, ne, auc, calibration, lr_factor, samples_per_second, step_ms_p50,
                data_wait_ms, memory_bytes: over the steps since the last such line; id_maps: of collisionless
                tables, since the run began (sharding/by_id.py's figures)
    eval        step, split, auc, auc_error_bound, ne, logloss, calibration, rows, seconds, final
    checkpoint  step, path, bytes, seconds (to write it), pause_seconds (the steps stood still), background, delta
    resume      step, path, passed_over: the run goes on after this step; what was logged of later ones is void
    restart     number, of, rank, kind, message: the ranks failed and are started again (written by their agent)
    stopped     the job was stopped and is to be queued again (written by its first node)
    message     level (info, warning), text
    end         status (finished, failed, interrupted), seconds
"""

import json
import math
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends events; on ranks other than the first it writes nothing."""

    def __init__(self, run_dir: Path, *, enabled: bool, tensorboard: bool = False) -> None:
        self._file = open(run_dir / "metrics.jsonl", "a", buffering=1) if enabled else None
        self._mirror = None
        if enabled and tensorboard:
            from trainer.tensorboard import Mirror

            self._mirror = Mirror(run_dir / "tensorboard")

    def event(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        line = {"event": kind, "time": time.time(), **values}
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        if self._mirror is not None:
            self._mirror.event(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl in order, none where there is no file; a line cut off by a crash is passed over."""
    found = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found
