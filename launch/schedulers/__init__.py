"""The kinds of scheduler, one module each."""

from typing import Any

from kernels import registry
from kernels.errors import UserError


def named(kind: str) -> Any:
    """The scheduler of a kind; UserError for an unknown one."""
    module = registry.load("launch.schedulers", kind)
    if not hasattr(module, "Scheduler"):
        raise UserError(f"{kind!r}: the module has no class Scheduler; launch/schedulers/base.py says what one does")
    return module.Scheduler()
