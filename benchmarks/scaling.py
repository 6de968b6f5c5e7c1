"""`tablemesh bench scaling`: the simulated step beside published throughputs of training runs on GPUs.

Nothing is run: every row is a model, a cluster and a program that somebody published a throughput of, and what
sharding/simulate.py says of it.  A row is correct when the two are within TOLERANCE.  docs/scaling.md discusses them.

Two constants are fitted, both to the rows marked `fitted`: the host's time to launch an eager step
(sharding/topology.py: launch_seconds) and ROW_SECONDS.  All other rows are held out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.base import Row, report
from benchmarks.plan import CRITEO, MULTI_HOT
from sharding import topology
from sharding.simulate import Program, Step, point
from sharding.topology import Topology
from sharding.work import DenseWork, TableLoad, Work
from trainer.dense_work import dense_work
from trainer.models import dcn, dlrm
from trainer.models.base import ModelInputs

TOLERANCE = 0.2
DIM = 128
# What the host of the example's training process spends on each of a rank's rows: it cuts its batches out of numpy
# arrays itself, in the loop.  tablemesh reads ahead in threads and has no such term.  Fitted to the `fitted` rows.
ROW_SECONDS = 4.3e-6
EXAMPLE = Program(name="TorchRec's example", row_seconds=ROW_SECONDS)  # facebookresearch/dlrm: torchrec_dlrm, 2022
HUGECTR = Program(name="HugeCTR", graphed=True)  # its own loader and kernels, the step in a CUDA graph


@dataclass(frozen=True, kw_only=True)
class Published:
    """samples_per_second: as published, in `source`.  state: bytes of optimizer state of a weight.  ids: per bag."""

    name: str
    model: str
    cluster: str
    batch_size: int
    samples_per_second: float
    program: Program
    source: str
    state: int
    ids: tuple[int, ...] = (1,) * 26
    bf16: bool = False
    fitted: bool = False

    def work(self) -> Work:
        element = 2 if self.bf16 else 4
        tables = [
            TableLoad(name=f"C{i + 1}", rows=rows, dim=DIM, ids=float(n), state_per_row=0, state_per_column=self.state)
            for i, (rows, n) in enumerate(zip(CRITEO, self.ids, strict=True))
        ]
        dense = replace(dense_of(self.model), state_per_parameter=self.state)
        return Work(
            tables=tuple(tables), batch_size=self.batch_size, dense=dense, bf16=self.bf16, vector_element=element
        )

    def topology(self) -> Topology:
        return topology.parse(self.cluster)

    def step(self) -> Step:
        found = point(self.work(), self.topology(), program=self.program).step
        assert found is not None, self.name
        return found


README = "facebookresearch/dlrm, torchrec_dlrm/README.MD: AWS p4d.24xlarge, Criteo 1 TB, one id a bag, float32"
ON_8_A100: dict[str, Any] = {"cluster": "a100-40gb:1x8", "program": EXAMPLE, "source": README}
ROWS = (
    Published(
        name="TorchRec DLRM, batch 2,048, SGD", model="dlrm", batch_size=2_048, samples_per_second=204_800, state=0,
        fitted=True, **ON_8_A100,
    ),
    Published(
        name="TorchRec DLRM, batch 16,384, Adagrad", model="dlrm", batch_size=16_384, samples_per_second=925_696,
        state=4, fitted=True, **ON_8_A100,
    ),
    Published(
        name="TorchRec DCNv2, batch 16,384, Adagrad", model="dcn", batch_size=16_384, samples_per_second=901_120,
        state=4, **ON_8_A100,
    ),
    Published(
        name="TorchRec DCNv2, batch 131,072, Adagrad", model="dcn", batch_size=131_072, samples_per_second=1_190_128,
        state=4, **ON_8_A100,
    ),
    Published(
        name="HugeCTR DCNv2, batch 135,168, multi-hot", model="dcn", cluster="h100-80gb:8x8", batch_size=135_168,
        samples_per_second=46.8e6, program=HUGECTR, source="MLPerf Training v3.1, NVIDIA, 64 x H100, 16-bit", state=4,
        ids=MULTI_HOT, bf16=True,
    ),
)  # fmt: skip


@cache
def dense_of(model: str) -> DenseWork:
    """The dense layers of configs/criteo_1tb_dlrm.toml or of configs/mlperf_dlrm_dcnv2.toml."""
    layers: dict[str, Any] = {"bottom": (512, 256, 128), "top": (1024, 1024, 512, 256, 1)}
    names = tuple(f"C{i + 1}" for i in range(len(CRITEO)))
    inputs = ModelInputs(dense=13, dims=(DIM,) * len(names), tasks=1, features=names)
    with torch.device("meta"):
        if model == "dlrm":
            net = dlrm.build(dlrm.Config(**layers), inputs)
        else:
            net = dcn.build(dcn.Config(**layers, cross_layers=3, rank=512), inputs)
    return dense_work(net, inputs, state_bytes_per_parameter=4)


def main(*, curves: Path | None = None, json: bool = False) -> int:
    """Simulate every row, print it; the exit code.  curves: an SVG of scaling to 4,096 GPUs, instead."""
    if curves is not None:
        from benchmarks import scaling_curves

        drawn, said = scaling_curves.draw(curves)
        return report("scaling", drawn, json=json, notes=tuple(said))
    rows, notes = [], []
    for published, step in simulated():
        ratio = published.batch_size / step.seconds / published.samples_per_second
        rows.append(
            Row(
                name=published.name,
                unit="samples/s simulated",
                ours=published.batch_size / step.seconds,
                baseline=published.samples_per_second,
                baseline_name="published",
                ratio=ratio,
                correct=abs(ratio - 1) <= TOLERANCE,
            )
        )
        paths = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in step.paths.items())
        held = "fitted to" if published.fitted else "held out"
        notes.append(f"{published.name}: {held}; ms: {paths}; published {1e3 * seconds_of(published):.2f}")
    return report("scaling", rows, json=json, notes=tuple(notes))


def simulated() -> Iterator[tuple[Published, Step]]:
    for published in ROWS:
        yield published, published.step()


def seconds_of(published: Published) -> float:
    """Seconds of a published step."""
    return published.batch_size / published.samples_per_second
