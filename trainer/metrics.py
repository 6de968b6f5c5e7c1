"""What a run is judged by, over all ranks and in constant memory: `Metrics` for quality, `StepTimer` for speed.

Definitions, the proof of the AUC's error bound and the sources are in docs/metrics.md.
Shapes: B rows of this rank, T tasks (labels), H = 2**bits histogram bins.
"""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.errors import UserError

BITS = 18  # evaluation: 4 MiB of float64 a task, and an AUC bound of about 1e-5 on click logits
WINDOW_BITS = 15  # the log line of training: 0.5 MiB a task to reduce, a bound of about 1e-4
CALIBRATION_BINS = 20

# A logit's bin is its sign, its octave and the leading bits of its mantissa. The 2 x 32 octaves take 6 of the bits.
# Smaller magnitudes than 2**-16 share the innermost bin of their sign, larger ones than 2**16 the outermost.
_OCTAVE_BITS = 6
_SMALLEST = (127 - 16) << 23  # the bits of float32 2**-16
_LARGEST = ((127 + 16) << 23) - 1  # the bits of the float32 just below 2**16
_MANTISSA = 23

_SUMS = ("loss", "prediction", "label", "weight", "rows", "bad_logits", "bad_labels", "bad_weights")


class Metrics:
    """AUC, normalised entropy, log loss and calibration of each task.

    The state is one float64 vector: per task the weight of positives and of negatives in each of H bins of the logit,
    and a few sums. Adding two states adds the data, so splitting rows over updates or ranks changes nothing but the
    order of float64 additions (and not even that shows when the weights are integers).

        metrics = Metrics(["click"], device)
        for batch in ...:
            metrics.update(logits_BT, batch.labels_BT, batch.weight_B)
        metrics.all_reduce().compute()["auc"]
    """

    def __init__(self, tasks: Sequence[str], device: torch.device | str = "cpu", *, bits: int = BITS):
        """tasks: the label names, in the order of the columns.  bits: log2 of H, from 7 to 24."""
        assert tasks and len(set(tasks)) == len(tasks), f"tasks must be different and at least one: {tasks}"
        assert _OCTAVE_BITS < bits <= 24, bits
        self.tasks = tuple(tasks)
        self.bits = bits
        self._state = torch.zeros(len(tasks) * (2 * 2**bits + len(_SUMS)), dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def sums(self) -> Tensor:
        """All of the state, which adds over updates and ranks; a checkpoint keeps it."""
        return self._state

    @torch.no_grad()
    def update(
        self,
        logits_BT: Tensor,  # any float type; (B,) is taken as (B, 1)
        labels_BT: Tensor,  # in [0, 1]; between them a row is part positive, part negative
        weight_B: Tensor | None = None,  # >= 0; None: 1 each. Rows of weight 0 count nothing, whatever they hold.
    ) -> None:
        """Add one batch. Never waits for the device.

        Rows that cannot be counted (a logit that is not finite, a label outside [0, 1], a negative weight) are left out
        and counted, and `compute` raises: after the reduction, so every rank does and none is left in a collective.
        """
        logits_TB = _by_task(logits_BT, len(self.tasks), self.device).float()
        labels_TB = _by_task(labels_BT, len(self.tasks), self.device).double()
        rows = logits_TB.shape[1]
        assert labels_TB.shape[1] == rows, f"{rows} logits, {labels_TB.shape[1]} labels"
        if weight_B is None:
            weight_B = torch.ones(rows, dtype=torch.float64, device=self.device)
        assert weight_B.shape == (rows,), f"weights of shape {tuple(weight_B.shape)} for {rows} rows"
        weight_B = weight_B.detach().to(self.device, torch.float64)

        logit_ok_TB = torch.isfinite(logits_TB)
        label_ok_TB = (labels_TB >= 0) & (labels_TB <= 1)
        weight_ok_B = (weight_B >= 0) & torch.isfinite(weight_B)
        counts_B = weight_B != 0
        good_TB = logit_ok_TB & label_ok_TB & (weight_ok_B & counts_B)
        # nan * 0 is nan: what is left out is replaced, not multiplied away.
        logits_TB = torch.where(good_TB, logits_TB, 0.0)
        labels_TB = torch.where(good_TB, labels_TB, 0.0)
        weight_TB = torch.where(good_TB, weight_B, 0.0)

        positive_TB = weight_TB * labels_TB
        bins_TB = bin_of(logits_TB, self.bits)
        histogram_T2H, sums_TS = self._views()
        histogram_T2H[:, 0].scatter_add_(1, bins_TB, positive_TB)
        histogram_T2H[:, 1].scatter_add_(1, bins_TB, weight_TB - positive_TB)

        x_TB = logits_TB.double()
        e_TB = torch.exp(-x_TB.abs())  # <= 1: nothing below overflows
        loss_TB = x_TB.clamp(min=0) - x_TB * labels_TB + torch.log1p(e_TB)
        prediction_TB = torch.where(x_TB >= 0, 1.0, e_TB) / (1 + e_TB)
        sums_TS += torch.stack(
            [
                (weight_TB * loss_TB).sum(1),
                (weight_TB * prediction_TB).sum(1),
                positive_TB.sum(1),
                weight_TB.sum(1),
                good_TB.sum(1),
                (~logit_ok_TB & counts_B).sum(1),
                (~label_ok_TB & counts_B).sum(1),
                (~weight_ok_B).sum().expand(len(self.tasks)),
            ],
            dim=1,
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> "Metrics":
        """The metrics of all ranks, on every rank, as a new object; the running state stays this rank's own.

        A collective of `group` (default: all ranks); without a process group a plain copy.
        """
        total = Metrics(self.tasks, self.device, bits=self.bits)
        total._state.copy_(self._state)
        if dist.is_available() and dist.is_initialized():
            if dist.get_backend(group) == "nccl" and self.device.type == "cpu":
                total._state = total._state.cuda()  # NCCL moves nothing else
            dist.all_reduce(total._state, group=group)
        return total

    def compute(self) -> dict[str, Any]:
        """The figures, ready for JSON: those of the first task, and all tasks' under "tasks".

        None where a figure is not defined: AUC and NE without both positives and negatives, calibration without
        positives, everything but rows without rows.
        Raises FloatingPointError when logits were not finite, UserError for labels or weights that cannot be counted.
        """
        histogram_T2H, sums_TS = (part.cpu().numpy() for part in self._views())
        figures = {}
        for t, task in enumerate(self.tasks):
            sums = dict(zip(_SUMS, sums_TS[t].tolist(), strict=True))
            _refuse_bad_rows(task, sums)
            figures[task] = _figures(histogram_T2H[t, 0], histogram_T2H[t, 1], sums, self.bits)
        return {**figures[self.tasks[0]], "tasks": figures}

    def reset(self) -> None:
        self._state.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks), "bits": self.bits, "state": self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert list(state["tasks"]) == list(self.tasks) and state["bits"] == self.bits, "state of other metrics"
        self._state.copy_(state["state"])

    def _views(self) -> tuple[Tensor, Tensor]:
        """histogram_T2H (0: positives, 1: negatives) and sums_TS, both views of the state."""
        tasks, bins = len(self.tasks), 2**self.bits
        split = tasks * 2 * bins
        return self._state[:split].view(tasks, 2, bins), self._state[split:].view(tasks, len(_SUMS))


def bin_of(logits: Tensor, bits: int) -> Tensor:
    """The bin of each finite float32 logit, int64 in 0 .. 2**bits - 1; a larger logit never has a smaller bin.

    The bit pattern of a non-negative float32, read as an integer, grows with its value; its top bits are the octave and
    the leading mantissa bits. Example with bits=18: 1.0 -> 196608, 1.0002 -> 196608, 1.0003 -> 196609, -1.0 -> 65535,
    0.0 and -0.0 -> 131072.
    """
    magnitude = logits.contiguous().view(torch.int32) & 0x7FFFFFFF
    level = (magnitude.clamp_(_SMALLEST, _LARGEST) - _SMALLEST) >> (_MANTISSA + _OCTAVE_BITS - bits)
    # ~level = -1 - level mirrors the negatives; the comparison, not the sign bit, keeps -0.0 beside 0.0.
    return torch.where(logits < 0, ~level, level).long() + 2 ** (bits - 1)


def logit_of(bits: int) -> np.ndarray:
    """The middle of every bin, float64 of shape (2**bits,): a logit in the bin is within 2**(5 - bits) of it, relative.

    (Not so in the innermost and outermost bins, where sigmoid is flat: docs/metrics.md.)
    """
    shift = _MANTISSA + _OCTAVE_BITS - bits
    pattern = _SMALLEST + (np.arange(2 ** (bits - 1), dtype=np.int64) << shift) + (1 << shift >> 1)
    positive = pattern.astype(np.int32).view(np.float32).astype(np.float64)
    return np.concatenate([-positive[::-1], positive])


def _by_task(tensor: Tensor, tasks: int, device: torch.device) -> Tensor:
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(1)
    assert tensor.dim() == 2 and tensor.shape[1] == tasks, f"shape {tuple(tensor.shape)} for {tasks} tasks"
    return tensor.detach().to(device).t()


def _refuse_bad_rows(task: str, sums: Mapping[str, float]) -> None:
    if sums["bad_logits"]:
        raise FloatingPointError(
            f"task {task!r}: {sums['bad_logits']:.0f} rows have a logit that is not finite (NaN or infinite), so no "
            "metric means anything: the model has diverged; lower the learning rate, clip gradients or go back to an "
            "earlier checkpoint"
        )
    if sums["bad_labels"]:
        raise UserError(
            f"task {task!r}: {sums['bad_labels']:.0f} rows have a label outside [0, 1]; AUC and log loss need 0 for no "
            "and 1 for yes: give prepare a threshold on the column"
        )
    if sums["bad_weights"]:
        raise UserError(f"task {task!r}: {sums['bad_weights']:.0f} rows have a weight that is negative or not finite")


def _figures(positive_H: np.ndarray, negative_H: np.ndarray, sums: Mapping[str, float], bits: int) -> dict[str, Any]:
    weight = sums["weight"]
    base_rate = sums["label"] / weight if weight else 0.0
    logloss = sums["loss"] / weight if weight else None
    entropy = _entropy(base_rate)
    auc, bound = _auc(positive_H, negative_H)
    return {
        "auc": auc,
        "auc_error_bound": bound,
        "ne": logloss / entropy if weight and entropy else None,
        "logloss": logloss,
        "calibration": sums["prediction"] / sums["label"] if sums["label"] else None,
        "rows": int(sums["rows"]),
        "base_rate": base_rate if weight else None,
        "calibration_bins": _calibration_bins(positive_H, negative_H, bits),
    }


def _auc(positive_H: np.ndarray, negative_H: np.ndarray) -> tuple[float | None, float | None]:
    """(AUC, how far from it the true one can be): pairs in different bins are exact, pairs in one bin count half."""
    positives, negatives = positive_H.sum(), negative_H.sum()
    if positives <= 0 or negatives <= 0:
        return None, None
    undecided = float(positive_H @ negative_H)
    below_H = np.cumsum(negative_H) - negative_H
    decided = float(positive_H @ below_H)
    pairs = float(positives * negatives)
    return (decided + undecided / 2) / pairs, undecided / 2 / pairs


def _entropy(rate: float) -> float:
    """Of a coin, in nats; 0 where it is certain."""
    if not 0 < rate < 1:
        return 0.0
    return -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _calibration_bins(positive_H: np.ndarray, negative_H: np.ndarray, bits: int) -> list[dict[str, float]]:
    """About 20 groups of neighbouring bins of equal weight: mean prediction, mean label, weight."""
    weight_H = positive_H + negative_H
    (used,) = np.nonzero(weight_H)
    if not used.size:
        return []
    weight, positive = weight_H[used], positive_H[used]
    prediction = 1 / (1 + np.exp(-np.clip(logit_of(bits)[used], -700, 700)))
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    group = np.minimum((middle * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    total, predicted, actual = (
        np.bincount(group, values, CALIBRATION_BINS) for values in (weight, weight * prediction, positive)
    )
    return [
        {"predicted": float(p / w), "actual": float(a / w), "weight": float(w)}
        for w, p, a in zip(total, predicted, actual, strict=True)
        if w > 0
    ]


class Durations:
    """Percentiles of any number of durations in constant memory (100 KB): a histogram with bins 0.2% wide.

    A percentile is within 0.1% of the exact one (and exact at the smallest and largest duration) for durations from a
    microsecond to a day.
    """

    _FIRST = 1e-6  # seconds
    _RATIO = math.log(1.002)
    _BINS = math.ceil(math.log(86400 / 1e-6) / math.log(1.002))

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0  # seconds
        self._smallest, self._largest = math.inf, 0.0
        self._counts = np.zeros(self._BINS, dtype=np.int64)

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self._smallest = min(self._smallest, seconds)
        self._largest = max(self._largest, seconds)
        at = int(math.log(max(seconds, self._FIRST) / self._FIRST) / self._RATIO)
        self._counts[min(at, self._BINS - 1)] += 1

    def percentile(self, q: float) -> float | None:
        """Seconds that q percent of the durations do not exceed (the smallest such duration); None without any."""
        if not self.count:
            return None
        rank = max(1, math.ceil(q / 100 * self.count))
        if rank in (1, self.count):
            return self._smallest if rank == 1 else self._largest
        at = int(np.searchsorted(np.cumsum(self._counts), rank))
        return self._FIRST * math.exp((at + 0.5) * self._RATIO)


class StepTimer:
    """Step times, throughput and where the time of a step goes, in constant memory."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.samples = 0
        self._step = Durations()
        self._phases: dict[str, Durations] = {}

    def add(self, *, seconds: float, samples: int, phases: Mapping[str, float] | None = None) -> None:
        """One step: its wall time, the rows of the global batch, and the seconds of its parts.

        What the parts leave of `seconds` becomes the part "other".
        """
        self.samples += samples
        self._step.add(seconds)
        if phases is not None:
            for name, part in {**phases, "other": max(0.0, seconds - sum(phases.values()))}.items():
                self._phases.setdefault(name, Durations()).add(part)

    @property
    def seconds(self) -> float:
        return self._step.total

    def summary(self) -> dict[str, Any]:
        """{"seconds", "samples_per_second", "step_ms": {"p50", "p90", "p99"}, "phases_ms": median of each part}."""
        seconds = self._step.total
        return {
            "seconds": seconds,
            "samples_per_second": self.samples / seconds if seconds else None,
            "step_ms": {f"p{q}": _ms(self._step.percentile(q)) for q in (50, 90, 99)},
            "phases_ms": {name: _ms(phase.percentile(50)) for name, phase in self._phases.items()},
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # ru_maxrss also counts what the launcher held when it forked this process; VmHWM starts anew.
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
