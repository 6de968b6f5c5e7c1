"""What `tablemesh ckpt` does: list, verify, compare, look into, export and rewrite checkpoints, without any ranks.

Every function returns plain values for JSON.  Tables are read in pieces of LAZY_BYTES: none has to fit into memory.

Shapes: E rows of a table, D columns.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.errors import UserError
from sharding.update_counts import UPDATES
from trainer.checkpoint import by_id, counts, scaled, storage
from trainer.checkpoint import files as files_module
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.chain import Chain, open_chain, steps
from trainer.checkpoint.manifest import Damaged, Entry, Manifest
from trainer.checkpoint.place import Place, step_of
from trainer.checkpoint.restore import newest, open_named, place_of, split
from trainer.checkpoint.storage import Part


def locate(where: str) -> tuple[Place, str | None]:
    """A run folder, a folder or URL of checkpoints, or one checkpoint -> (place, name or None)."""
    last = where.rstrip("/").rpartition("/")[2]
    if last.startswith("step_") and last[5:].isdigit():
        return split(where)
    if "://" not in where and (Path(where) / "config.toml").is_file():
        from trainer import config as configs

        run_dir = Path(where).resolve()
        return place_of(run_dir, configs.load(run_dir / "config.toml").checkpoint.dir), None
    place = Place(where)
    if not place.names():
        raise UserError(f"{where}: neither a run, nor a checkpoint, nor a folder of checkpoints")
    return place, None


def open_at(where: str) -> Chain:
    """The checkpoint that `where` names, or the newest whole one there."""
    place, name = locate(where)
    if name is None:
        return newest(place)
    return open_named(place, name, where)


def ls(where: str) -> dict[str, Any]:
    """Every checkpoint of a run: what its manifest says.  The files are not read."""
    place, only = locate(where)
    rows = []
    for name in [only] if only else place.names():
        row: dict[str, Any] = {"name": name, "step": step_of(name)}
        try:
            manifest = manifests.read(place, name)
        except Damaged as damage:
            rows.append(row | {"state": "damaged", "why": str(damage)})
            continue
        parent = manifest.parent["name"] if manifest.parent else None
        found = {"kind": manifest.kind, "parent": parent, "bytes": manifest.bytes, "samples": manifest.position.samples}
        rows.append(row | {"state": "there", **found, "world_size": manifest.position.world_size})
    return {"where": str(place), "checkpoints": rows}


def verify(where: str) -> dict[str, Any]:
    """Read and hash everything again: {"ok", "checked", "damaged": [{"checkpoint", "file", "table", "message"}]}."""
    place, only = locate(where)
    names = [only] if only else place.names()
    if not names or not place.sizes(names[0]):  # what a script asks for must not be well because it is not there
        raise UserError(f"{where}: no such checkpoint; there are {', '.join(place.names()) or 'none'} in {place}")
    checked, damaged = [], []
    for name in names:
        try:
            members = [name] if only is None else [files.name for files in open_chain(place, name).members]
            found = [d for member in members for d in files_module.verify(place, member, manifests.read(place, member))]
            size = sum(manifests.read(place, member).bytes for member in members)
        except Damaged as damage:
            found, size = [damage], 0
        checked.append({"name": name, "ok": not found, "bytes": size})
        damaged += [{"checkpoint": name, "file": d.file, "table": d.table, "message": str(d)} for d in found]
    return {"ok": not damaged, "where": str(place), "checked": checked, "damaged": damaged}


def diff(a: str, b: str) -> dict[str, Any]:
    """The largest difference of every tensor, and the first row that differs; the ranks' own parts are left out."""
    first, second = open_at(a), open_at(b)
    ours, theirs = _shared(first), _shared(second)
    rows = []
    for name in sorted(set(ours) & set(theirs)):
        entry, other = ours[name], theirs[name]
        if entry.size != other.size:
            rows.append({"tensor": name, "table": entry.table, "sizes": [list(entry.size), list(other.size)]})
            continue
        largest, row, count = 0.0, None, 0
        for at, values, others in _pieces(first, second, name, entry):
            differs = (values != others) & ~((values != values) & (others != others))  # NaN equals NaN here
            if not bool(differs.any()):
                continue
            gap = (values.double() - others.double()).abs()
            largest = max(largest, gap[differs].max().item()) if not bool(gap[differs].isnan().any()) else math.inf
            of_row = differs.flatten(1).any(dim=1) if differs.dim() > 1 else differs.view(-1)
            count += int(of_row.sum())
            row = at + int(of_row.nonzero()[0]) if row is None else row
        rows.append(
            {"tensor": name, "table": entry.table, "largest": largest, "first_row": row, "rows_that_differ": count}
        )
    only = {"only_in_first": sorted(set(ours) - set(theirs)), "only_in_second": sorted(set(theirs) - set(ours))}
    same = not any(only.values()) and all(row.get("first_row", 0) is None for row in rows)
    return {"first": first.path, "second": second.path, "same": same, **only, "tensors": rows}


