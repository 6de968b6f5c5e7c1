"""Which backend serves a spec: the one asked for, or the fastest that can."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kernels import registry
from kernels.errors import UserError

BACKENDS = "kernels.backends"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """name: a kind in the folder; why: for people and for the run report."""

    name: str
    why: str
    module: ModuleType


def choose(spec: Any, device: torch.device, name: str = "auto", *, package: str = BACKENDS) -> Choice:
    """The backend for a spec on a device.

    package: the folder of backends whose `supports` knows this kind of spec.
    "auto" takes the one of the highest SPEED for this kind of device among those that support the spec.
    Raises UserError with the backend's reason when the one asked for does not.
    """
    if name != "auto":
        module = registry.load(package, name)
        reason = module.supports(spec, device)
        if reason is not None:
            raise UserError(f'kernels backend "{name}" cannot serve this: {reason}; "auto" takes one that can')
        return Choice(name=name, why="asked for", module=module)
    found = {kind: registry.load(package, kind) for kind in registry.names(package)}
    refused = []
    for kind in sorted(found, key=lambda k: -found[k].SPEED.get(device.type, 0)):
        reason = found[kind].supports(spec, device)
        if reason is None:
            why = f"the fastest on {device.type} that supports the case"
            return Choice(name=kind, why="; ".join([why, *refused]), module=found[kind])
        if device.type in found[kind].SPEED:
            refused.append(f"not {kind}: {reason}")
    raise AssertionError("the reference supports every spec")
