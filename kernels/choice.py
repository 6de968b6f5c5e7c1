"""Which backend serves a spec: the one asked for, or the fastest that can."""

from dataclasses import dataclass
from types import ModuleType

import torch

from kernels import registry
from kernels.errors import UserError
from kernels.ops import Spec

BACKENDS = "kernels.backends"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """name: a kind in kernels/backends/; why: for people and for the run report."""

    name: str
    why: str
    module: ModuleType


def choose(spec: Spec, device: torch.device, name: str = "auto") -> Choice:
    """The backend for a spec on a device.

    "auto" takes the one of the highest SPEED for this kind of device among those that support the spec.
    Raises UserError with the backend's reason when the one asked for does not.
    """
    if name != "auto":
        module = registry.load(BACKENDS, name)
        reason = module.supports(spec, device)
        if reason is not None:
            raise UserError(f'kernels backend "{name}" cannot serve this: {reason}; "auto" takes one that can')
        return Choice(name=name, why="asked for", module=module)
    found = {kind: registry.load(BACKENDS, kind) for kind in registry.names(BACKENDS)}
    refused = []
    for kind in sorted(found, key=lambda k: -found[k].SPEED.get(device.type, 0)):
        reason = found[kind].supports(spec, device)
        if reason is None:
            why = f"the fastest on {device.type} that supports the case"
            return Choice(name=kind, why="; ".join([why, *refused]), module=found[kind])
        if device.type in found[kind].SPEED:
            refused.append(f"not {kind}: {reason}")
    raise AssertionError("the reference supports every spec")
