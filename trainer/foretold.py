"""What the planner foretold beside what a run measured.

measured(model, optimizer, world) -> dict      bytes of every rank, as report.json's "memory" has them
foretold(plan, report) -> [row, ...]           report.json's "foretold"; plan: what plan.json says
"""

from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.optim.optimizers import in_backward_optimizer_filter

from sharding.table_state import held_bytes
from sharding.update_counts import counts_bytes
from trainer.metrics import peak_memory_bytes
from trainer.optim.base import TABLES
from trainer.world import World


def measured(model: nn.Module, optimizer: Any, world: World) -> dict[str, Any]:
    """Called by all ranks.  tables_per_rank: rows of tables and their optimizer state, without id maps."""
    found: list[tuple[int, int]] = [(0, 0)] * world.size
    dist.all_gather_object(found, (peak_memory_bytes(world.device), table_bytes(model, optimizer)))
    peaks, tables = [list(each) for each in zip(*found, strict=True)]
    return {"peak_bytes": max(peaks), "per_rank": peaks, "tables_per_rank": tables}


def table_bytes(model: nn.Module, optimizer: Any) -> int:
    """Of the tables that are updated in the backward, and of the data_parallel ones, with their update counts."""
    total = held_bytes(model.module) + counts_bytes(model.module)
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if name.startswith(TABLES):
            states = [s for s in optimizer.state.get(parameter, {}).values() if getattr(s, "ndim", 0)]  # not a counter
            total += sum(t.numel() * t.element_size() for t in (parameter, *states))
    return total


def foretold(plan: dict[str, Any], report: dict[str, Any]) -> list[dict[str, Any]]:
    """name, unit ("ms" or "bytes"), predicted, measured, ratio (predicted / measured), note; of what both sides know.

    note: what the prediction leaves out.  A plan that was read from a file says nothing of steps and peaks.
    """
    predicted, memory = plan.get("predicted", {}), report["memory"]
    tables = [rank["table_bytes"] + rank["optimizer_bytes"] for rank in plan["ranks"]]
    note = "by estimates for a common CPU: `tablemesh bench calibrate` measures this one"
    guessed = note if plan.get("guessed") else ""
    left_out = (
        "not counted: what allocators and pools keep beside what is in use, code compiled on the way, gloo"
        if report.get("device") == "cpu"
        else ""
    )
    pairs = [
        ("step, median", "ms", predicted.get("step_ms"), report["train"]["step_ms"]["p50"], guessed),
        ("tables and their optimizer state, fullest rank", "bytes", max(tables), max(memory["tables_per_rank"]), ""),
        ("all memory, fullest rank", "bytes", max(predicted.get("rank_bytes", [0])), memory["peak_bytes"], left_out),
    ]
    return [
        {"name": name, "unit": unit, "predicted": first, "measured": second, "ratio": first / second, "note": note}
        for name, unit, first, second, note in pairs
        if first and second
    ]
