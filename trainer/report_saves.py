"""What `report.html` says of checkpoints and of what interrupted a run: saves, their pauses, restarts, resumes."""

from typing import Any


def saves(events: list[dict]) -> list[dict[str, Any]]:
    """A row per checkpoint written, in the order of writing."""
    return [
        {
            "step": event.get("step"),
            "kind": _kind(event),
            "bytes": event.get("bytes"),
            "pause_ms": _milliseconds(event.get("pause_seconds")),
            "seconds": event.get("seconds"),
            "where": "beside the steps" if event.get("background") else "in the pause",
            "path": event.get("path") or "",
        }
        for event in events
        if event["event"] == "checkpoint"
    ]


def totals(report: dict, rows: list[dict[str, Any]]) -> list[str]:
    """The sums of the run's last process as sentences; `checkpoints` of report.json."""
    found = report.get("checkpoints")
    found = found if isinstance(found, dict) else {}
    saved, failed = found.get("saved"), found.get("failed")
    pause, background = found.get("pause_seconds"), found.get("background_seconds")
    train = report.get("train")
    seconds = train.get("seconds") if isinstance(train, dict) else None
    sentences = []
    if saved is not None:
        sentences.append(f"{saved} saved" + (f", {failed} failed" if failed else ""))
    if pause is not None:
        of = f", {100 * pause / seconds:.1f}% of the training" if seconds and pause <= seconds else ""
        sentences.append(f"the steps stood still for {pause:.2f} s{of}")
    if background is not None and any(row["where"] == "beside the steps" for row in rows):
        sentences.append(f"{background:.2f} s of writing went on beside them")
    return sentences


def history(report: dict, events: list[dict]) -> list[dict[str, str]]:
    """Restarts and resumes, in order: {"what", "text"}."""
    rows = []
    for event in events:
        if event["event"] == "restart":
            rows.append({"what": _numbered(event), "text": str(event.get("message") or "")})
        elif event["event"] == "resume":
            passed = event.get("passed_over") or []
            text = f"from {event.get('path')}, after {event.get('step')} steps"
            rows.append({"what": "went on", "text": "; ".join([text, *(f"passed over {reason}" for reason in passed)])})
    if not any(event["event"] == "restart" for event in events):
        restarts = report.get("restarts")
        rows += [
            {"what": _numbered(r), "text": str(r.get("message") or "")} for r in restarts or [] if isinstance(r, dict)
        ]
    return rows


def _kind(event: dict) -> str:
    if event.get("compacted"):
        return "delta, merged"
    return "delta" if event.get("delta") else "full"


def _numbered(restart: dict) -> str:
    number, of = restart.get("number"), restart.get("of")
    return "restart" if number is None else f"restart {number}" + (f" of {of}" if of else "")


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