def inspect(where: str, *, table: str | None = None, rows: tuple[int, ...] = ()) -> dict[str, Any]:
    """Figures of every table, or of one and the values of some of its rows; in a table whose rows are given to ids, of
    these ids (by_id.py), and the figures are of each part of it.  table: a physical one, or a logical one for all that
    its kind made of it.

    norm: the L2 norm of a row.  never_updated: rows whose optimizer state is all zero, or that the update counts say so
    of where the optimizer has no state (None without either); zero_rows: rows of zeros.  updates: counts.py's, None
    where the run did not count.
    """
    chain = open_at(where)
    entries = {n: e for n, e in chain.tensors.items() if e.table is not None}
    names = sorted({entry.table for entry in entries.values() if entry.table is not None})
    asked = names if table is None else _physical(chain, table, names)
    bases = [base for name in asked for base in _bases(chain, name)]
    found = [_figures(chain, base, entries) for base in bases]
    result: dict[str, Any] = {"checkpoint": chain.path, "step": chain.manifest.position.step, "tables": found}
    if rows and table is None:
        raise UserError("--rows needs --table: whose rows?")
    if rows and len(asked) > 1:
        raise UserError(f"table {table!r} is stored as {', '.join(asked)}; name one of them, whose rows you want")
    table = asked[0] if rows else table
    if rows and by_id.stored(chain, table):
        result["rows"] = [_row_of_id(chain, table, id) for id in rows]
    elif rows:
        count = entries[f"tables/{table}/weight"].size[0]
        wrong = [row for row in rows if not 0 <= row < count]
        if wrong:
            raise UserError(f"table {table!r} has the rows 0 to {count - 1}, not {wrong[0]}")
        of_table = [name for name, entry in entries.items() if entry.table == table]
        result["rows"] = [
            {
                "row": row,
                **{n.rpartition("/")[2]: scaled.values(chain, n, rows=(row, row + 1))[0].tolist() for n in of_table},
            }
            for row in rows
        ]
    return result


def _physical(chain: Chain, table: str, names: Sequence[str]) -> list[str]:
    """The table of this name or, of a logical one, those that its kind made of it, NAME#..., in the order of names."""
    found = [name for name in names if name == table] or [name for name in names if name.partition("#")[0] == table]
    if not found:
        raise UserError(f"{chain.path}: no table {table!r}; there are {', '.join(names)}")
    return found


def _bases(chain: Chain, table: str) -> list[str]:
    """What the names of its tensors begin with: one, or one for each part of a table whose rows are given to ids."""
    return by_id.stored(chain, table) or [f"tables/{table}"]


def _row_of_id(chain: Chain, table: str, id: int) -> dict[str, Any]:
    """The row of an id, or the default row, with what the id map knows of it; "row" is the id."""

    def read(name: str, row: int) -> Any:
        return scaled.values(chain, name, rows=(row, row + 1))[0].tolist()

    bases = by_id.stored(chain, table)
    for base in bases:
        live_K = by_id.live_rows(chain, base)
        found = live_K[chain.read(f"{base}/id")[live_K] == id]
        if len(found):
            names = [*_states(chain, base), *(f"{base}/{what}" for what in ("weight", "clock", "uses"))]
            names += [name for name in (f"{base}/{UPDATES}",) if name in chain.tensors]
            row = int(found[0])
            return {"row": id, **{n.rpartition("/")[2]: read(n, row) for n in names}}
    return {"row": id, "default": read(f"{bases[0]}/weight", 0)}


def _states(chain: Chain, base: str) -> list[str]:
    others = {f"{base}/{what}" for what in ("weight", *by_id.NOT_STATES)}
    return [n for n, e in chain.tensors.items() if n.rpartition("/")[0] == base and e.table and n not in others]


def _figures(chain: Chain, base: str, entries: dict[str, Entry]) -> dict[str, Any]:
    name = f"{base}/weight"
    entry = entries[name]
    scales = [scale for scale, *_ in scaled.scales_in(chain, base)]
    states = [n for n in _states(chain, base) if n not in scales]
    total, least, most, zero, idle = 0.0, math.inf, 0.0, 0, 0
    for first, end in steps(entry):
        weights = scaled.values(chain, name, rows=(first, end)).float()
        norm_E = weights.norm(dim=1)
        total += norm_E.double().sum().item()
        least, most = min(least, norm_E.min().item()), max(most, norm_E.max().item())
        zero += int((weights == 0).all(dim=1).sum())
        if states:
            still_E = torch.ones(end - first, dtype=torch.bool)
            for state in states:
                state_E = chain.read(state, rows=(first, end))
                still_E &= (state_E == 0).view(end - first, -1).all(dim=1)
            idle += int(still_E.sum())
    rows, updates = entry.size[0], counts.figures(chain, base)
    never = updates["never"] if updates is not None and updates["since"] == 0 else None
    return {
        "table": base.removeprefix("tables/"),
        "rows": rows,
        "columns": entry.size[1],
        "bytes": rows * sum(entries[n].row_bytes for n in (name, *scales)),
        "states": sorted(n.rpartition("/")[2] for n in states),
        "norm": {"mean": total / rows, "least": least, "largest": most},
        "zero_rows": zero,
        "never_updated": idle if states else never,
        "updates": updates,
    }


