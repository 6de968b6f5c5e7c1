"""The kinds of scheduler, one module each."""

from typing import Any

from kernels import registry


def named(kind: str) -> Any:
    """The scheduler of a kind; UserError for an unknown one."""
    return registry.load("launch.schedulers", kind).Scheduler()
