"""Imports go one way: launch -> trainer -> sharding -> kernels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# package -> the packages of ours that it may import
ALLOWED = {
    "kernels": set(),
    "sharding": {"kernels"},
    "trainer": {"kernels", "sharding"},
    "launch": {"kernels", "sharding", "trainer", "benchmarks"},  # `tablemesh bench` runs them
    "benchmarks": {"kernels", "sharding", "trainer"},
}
LOADERS = ("import_module", "__import__", "find_spec", "load", "names")  # the last two: kernels.registry
KERNELS_MAY_IMPORT = {"torch", *sys.stdlib_module_names}  # at module level


def imported(source: str, package: str, *, top_level: bool = False) -> set[str]:
    """Top-level names that a module of `package` imports: everywhere in it, or only when it is itself imported.

    >>> sorted(imported("import torch.nn\\ndef f():\\n    from trainer.config import load", "sharding"))
    ['torch', 'trainer']
    """
    tree = ast.parse(source)
    nodes = _outside_functions(tree) if top_level else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and _called(node) in LOADERS:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.add(first.value.split(".")[0])
    return names


def _outside_functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _outside_functions(child)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_no_step_back_up(package):
    files = _files(package)
    assert files
    for file in files:
        wrong = imported(file.read_text(), package) & (set(ALLOWED) - ALLOWED[package] - {package})
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_kernels_need_torch_alone():
    """Numba and Triton want their functions at module level: those are in modules with an underscore, which a backend
    imports when it is chosen and no module imports at module level."""
    hidden = [file for file in _files("kernels") if file.name.startswith("_") and file.stem != "__init__"]
    for file in sorted(set(_files("kernels")) - set(hidden)):
        for other in hidden:
            lines = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
            assert not any(other.stem in line for line in lines), f"{file.name} imports {other.name} at module level"
        wrong = imported(file.read_text(), "kernels", top_level=True) - KERNELS_MAY_IMPORT - {"kernels"}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong} at module level"


def test_the_reader_of_imports_sees_the_hidden_ones():
    source = (
        "import a.b\nfrom c import d\nfrom . import e\n"
        "def f():\n    import g\n    importlib.import_module('h.i')\n    registry.load('k.l', name)\n"
        "class C:\n    import j\n"
    )
    assert imported(source, "own") == {"a", "c", "own", "g", "h", "j", "k"}
    assert imported(source, "own", top_level=True) == {"a", "c", "own", "j"}


def test_the_packages_that_are_imported_are_ours():
    code = "import kernels, trainer, sharding, launch\nfor m in (kernels, trainer, sharding, launch): print(m.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = [Path(line).resolve().parent for line in out.splitlines()]
    assert folders == [ROOT / name for name in ("kernels", "trainer", "sharding", "launch")]


def test_the_command_answers_without_torch():
    code = (
        "import sys\nfrom launch import cli\ntry:\n    cli.app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'pandas', 'pyarrow', 'numpy', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
