"""Make a config's data set where there is none and the config says how: `train`, `submit` and a job's node 0 do it."""

from pathlib import Path
from typing import Any

from rich.console import Console

from kernels.errors import UserError


def prepare(console: Console, source: str, dest: Path, *, spec: Path | None, options: dict[str, Any]) -> Any:
    """trainer.prepare with its progress on the console; returns the Dataset."""
    from launch import progress
    from trainer import prepare as preparing

    display = progress.make(console)
    try:
        return preparing.prepare(source, dest, spec=spec, options=options, progress=display.work)
    finally:
        display.close()


def prepare_missing(console: Console, resolved: Any) -> None:
    """Prepare data.path as data.prepare says, unless it is there. UserError where nothing says how."""
    data = resolved.data
    if data.features is not None or (data.path / "dataset.json").exists():
        return
    if data.prepare is None:
        raise UserError(
            f"data.path = {str(data.path)!r}: no dataset there; `tablemesh prepare SOURCE {data.path}` makes one, "
            "or data.prepare in the config says what to make it from"
        )
    console.print(f"preparing {data.prepare} into {data.path}", highlight=False)
    prepare(console, data.prepare, data.path, spec=None, options=dict(data.prepare_options))
