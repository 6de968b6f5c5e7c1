"""The README tells the truth: its tree exists, and its commands are the ones that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(text: str) -> list[str]:
    """The contents of the fenced blocks of a Markdown text."""
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def paths(tree: str) -> list[str]:
    """The paths of an annotated tree; indentation nests, and a line may name several entries.

    >>> paths("trainer/   # what\\n  config.py   # one\\n  models/{dlrm,dcn}.py  # two\\ndocs/  # three")
    ['trainer', 'trainer/config.py', 'trainer/models/dlrm.py', 'trainer/models/dcn.py', 'docs']
    """
    found: list[str] = []
    parents: list[tuple[int, str]] = []  # (indentation, folder)
    for line in tree.splitlines():
        entry = line.split("#")[0].rstrip()
        bare = entry.lstrip(" │├└─")
        if not bare:
            continue
        indent = len(entry) - len(bare)
        while parents and parents[-1][0] >= indent:
            parents.pop()
        names = [name for word in bare.split() for name in _expanded(word)]
        base = parents[-1][1] + "/" if parents else ""
        found += [base + name.rstrip("/") for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            parents.append((indent, found[-1]))
    return found


def _expanded(word: str) -> list[str]:
    """models/{dlrm,dcn}.py -> models/dlrm.py, models/dcn.py"""
    match = re.search(r"\{([^}]*)\}", word)
    if match is None:
        return [word]
    return [word[: match.start()] + part + word[match.end() :] for part in match[1].split(",")]


def tree_of(text: str) -> str:
    """The block of the README that is its annotated tree."""
    found = [block for block in blocks(text) if re.search(r"^trainer/\s+#", block, flags=re.MULTILINE)]
    assert len(found) == 1, "the README has one fenced block with a line like `trainer/          # comment`"
    return found[0]


def commands(text: str) -> list[str]:
    """The `make` commands of the fenced blocks, in order."""
    lines = [line.split("#")[0].strip().removeprefix("$ ") for block in blocks(text) for line in block.splitlines()]
    return [line for line in lines if re.fullmatch(r"make [a-z]+", line)]


def test_the_tree_exists():
    missing = [path for path in paths(tree_of((ROOT / "README.md").read_text())) if not (ROOT / path).exists()]
    assert not missing


def test_the_tree_names_the_four_packages():
    named = paths(tree_of((ROOT / "README.md").read_text()))
    assert {"launch", "trainer", "sharding", "kernels"} <= set(named)


def test_ci_runs_the_commands_of_the_readme():
    shown = commands((ROOT / "README.md").read_text())
    assert {"make test", "make train"} <= set(shown)
    script = (ROOT / ".ci/run").read_text()
    run = [line.strip() for line in script.splitlines() if line.startswith("make ")]
    assert run == ["make test", "make train"]


def test_the_reader_of_trees():
    tree = (
        "trainer/  # what\n  config.py  # one\n  models/{dlrm,dcn}.py\n  data/\n    batch.py\ndocs/  # three\na.md b.md"
    )
    assert paths(tree) == [
        "trainer",
        "trainer/config.py",
        "trainer/models/dlrm.py",
        "trainer/models/dcn.py",
        "trainer/data",
        "trainer/data/batch.py",
        "docs",
        "a.md",
        "b.md",
    ]
