"""Where a training step goes: a trace of some steps, and a table of their time by kind of work.

    Profile(run_dir, rank)      run_dir/profile/rank_R.json (the trace) and summary_R.json (the table) of a few steps
    summary(events, seconds)    the table alone

The table is of the thread that runs the steps: time in which it waits for the kernels' other threads is counted as the
kernel's.  What no kind claims (Python, TorchRec's bookkeeping, autograd) is "the rest", with the profiler's own
cost; the shares of a profiled step therefore say more than its milliseconds.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

STEPS = 10  # traced
SKIPPED = 5  # before them, so that compilers and buffers are warm

# Kind -> names of operators and ranges (torch's, TorchRec's, FBGEMM's, ours); the first that matches. One in INHERITED
# also takes what runs inside it.
KINDS = {
    "data wait": r"^phase: data_wait$",
    "optimizer": r"^Optimizer\.(step|zero_grad)|^## zero_grad",
    "embedding": r"^_Lookup|^fbgemm::split_embedding|embedding_bag|^fbgemm::bounds_check",
    "interaction": r"^_Dots|^aten::bmm$",
    "matrix products": r"^aten::(mm|addmm|linear|addmv|mv)$|^mkldnn::_linear|^_Linear",
    "communication": r"^c10d::|^gloo:|^nccl:|wait\(\)|All2All|ReduceScatter|all2all|^DistributedDataParallel",
    "copies": r"^aten::(copy_|cat|_to_copy|to|clone|contiguous|index_select|stack|split\w*)$|^fbgemm::permute|Memcpy",
    "elementwise": r"^aten::(relu_?|clamp\w*|threshold\w*|sigmoid\w*|log_sigmoid\w*|add_?|sub_?|mul_?|div_?|sum|mean|"
    r"neg|exp|abs|fill_|zero_|where|binary_cross\w*|addcmul\w*|native_batch_norm\w*|native_dropout\w*|bernoulli_)$",
}
INHERITED = ("optimizer",)
REST = "the rest"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


class Profile:
    """Steps SKIPPED + 1 to SKIPPED + STEPS of a loop that calls `before_step` and `after_step`, and `close` at its end.

    The summary is written when the last of them is done, or at the end of a shorter run.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.folder, self.rank = run_dir / "profile", rank
        self.step = 0
        self.seconds: list[float] = []
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def before_step(self) -> None:
        self.step += 1
        if self.step == SKIPPED + 1:
            self._profile.start()

    def after_step(self, seconds: float) -> None:
        if self.step > SKIPPED:
            self.seconds.append(seconds)
        if self.step == SKIPPED + STEPS:
            self._write()

    def close(self) -> None:
        if SKIPPED < self.step < SKIPPED + STEPS:
            self._write()
        self.step = SKIPPED + STEPS

    def _write(self) -> None:
        self._profile.stop()
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"rank_{self.rank}.json"
        self._profile.export_chrome_trace(str(trace))
        found = {"trace": str(trace.relative_to(self.folder.parent)), **summary(self._profile.events(), self.seconds)}
        (self.folder / f"summary_{self.rank}.json").write_text(json.dumps(found, indent=1) + "\n")


def summary(events: Any, seconds: list[float]) -> dict[str, Any]:
    """{"steps", "step_ms", "kinds": [{"kind", "ms", "share"}, ...]}: mean milliseconds of a step, largest first.

    events: torch.profiler's; those of the busiest thread count, each with the time that none of its children has.
    """
    by_thread: dict[int, dict[str, float]] = {}
    for event in events:
        if event.is_async:
            continue
        of_kind = by_thread.setdefault(event.thread, {})
        kind = kind_of(event.name)
        above = event.cpu_parent
        while above is not None:
            if kind_of(above.name) in INHERITED:
                kind = kind_of(above.name)
            above = above.cpu_parent
        of_kind[kind] = of_kind.get(kind, 0.0) + event.self_cpu_time_total / 1e3
    spent = max(by_thread.values(), key=lambda found: sum(found.values()), default={})
    total = 1e3 * sum(seconds)
    spent[REST] = max(0.0, total - sum(ms for kind, ms in spent.items() if kind != REST))
    return {
        "steps": len(seconds),
        "step_ms": total / len(seconds),
        "kinds": [
            {"kind": kind, "ms": ms / len(seconds), "share": ms / total}
            for kind, ms in sorted(spent.items(), key=lambda item: -item[1])
        ],
    }
