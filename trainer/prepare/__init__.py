"""Source data -> dataset folder.  `prepare` is the only way in; `summary` shows what came out."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from trainer.config import validate
from trainer.data import synthetic
from trainer.data.dataset import Dataset, load
from trainer.prepare import criteo, encoding, files
from trainer.prepare.blocks import find_files
from trainer.prepare.encode import Fitted
from trainer.prepare.encoding import Encoding
from trainer.prepare.spec import CriteoOptions, FileOptions, Options, Spec, load_spec
from trainer.prepare.stats import summary, warnings

__all__ = ["Progress", "prepare", "summary", "warnings"]

# progress(done, total, text): done and total in bytes of the source (rows for synthetic data); text says what is being
# done ("counting", "writing").  `done` starts again at 0 with each pass.  Called from the calling thread.
Progress = Callable[[int, int, str], None]


def prepare(
    source: str,
    dest: str | Path,
    *,
    spec: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare `source` into the dataset folder `dest` and return what its dataset.json says.

    source: "synthetic:criteo", "synthetic:zipf4", "criteo:PATH", or PATH: a file, a folder, a glob, or several of these
        separated by commas (.csv, .tsv, .txt, .parquet; text may be .gz or .bz2).  A tab-separated file of Criteo's 40
        columns needs no spec and no prefix.
    spec: TOML that says what the columns are (docs/data.md); not for synthetic data and Criteo's.
    options: settings by name; text is taken where a number is meant, so they can come from a command line.
        all            seed = 0, threads = cores, existing = "error" | "reuse" | "replace", name, row_group_rows
        synthetic      rows, scale (criteo only)
        files          valid, test = a share such as 0.1, or files (a path, a glob or a list of them);
                       split = "random" | "time", valid_from, test_from,
                       max_rejected = 0.001, the share of malformed lines above which to stop,
                       like = DATASET, prepared earlier: its spec, vocabularies and numbers are used again
        criteo         also ids = "vocab" | "hash", min_count = 1, rows = size of each hashed table
    progress: called as (done, total, text), see `Progress`.

    With `like` no spec is given, and all rows are the test split unless something is said about splits.  A source that
    has no label column makes a dataset to predict for (`labelled` is false), without label columns.

    existing says what happens when `dest` is a finished dataset: "error" raises, "reuse" returns it if it was made from
    the same inputs (source, sizes and times of the files, spec, options) and raises otherwise, "replace" makes it anew
    and keeps the old one until the new one is whole.
    Raises UserError for what is wrong with the input; nothing is left at `dest` then.
    """
    report = progress or (lambda done, total, text: None)
    given = dict(options or {})
    if source.startswith("synthetic:"):
        kind = source.removeprefix("synthetic:")
        if spec is not None:
            raise UserError(f"{source}: synthetic data takes no spec; leave --spec out")
        chosen = validate(synthetic.options_of(kind), given, where=f"prepare {source}")
        inputs = _hash(source, chosen, [])
        return _reused(dest, chosen, inputs) or synthetic.prepare(kind, dest, chosen, inputs=inputs, progress=report)
    name, chosen, resolved, like = _files_spec(source, spec, given)
    if chosen.like is not None and chosen.like.resolve() == Path(dest).resolve():
        raise UserError(f"{dest}: is the dataset that the new one is to be like; choose another DEST")
    found = [(str(f.path.resolve()), f.bytes, f.path.stat().st_mtime_ns) for f in files.gather(name, resolved, chosen)]
    known = [like[0].fingerprint] if like else []
    inputs = _hash(source, chosen, [resolved.model_dump(mode="json"), found, *known])
    kept = _reused(dest, chosen, inputs)
    return kept or files.prepare(name, dest, resolved, chosen, like=like, inputs=inputs, report=report)


def _files_spec(
    source: str, path: str | Path | None, given: dict[str, Any]
) -> tuple[str, FileOptions, Spec, tuple[Encoding, Fitted] | None]:
    """(the source without its prefix, the options, the spec, the encoding if it is known) of a source of files."""
    where = f"prepare {source}"
    is_criteo = source.startswith("criteo:")
    name = source.removeprefix("criteo:")
    if given.get("like") is not None:
        if path is not None:
            raise UserError(f"{path}: a dataset like another one has that one's spec; leave --spec out")
        chosen = validate(FileOptions, given, where=where)
        known = encoding.load(chosen.like)
        return name, chosen, known[0].spec, known
    if path is not None:
        if is_criteo:
            raise UserError(f"{source}: Criteo's columns are known; leave --spec out, or leave the prefix out")
        return name, validate(FileOptions, given, where=where), load_spec(path), None
    first = find_files(name, format="csv" if is_criteo else None)[0]
    if is_criteo:
        criteo.check(first)
    elif not criteo.looks_like(first):
        raise UserError(
            f"{first.path}: needs --spec FILE.toml that says what its columns are (docs/data.md); "
            "without one, only Criteo's tab-separated files of 40 columns are known"
        )
    chosen = validate(CriteoOptions, given, where=where)
    return name, chosen, criteo.spec(chosen), None


def _reused(dest: str | Path, options: Options, inputs: str) -> Dataset | None:
    """The dataset that is there, if it is to be reused and was made from these inputs."""
    if options.existing != "reuse" or not (Path(dest) / "dataset.json").exists():
        return None
    found = load(dest)
    if found.inputs != inputs:
        raise UserError(
            f"{dest}: is a dataset made from other inputs ({found.source}), or by another version; "
            "choose another DEST, or say existing = 'replace' to make it anew"
        )
    return found


def _hash(source: str, options: Options, more: list[Any]) -> str:
    """Of everything that decides what is written: not of how many threads write it."""
    told = options.model_dump(mode="json", exclude={"threads", "existing"})
    return hashlib.sha256(json.dumps([source, told, *more], sort_keys=True).encode()).hexdigest()
