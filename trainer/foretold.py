"""What the planner foretold beside what a run measured.

table_bytes(model, optimizer) -> int       bytes of table rows and their optimizer state that this rank holds
foretold(plan, report) -> [row, ...]       for the report; plan: plan.json, report: report.json
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.optimizers import in_backward_optimizer_filter

from sharding.table_state import held_parts
from trainer.optim.base import TABLES


def table_bytes(model: nn.Module, optimizer: Any) -> int:
    """Of tables updated in the backward and of data_parallel ones; each tensor once."""
    found: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if isinstance(tensor, Tensor) and not isinstance(tensor, ShardedTensor) and tensor.numel() > 1:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()

    for part in held_parts(model.module):
        add(part.tensor)
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        if name.startswith(TABLES):
            add(parameter.detach())
            for state in optimizer.state.get(parameter, {}).values():
                add(state)
    return sum(found.values())


def foretold(plan: dict[str, Any], report: dict[str, Any]) -> list[dict[str, Any]]:
    """name, predicted, measured, unit ("ms" or "bytes"), ratio (predicted / measured); of what both sides know."""
    predicted, memory = plan.get("predicted") or {}, report.get("memory") or {}
    step = ((report.get("train") or {}).get("step_ms") or {}).get("p50")
    tables, held = predicted.get("table_and_state_bytes"), memory.get("tables_per_rank")
    peaks, peak = predicted.get("rank_bytes"), memory.get("peak_bytes")
    pairs = [
        ("step, median", "ms", predicted.get("step_ms"), step),
        ("tables and their optimizer state, fullest rank", "bytes", tables and max(tables), held and max(held)),
        ("all memory, fullest rank", "bytes", peaks and max(peaks), peak),
    ]
    return [
        {"name": name, "unit": unit, "predicted": first, "measured": second, "ratio": first / second}
        for name, unit, first, second in pairs
        if first is not None and second
    ]
