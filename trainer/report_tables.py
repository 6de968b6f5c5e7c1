"""The tables of the config in a report: what was asked for, what it became, what it takes, how it was used.

tables(plan, report, optimizer) -> [row, ...]     report.json's "tables"; plan: what plan.json says
view(report) -> dict                              the same in words, and its sums, for report.html
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.words import figure

KEYS = ("bytes", "dense_bytes", "optimizer_bytes", "id_map_bytes", "filter_bytes", "standard_bytes")
OF_KIND = ("bytes", "dense_bytes", "id_map_bytes", "filter_bytes")  # what stands beside a standard table's rows


def tables(plan: Mapping[str, Any], report: Mapping[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """plan.json's "logical" entries (sharding/logical.py) with, of each, beside them:

    optimizer: its name.  ids_per_bag: mean of each feature, None where dataset.json does not know.
    of_standard: bytes of rows, combining parameters, id map and filter, divided by those of a standard table's rows.
    id_map: what happened to its ids (report.json's "id_maps").  balance: by physical table that is split by rows, the
        look-ups of the fullest part, divided by the mean.  Both only once there is something to say.
    """
    stats = {f["name"]: f.get("stats") or {} for f in (report.get("dataset") or {}).get("features") or []}
    maps = report.get("id_maps") or {}
    fullest = {row["table"]: row["fullest"] for row in report.get("row_balance") or []}
    found = []
    for entry in plan.get("logical") or []:
        row = dict(entry) | {
            "optimizer": optimizer,
            "ids_per_bag": {name: _ids_per_bag(stats.get(name, {})) for name in entry["features"]},
            "of_standard": sum(entry[key] for key in OF_KIND) / entry["standard_bytes"],
        }
        balance = {name: fullest[name] for name in entry["physical"] if name in fullest}
        known = [maps[name] for name in entry["physical"] if name in maps]
        found.append(row | ({"balance": balance} if balance else {}) | ({"id_map": known[0]} if known else {}))
    return found


def _ids_per_bag(stats: Mapping[str, Any]) -> float | None:
    bags, ids = stats.get("rows"), stats.get("ids")
    return ids / bags if bags and ids is not None else None


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """rows: of every table.  sums: of KEYS.  shown: those of KEYS that some table has.  optimizers: their names."""
    found = report.get("tables") or []
    sums = {key: sum(t.get(key) or 0 for t in found) for key in KEYS}
    return {
        "rows": [_row(t) for t in found],
        "sums": sums | {"of_standard": sum(sums[key] for key in OF_KIND) / (sums["standard_bytes"] or 1)},
        "shown": [key for key in KEYS if sums[key]],
        "balanced": any(t.get("balance") for t in found),
        "optimizers": list(dict.fromkeys(str(t["optimizer"]) for t in found)),
    }


def _row(table: Mapping[str, Any]) -> dict[str, Any]:
    physical = table["physical"]
    words = [table["row_type"]] if table["row_type"] != "fp32" else []
    words += ["mean of bags"] if table["pooling"] == "mean" else []
    return {
        **table,
        "words": ", ".join(words),
        "options_text": ", ".join(f"{key} = {_short(value)}" for key, value in table["options"].items()),
        "physical_tip": ", ".join(physical[:12]) + (f" and {len(physical) - 12} more" if len(physical) > 12 else ""),
        "ids_text": _range([n for n in table["ids_per_bag"].values() if n is not None]),
        "sharding_text": ", ".join(s.replace("_", " ") for s in table["sharding"]),
        "fullest": max(table["balance"].values()) if table.get("balance") else None,
    }


def _short(value: Any) -> str:
    text = ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
    return f"[{text}]" if isinstance(value, (list, tuple)) else text


def _range(numbers: Sequence[float]) -> str:
    if not numbers:
        return "–"
    low, high = figure(min(numbers), 2), figure(max(numbers), 2)
    return low if low == high else f"{low} to {high}"