def export(where: str, out: Path) -> dict[str, Any]:
    """OUT/TABLE.parquet (row, and column v0, v1, ...) and OUT/dense.safetensors.  OUT must not exist or be empty, and
    holds nothing when this fails.

    A table whose rows are given to ids has a file for each part of it, with the column id too: null where no id has it.
    """
    chain = open_at(where)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: there is something already; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return {"checkpoint": chain.path, "files": _export(chain, out)}
    except BaseException as error:
        for path in out.iterdir() if out.is_dir() else ():
            path.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
        raise


def _export(chain: Chain, out: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.torch import save_file

    written: list[dict[str, Any]] = []
    for name, entry in chain.tensors.items():
        if entry.table is None or not name.endswith("/weight"):
            continue
        base = name.rpartition("/")[0]
        given = by_id.PARTS_OF in base
        path = out / f"{base.removeprefix('tables/').replace('/parts:', '.ids_').replace('/', '_')}.parquet"
        ids = [("id", pa.int64())] if given else []
        fields = [("row", pa.int64()), *ids, *((f"v{c}", pa.float32()) for c in range(entry.size[1]))]
        owners = by_id.owners(chain, base) if given else None
        with pq.ParquetWriter(path, pa.schema(fields), compression="zstd") as writer:
            for first, end in steps(entry):
                rows_UD = scaled.values(chain, name, rows=(first, end)).float().numpy()
                columns = [
                    pa.array(range(first, end), pa.int64()),
                    *([] if owners is None else [pa.array(owners[first:end], pa.int64())]),
                    *(pa.array(rows_UD[:, c]) for c in range(entry.size[1])),
                ]
                writer.write_table(pa.table(columns, schema=pa.schema(fields)))
        written.append({"file": str(path), "table": entry.table, "rows": entry.size[0], "columns": entry.size[1]})
    dense = {n.removeprefix("dense/"): chain.read(n) for n in chain.tensors if n.startswith("dense/")}
    prefix = "ranks/0/buffers/"
    dense |= {n.removeprefix(prefix): chain.read(n) for n in chain.tensors if n.startswith(prefix)}
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, out / "dense.safetensors")
    written.append({"file": str(out / "dense.safetensors"), "tensors": len(dense)})
    return written


def reshard(where: str, out: str, *, parts: int) -> dict[str, Any]:
    """Rewrite as one full checkpoint whose tables lie in `parts` files of rows, as so many ranks would read them."""
    chain = open_at(where)
    place, name = split(out)
    if place.sizes(name):
        raise UserError(f"{out}: is there already; name another checkpoint folder")
    by_part: list[list[Part]] = [[] for _ in range(parts)]
    for part in chain.lazy_parts():
        rows = part.size[0] if part.size else 1
        of_part = -(-rows // parts)
        for k in range(parts):
            first = max(part.offset[0] if part.offset else 0, k * of_part)
            end = min((part.offset[0] if part.offset else 0) + _rows(part), (k + 1) * of_part)
            if first < end:
                by_part[k].append(_cut(chain, part, first, end))

    def about(files: dict, tensors: dict) -> Manifest:
        return dataclasses.replace(chain.manifest, kind="full", parent=None, files=files, tensors=tensors)

    try:
        manifest = storage.write_alone(by_part, place, name, about)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return {"from": chain.path, "to": place.path(name), "bytes": manifest.bytes, "files": manifest.files}


def _rows(part: Part) -> int:
    return part.tensor.shape[0] if part.size else 1


def _cut(chain: Chain, part: Part, first: int, end: int) -> Part:
    if not part.size:
        return part
    return dataclasses.replace(
        part,
        offset=(first, *part.offset[1:]),
        tensor=part.tensor[: end - first],
        make=lambda: chain.read(part.name, rows=(first, end)),
    )


def _shared(chain: Chain) -> dict[str, Entry]:
    return {name: entry for name, entry in chain.tensors.items() if not name.startswith("ranks/")}


def _pieces(first: Chain, second: Chain, name: str, entry: Entry) -> Iterator[tuple[int, Tensor, Tensor]]:
    if not entry.size:
        yield 0, first.read(name).view(1), second.read(name).view(1)
        return
    for start, end in steps(entry):
        yield start, *(scaled.values(chain, name, rows=(start, end)) for chain in (first, second))
