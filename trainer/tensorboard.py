"""A run's events as TensorBoard scalars, when the config says `run.tensorboard = true`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.errors import UserError

_NOT_SCALARS = ("event", "time", "step", "epoch", "samples", "split", "final", "path", "rows")


class Mirror:
    """Writes the events of metrics.jsonl that belong to a step: `train/loss`, `eval_valid/auc`, ..."""

    def __init__(self, log_dir: str | Path) -> None:
        """UserError when the tensorboard package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"run.tensorboard = true needs the tensorboard package ({error}); "
                "install it (pip install tensorboard) or set run.tensorboard = false"
            ) from error
        self._writer = SummaryWriter(str(log_dir))

    def event(self, event: Mapping[str, Any]) -> None:
        """Mirror one event; those without a step, and values that are not numbers, are passed over."""
        step, kind = event.get("step"), event.get("event")
        if step is None or kind not in ("train", "eval"):
            return
        tag = kind if kind == "train" else f"eval_{event.get('split', 'valid')}"
        for name, value in event.items():
            if name in _NOT_SCALARS or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            self._writer.add_scalar(f"{tag}/{name}", value, global_step=step, walltime=event.get("time"))

    def close(self) -> None:
        self._writer.close()
