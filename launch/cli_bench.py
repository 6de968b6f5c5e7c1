"""`tablemesh bench ...`: a part of tablemesh beside its baseline. Each command's work is a module of benchmarks/."""

from pathlib import Path
from typing import Annotated

import typer

from launch.terminal import Json

app = typer.Typer(help="Measure a part of tablemesh beside its baseline.", no_args_is_help=True)


@app.command("data")
def bench_data(as_json: Json = False) -> None:
    """Rows per second of prepare and of the loader, beside pyarrow's own decode of the same files."""
    from benchmarks import data

    raise typer.Exit(data.main(json=as_json) or 0)


@app.command("kernels")
def bench_kernels(
    as_json: Json = False,
    device: Annotated[str, typer.Option("--device", help='"cpu", or "cuda": the Triton kernels, on a GPU.')] = "cpu",
) -> None:
    """The embedding kernels beside FBGEMM's, torch.nn.EmbeddingBag and a plain gather loop (on a GPU: a copy)."""
    from benchmarks import gpu_kernels, kernels

    on_gpu = _device(device) == "cuda"
    raise typer.Exit((gpu_kernels.main(as_json=as_json) if on_gpu else kernels.main(json=as_json)) or 0)


@app.command("plan")
def bench_plan(
    measure: Annotated[
        bool, typer.Option("--measure", help="Predicted steps beside measured ones instead, on this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The slowest rank's step under our plans, beside TorchRec's planner given the same topology."""
    from benchmarks import measured, plan

    raise typer.Exit((measured if measure else plan).main(json=as_json) or 0)


@app.command("scaling")
def bench_scaling(
    curves: Annotated[
        Path | None, typer.Option(help="An SVG: MLPerf's model simulated on 8 to 4,096 GPUs, instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulated steps on GPU clusters beside published throughputs; nothing is run (docs/scaling.md)."""
    from benchmarks import scaling

    raise typer.Exit(scaling.main(curves=curves, json=as_json) or 0)


@app.command("calibrate")
def bench_calibrate(
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks that work at once; default 2, or 1 on one core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine for the planner and keep the result, which a plan for the same number of ranks then uses."""
    from benchmarks import calibrate

    raise typer.Exit(calibrate.main(nproc=nproc, json=as_json) or 0)


@app.command("step")
def bench_step(as_json: Json = False) -> None:
    """A whole training step beside stock TorchRec's, on one rank and on two."""
    from benchmarks import step

    raise typer.Exit(step.main(json=as_json) or 0)


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: there are cpu and cuda", param_hint="--device")
    return name


Scale = Annotated[float, typer.Option(help="Factor on the rows of the tables.")]


@app.command("rmc1")
def bench_rmc1(scale: Scale = 0.01, as_json: Json = False) -> None:
    """A training step of RMC1 (small): latency, samples/s and the share of each kind of work."""
    _bench_rmc("rmc1", scale, as_json)


@app.command("rmc2")
def bench_rmc2(scale: Scale = 0.01, as_json: Json = False) -> None:
    """The same of RMC2, dominated by look-ups."""
    _bench_rmc("rmc2", scale, as_json)


@app.command("rmc3")
def bench_rmc3(scale: Scale = 0.01, as_json: Json = False) -> None:
    """The same of RMC3, dominated by its layers."""
    _bench_rmc("rmc3", scale, as_json)


def _bench_rmc(name: str, scale: float, as_json: bool) -> None:
    from benchmarks import rmc

    raise typer.Exit(rmc.main(name, scale=scale, json=as_json) or 0)


@app.command("ckpt")
def bench_ckpt(
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; default: the temporary folder.")] = None,
    gigabytes: Annotated[float, typer.Option(min=0.001, help="Size of the made-up model.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Saving and restoring beside a plain write and read of the same bytes; the step's pause; the size of a delta."""
    from benchmarks import ckpt as bench_of_ckpt

    raise typer.Exit(bench_of_ckpt.main(json=as_json, folder=folder, gigabytes=gigabytes) or 0)


@app.command("idmap")
def bench_id_map(
    as_json: Json = False,
    device: Annotated[str, typer.Option("--device", help='"cpu", or "cuda": the Triton map, on a GPU.')] = "cpu",
) -> None:
    """Ids to rows: look-ups and admissions per second, beside TorchRec's managed collision."""
    from benchmarks import id_map

    raise typer.Exit(id_map.main(json=as_json, device=_device(device)) or 0)
