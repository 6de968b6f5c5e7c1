"""`python -m benchmarks.gpu_kernels [--json]`: the triton backend on a GPU, beside a copy and, where installed, FBGEMM.

Needs torch and Triton alone.  Tables of 4 GB of float32 in all (far more than any L2 cache), rowwise Adagrad, widths 32
to 256, 1 to 100 ids per bag, uniform and Zipf 1.2.  A rate is the bytes that the work cannot do without, per second of
the GPU's clock:

    forward             each id 8, each row that is looked up 4 D, each output 4 D
    backward + update   each id 8, the gradient of each bag 4 D, each different row read and written 8 D, its state 8

whose baseline is a copy of 1 GB in the same run, counted as read and written, in turns with ours.  With repeated rows
the forward may exceed the copy: caches serve them.  Each case is checked against plain torch in the same run.
"""

import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kernels.ops import Optimizer, Spec, Table, TableBatchedEmbeddingBag

ADAGRAD = Optimizer(kind="rowwise_adagrad", lr=0.01)
ZIPF = 1.2
ROWS_CHECKED = 2000  # different rows of the first table, against float64
PAIRS = 10  # after one that does not count


@dataclass(frozen=True, kw_only=True)
class Size:
    tables: int = 8
    bytes: int = 4 << 30  # of all tables
    ids: int = 1 << 20  # of a batch
    copied: int = 1 << 30
    dims: tuple[int, ...] = (32, 64, 128, 256)
    lengths: tuple[int, ...] = (1, 10, 100)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the JSON that every benchmark prints; ours and baseline in `unit`, ratio > 1: ours is better."""

    name: str
    unit: str
    ours: float
    baseline: float
    baseline_name: str
    ratio: float
    correct: bool


def main(*, as_json: bool, size: Size | None = None, device: str = "cuda") -> int:
    """Run everything, print it; the exit code, 1 when a row is not correct."""
    size = size or Size()
    if device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU that torch can use; this benchmark measures one", file=sys.stderr)
        return 2
    rows = []
    for dim in size.dims:
        for length in size.lengths:
            for zipf in (None, ZIPF):
                rows += measure(size, dim, length, zipf, device)
    if as_json:
        result = {"bench": "gpu_kernels", "hardware": hardware(device), "versions": versions()}
        print(json.dumps(result | {"rows": [asdict(row) for row in rows]}))
    else:
        print(", ".join(f"{name} {value}" for name, value in (hardware(device) | versions()).items()))
        for row in rows:
            state = "correct" if row.correct else "NOT CORRECT"
            line = f"{row.name:55} {row.ours:8.1f} {row.unit}  {row.ratio:5.2f} of {row.baseline_name}"
            print(f"{line} ({row.baseline:.1f})  {state}")
    return 0 if all(row.correct for row in rows) else 1


def measure(size: Size, dim: int, length: int, zipf: float | None, device: str) -> list[Row]:
    table_rows = size.bytes // (4 * dim * size.tables)
    bags_each = max(1, size.ids // (size.tables * length))
    spec = Spec(tables=tuple(Table(rows=table_rows, dim=dim) for _ in range(size.tables)), optimizer=ADAGRAD)
    ours = TableBatchedEmbeddingBag(spec, backend="triton", device=device)
    ours.state.weights.uniform_(-0.5, 0.5)
    count = bags_each * length
    ids_N = torch.cat([drawn(table_rows, count, zipf, device) for _ in spec.tables])
    offsets = torch.arange(size.tables * bags_each + 1, device=device) * length
    grad = torch.randn(bags_each, spec.columns[-1], device=device)
    correct = right(ours, ids_N, offsets, grad)
    source = torch.empty(size.copied, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    different = sum(int(part.unique().numel()) for part in ids_N.view(size.tables, -1))
    outputs = grad.numel() * 4
    least = {
        "forward": ids_N.numel() * (8 + 4 * dim) + outputs,
        "backward + update": ids_N.numel() * 8 + outputs + different * (8 * dim + 8),
    }
    case = f"d={dim} L={length} {'uniform' if zipf is None else f'Zipf {zipf}'}"
    theirs = fbgemm(spec, device)
    rows = []
    for part, amount in least.items():
        work = part_of(part, ours, ids_N, offsets, grad)
        pairs = [(seconds(work, device), seconds(copy, device)) for _ in range(PAIRS + 1)][1:]
        copied = 2 * size.copied
        rates = [(amount / a / 1e9, copied / b / 1e9) for a, b in pairs]
        rows.append(row(f"{case} {part}", rates, "copy", correct))
        if theirs is not None:
            other = part_of(part, theirs, ids_N, offsets, grad)
            pairs = [(seconds(work, device), seconds(other, device)) for _ in range(PAIRS + 1)][1:]
            rates = [(amount / a / 1e9, amount / b / 1e9) for a, b in pairs]
            rows.append(row(f"{case} {part}", rates, "FBGEMM", correct))
    return rows


def row(name: str, rates: list[tuple[float, float]], baseline: str, correct: bool) -> Row:
    return Row(
        name=name,
        unit="GB/s",
        ours=statistics.median(ours for ours, _ in rates),
        baseline=statistics.median(other for _, other in rates),
        baseline_name=baseline,
        ratio=statistics.median(ours / other for ours, other in rates),
        correct=correct,
    )


def part_of(part: str, module: Callable, ids_N: Tensor, offsets: Tensor, grad: Tensor) -> Callable[[], Callable | None]:
    """The forward alone; or what prepares a backward, untimed, and returns it."""

    def forward() -> None:
        with torch.no_grad():
            module(ids_N, offsets)

    def prepared() -> Callable[[], None]:
        out = module(ids_N, offsets)
        return lambda: out.backward(grad)

    return forward if part == "forward" else prepared


def seconds(work: Callable[[], Callable | None], device: str) -> float:
    """What work takes; where `work` is a preparation that returns the work proper, only that."""
    timed = work
    if work.__name__ == "prepared":
        timed = work()
    if device != "cuda":
        start = time.perf_counter()
        timed()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    timed()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def drawn(rows: int, count: int, zipf: float | None, device: str) -> Tensor:
    """Row k has a share proportional to 1 / (k + 1) ** zipf; the rows then stand in no order of frequency."""
    if zipf is None:
        return torch.randint(0, rows, (count,), device=device)
    shares = torch.arange(1, rows + 1, dtype=torch.float64, device=device).pow(-zipf).cumsum(0)
    ranks = torch.searchsorted(shares, torch.rand(count, dtype=torch.float64, device=device) * shares[-1])
    return (ranks.clamp(max=rows - 1) * 0x9E3779B1) % rows


def right(bags: TableBatchedEmbeddingBag, ids_N: Tensor, offsets: Tensor, grad: Tensor) -> bool:
    """One step against plain torch in float64: all outputs of the first table, and some of its rows and states."""
    dim, count = bags.spec.tables[0].dim, grad.shape[0]
    length = int(offsets[1])
    table_ED, state_E = bags.state.tables[0], bags.state.state_views("momentum1")[0]
    first_N = ids_N[: count * length]
    rows_U = first_N.unique()[:ROWS_CHECKED]
    before_UD = table_ED[rows_U].double()
    expected_BD = torch.nn.functional.embedding_bag(first_N, table_ED, offsets[:count], mode="sum")
    out = bags(ids_N, offsets)
    same = torch.allclose(out[:, :dim], expected_BD, rtol=1e-4, atol=1e-4)
    out.backward(grad)
    at_N = torch.searchsorted(rows_U, first_N).clamp(max=len(rows_U) - 1)
    known_N = (rows_U[at_N] == first_N).nonzero().flatten()
    g_UD = torch.zeros(len(rows_U), dim, dtype=torch.float64, device=grad.device)
    g_UD.index_add_(0, at_N[known_N], grad[known_N // length, :dim].double())
    s_U = g_UD.square().mean(1)
    want_UD = before_UD - ADAGRAD.lr * g_UD / (s_U.sqrt() + ADAGRAD.eps)[:, None]
    same &= torch.allclose(state_E[rows_U].double(), s_U, rtol=1e-3, atol=1e-5)
    return same and torch.allclose(table_ED[rows_U].double(), want_UD, rtol=1e-3, atol=1e-5)


def fbgemm(spec: Spec, device: str) -> Callable | None:
    """FBGEMM's table-batched embedding bag of the same tables, where it is installed and there is a GPU."""
    if device != "cuda" or importlib.util.find_spec("fbgemm_gpu") is None:
        return None
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = [(table.rows, table.dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for table in spec.tables]
    return SplitTableBatchedEmbeddingBagsCodegen(
        tables, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=ADAGRAD.lr, eps=ADAGRAD.eps
    )


def hardware(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "none: Triton's interpreter, whose times mean nothing"
    return {"gpu": name, "machine": platform.machine()}


def versions() -> dict[str, str]:
    import triton

    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    sys.exit(main(as_json="--json" in sys.argv[1:]))
