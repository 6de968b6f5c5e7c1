"""Plugins by name: the file name in a plugin folder is the name written in the config.

`load("trainer.models", "dlrm")` imports `trainer/models/dlrm.py`; a dotted name loads a user's own module. Nothing is
imported until chosen, and no list has to be edited to add a kind.
"""

import importlib
import importlib.util
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from kernels.errors import UserError


def names(package: str) -> list[str]:
    """Every kind found in a plugin package: its modules but `base` and those with a leading underscore, sorted."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base" and not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """The module of one kind.

    package: dotted name of the plugin folder, such as "trainer.models".
    name: a file name in it without ".py", or a dotted path to a module of the user's own.
    Raises UserError with the nearest names when there is no such kind.
    """
    if "." in name:
        if _findable(name):
            return importlib.import_module(name)
        raise UserError(f"{name!r}: no module of this name can be imported; check PYTHONPATH and the spelling")
    known = names(package)
    if name not in known:
        folder = package.replace(".", "/")
        raise UserError(f"{name!r} is not a kind found in {folder}/; {nearest(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def nearest(name: str, known: list[str]) -> str:
    """'did you mean ...?' when something in `known` is close to `name`, else the list of what there is."""
    close = get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "there are: " + ", ".join(known)


def _findable(name: str) -> bool:
    """True when `name` can be found; False when it or a parent package is missing (other import errors go up)."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
