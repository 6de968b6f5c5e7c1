"""The `tablemesh` command. `tablemesh --help` must answer at once, so torch is imported inside the commands alone."""

import errno
import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from kernels.errors import UserError
from launch import ckpt, cli_jobs
from trainer import quiet

app = typer.Typer(
    name="tablemesh",
    help="Trains recommendation models whose embedding tables do not fit one device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # an error of our own gets Python's traceback: shorter, and copied without frames
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure a part of tablemesh beside its baseline.", no_args_is_help=True)
app.add_typer(bench, name="bench")
for command in (cli_jobs.submit, cli_jobs.status, cli_jobs.logs, cli_jobs.cancel):
    app.command()(command)
app.add_typer(ckpt.app, name="ckpt")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Nproc = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Ranks to start; default: train.nproc of the config.")
]
Split = Annotated[str | None, typer.Option(help="train, valid or test; default: the config's final split.")]


def main() -> None:
    """Entry point: runs a command, turns a UserError into `error:` lines and exit code 2."""
    quiet.install()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # whoever stops us stops the ranks in good order
        signal.signal(number, signal.default_int_handler)
    try:
        app(standalone_mode=True)
    except UserError as error:
        _leave("user", str(error), 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _leave("user", f"the disk is full{where}; make room and try again", 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # 130 is what Typer makes of an interrupt
            raise
        _leave("interrupted", "stopped by Ctrl-C or SIGTERM", 1)


def _leave(kind: str, message: str, exit_code: int) -> None:
    print_error(message)
    if "--json" in sys.argv[1:]:
        print_json({"error": {"rank": None, "kind": kind, "message": message}})
    sys.exit(exit_code)


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="synthetic:criteo, synthetic:zipf4, criteo:PATH, or a file, folder or glob of CSV, TSV or Parquet."
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="Dataset folder to make.")],
    spec: Annotated[Path | None, typer.Option(help="TOML that says what the columns are (docs/data.md).")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Synthetic: rows to make. criteo: rows of a hashed table.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of synthetic data and of random splits.")] = None,
    scale: Annotated[float | None, typer.Option(help="synthetic:criteo: factor on the cardinalities.")] = None,
    valid: Annotated[
        list[str] | None, typer.Option(help="A share such as 0.1, or a file, glob or folder; repeatable.")
    ] = None,
    test: Annotated[list[str] | None, typer.Option(help="Likewise for the test split.")] = None,
    bad_rows: Annotated[
        float | None, typer.Option(min=0, max=1, help="Stop when more than this share of lines is malformed.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="A dataset prepared earlier: the same ids and numbers for new rows; labels may be missing."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Any other option as name=value (docs/data.md); repeatable.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what is at DEST.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a source into a dataset folder: Parquet files and dataset.json."""
    from launch import dataset as datasets
    from trainer import prepare as preparing

    console = _console(as_json)
    options: dict[str, Any] = {"rows": rows, "seed": seed, "scale": scale, "max_rejected": bad_rows}
    options["like"] = None if like is None else str(like)
    options |= {name: _one_or_many(value) for name, value in (("valid", valid), ("test", test)) if value}
    options |= dict(_name_and_value(text) for text in option or [])
    if replace:
        options["existing"] = "replace"
    given = {name: value for name, value in options.items() if value is not None}
    dataset = datasets.prepare(console, source, dest, spec=spec, options=given)
    if as_json:
        print_json(dataset.model_dump(mode="json"))
    else:
        console.print(preparing.summary(dataset))
        for text in preparing.warnings(dataset):
            console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
        console.print(f"{dest}: " + ", ".join(f"{s.rows:,} {name} rows" for name, s in dataset.splits.items()))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML config, such as configs/quickstart.toml, or a run to resume.")],
    nproc: Nproc = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Go on in the same run folder from its newest valid checkpoint (the beginning where there is none), "
            "or from a checkpoint's path.",
        ),
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="RUN|PATH", help="A run or checkpoint whose weights a new run begins with.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder; default: the config's name.")] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="A plan.json, of a run or of `tablemesh plan --out`, to take as it is."),
    ] = None,
    scheduler: Annotated[str, typer.Option(help="Where to run: a kind in launch/schedulers/.")] = "local",
    module: Annotated[
        str, typer.Option(hidden=True, help="What each rank runs: `python -m MODULE JOB.json`.")
    ] = "trainer",
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps and print where their time went.")
    ] = False,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Restarts after a failure, from the newest valid checkpoint.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model and evaluate it; prepares the data first where the config says how."""
    from launch import dataset, follow, job, progress, rundir
    from trainer import config as configs

    console = _console(as_json)
    overrides = [*(set_ or []), *([f"name={json.dumps(name)}"] if name else [])]
    if plan_file is not None:
        if not plan_file.is_file():
            raise UserError(f"--plan {plan_file}: no such file; `tablemesh plan {config} --out {plan_file}` writes one")
        overrides.append(f"plan.file={json.dumps(str(plan_file))}")
    overrides += [] if max_restarts is None else [f"run.max_restarts={max_restarts}"]
    if init_from is not None:
        overrides.append(f"checkpoint.init_from={json.dumps(_resume_from(init_from))}")
    run_dir = None
    if config.is_dir():
        run_dir = rundir.find(config)
        if resume is None:
            raise UserError(f"{config} is a run; `tablemesh train {config} --resume auto` goes on with it")
    resolved = configs.load(run_dir / "config.toml" if run_dir else config, overrides)
    if resume is not None and run_dir is None:
        run_dir = rundir.newest(resolved.run.dir, resolved.name)
    nproc = nproc or resolved.train.nproc
    resolved.check_world_size(nproc)
    starter = _scheduler(scheduler)
    if dry_run:
        where = run_dir or resolved.run.dir / resolved.name
        work = job.make(
            name=resolved.name,
            action="train",
            run_dir=where,
            nproc=nproc,
            module=module,
            grace=resolved.run.grace_seconds,
            max_restarts=resolved.run.max_restarts,
        )
        text = starter.request(work)
        if as_json:
            print_json({"request": text})
        else:
            console.print(escape(text), end="", soft_wrap=True, highlight=False)
        return
    dataset.prepare_missing(console, resolved)
    if run_dir is None:
        run_dir = rundir.create(resolved.run.dir, resolved.name)
    else:
        rundir.reopen(run_dir, resolved)
    (run_dir / "config.toml").write_text(resolved.located().to_toml())
    work = job.make(
        name=run_dir.name,
        action="train",
        run_dir=run_dir,
        nproc=nproc,
        module=module,
        grace=resolved.run.grace_seconds,
        max_restarts=resolved.run.max_restarts,
        values=({"resume": _resume_from(resume)} if resume else {}) | ({"profile": True} if profile else {}),
    )
    started, began = time.time(), time.monotonic()
    ended = follow.run(work, starter, progress.make(console))
    if ended is not None:
        print_failure(ended)
        try:
            rundir.close(run_dir, name=run_dir.name, world_size=nproc, started=started, began=began, failure=ended)
        except UserError as error:
            print_error(f"and the report could not be written: {error}")
        if as_json:
            status = rundir.report(run_dir).get("status")
            print_json({"status": status, "error": ended.as_json(), "run_dir": str(run_dir)})
        raise typer.Exit(ended.exit_code)
    _print_run(run_dir, rundir.report(run_dir), run_dir / "report.html", as_json)
    if profile:
        _print_profile(run_dir, as_json)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="TOML config, such as configs/quickstart.toml.")],
    cluster: Annotated[
        str | None,
        typer.Option(help="PROFILE:HOSTSxRANKS, such as h100-80gb:16x8; default: this machine, train.nproc ranks."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="A dataset.json, or its folder, where the data is not at data.path.")
    ] = None,
    hbm: Annotated[str | None, typer.Option(help="Device memory of each rank to use, such as 60GiB.")] = None,
    host_mem: Annotated[str | None, typer.Option(help="Memory of each host to use for tables, such as 500GiB.")] = None,
    profiles: Annotated[Path | None, typer.Option(help="TOML with [profiles.NAME] of clusters.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan there, for `train --plan`.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two of: auto, a sharding type, a plan.json, a cluster."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of the config; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say where the tables would go on a cluster, whether they fit, and what a step would take; exit code 1 if not."""
    from launch import plan as plans
    from launch import plan_view
    from trainer import config as configs
    from trainer import report as reports

    resolved = configs.load(config, set_ or [])
    asked = plans.make(resolved, dataset=dataset, cluster=cluster, hbm=hbm, host_mem=host_mem, profiles=profiles)
    console = _console(as_json)
    if compare is not None:
        sides = plans.compare(asked, *compare)
        if as_json:
            print_json(sides)
        else:
            plan_view.show_comparison(sides, console)
        return
    found = plans.answer(asked)
    if out is not None and found["feasible"]:
        if not out.resolve().parent.is_dir():
            raise UserError(f"--out {out}: the folder {out.parent} does not exist")
        reports.write_json(out.resolve().parent, found["plan"], name=out.name)
    if as_json:
        print_json(found)
    else:
        plan_view.show(found, console)
    if not found["feasible"]:
        raise typer.Exit(1)


@app.command("eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/latest.")],
    data: Annotated[Path | None, typer.Option(help="Another dataset folder than the run's own.")] = None,
    split: Split = None,
    nproc: Nproc = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trained model on all rows of a split."""
    result = _on_run(run, "eval", nproc, as_json, {"dataset": data, "split": split})
    if as_json:
        print_json(result)
    else:
        _print_figures(_console(False), {"eval": result, "bayes": result.get("bayes")})


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/latest.")],
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write, or to replace when all is done.")],
    split: Split = None,
    nproc: Nproc = None,
    as_json: Json = False,
) -> None:
    """Write a trained model's predictions to a Parquet file."""
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the Parquet file to write in it")
    result = _on_run(run, "predict", nproc, as_json, {"dataset": dataset, "out": out.resolve(), "split": split})
    if as_json:
        print_json(result)
    else:
        _console(False).print(f"{result.get('rows', 0):,} predictions in {out}", highlight=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/latest.")], as_json: Json = False
) -> None:
    """Write a run's report.html again and print its key figures."""
    from launch import rundir
    from trainer import report as reports

    run_dir = rundir.find(run)
    page = reports.write_html(run_dir)
    _print_run(run_dir, rundir.report(run_dir), page, as_json)


@app.command("compare-tables")
def compare_tables(
    config: Annotated[Path, typer.Argument(help="TOML config, such as configs/zipf4.toml.")],
    budget: Annotated[
        str, typer.Option(help="Byte budgets, as shares of one standard table each, separated by commas.")
    ] = "1,0.5,0.25,0.1",
    kinds: Annotated[
        str, typer.Option(help="Table kinds, separated by commas; options after colons: unified:lookups=2.")
    ] = "standard,hashed,compositional,mixed_dim,unified,unified:lookups=2",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds from the config's seed on.")] = 3,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Trained beside each other; default: one for each core.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; what it holds is not trained again.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every table kind at every byte budget with several seeds; a table and a plot, as HTML and JSON."""
    from launch import dataset as datasets
    from launch import figures, machine, progress
    from trainer import compare
    from trainer import config as configs
    from trainer.data.parquet import open_dataset

    console = _console(as_json)
    resolved = configs.load(config, set_ or [])
    budgets = _shares(budget)
    datasets.prepare_missing(console, resolved)
    dataset = open_dataset(resolved.data.path, resolved.data.features)
    asked = list(dict.fromkeys(kind.strip() for kind in kinds.split(",") if kind.strip()))
    cells, refused = compare.plan_cells(resolved, dataset, kinds=asked, budgets=budgets, seeds=seeds)
    folder = out or resolved.run.dir / f"{resolved.name}-compare"
    folder.mkdir(parents=True, exist_ok=True)
    processes = processes or machine.cores()
    threads = max(1, machine.cores() // processes)
    display = progress.make(console)
    try:
        rows = compare.run_cells(cells, folder, processes=processes, threads=threads, progress=display.work)
    finally:
        display.close()
    found = compare.result(resolved, dataset, rows, refused, compare.full_bytes(resolved, dataset))
    page = compare.write(folder, found)
    if as_json:
        print_json(found | {"report_html": str(page)})
    else:
        console.print(figures.comparison(found))
        for one in refused:
            console.print(f"left out: {one['kind']} at {one['budget']:g}: {escape(one['why'])}", highlight=False)
        console.print(f"comparison: [link=file://{page}]{escape(_shown(page))}[/link]", soft_wrap=True, highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine and what is installed; exit code 1 when something has to be fixed."""
    from launch import doctor as examination

    checks = examination.examine()
    if as_json:
        print_json(examination.as_json(checks))
    else:
        examination.show(checks, _console(False))
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


@app.command()
def chaos(
    config: Annotated[Path, typer.Argument(help="TOML config of a short run, such as configs/quickstart.toml.")],
    kill_at: Annotated[
        int | None, typer.Option(min=1, help="Step at which a rank is struck; default: the middle one.")
    ] = None,
    signal_: Annotated[
        str, typer.Option("--signal", help="KILL, SEGV, ABRT; TERM, USR1 (save and stop); STOP, HANG (stand still).")
    ] = "KILL",
    during: Annotated[
        str, typer.Option(help="step, save, eval or data: the first of these at or after --kill-at.")
    ] = "step",
    rank: Annotated[int | None, typer.Option(min=0, help="The rank that is struck; default: a random one.")] = None,
    world: Annotated[
        str | None, typer.Option(metavar="2->1", help="Ranks before and after; default: train.nproc, unchanged.")
    ] = None,
    kills: Annotated[
        int | None, typer.Option("--soak", min=1, metavar="N", help="N kills at random points instead of one.")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="--soak: kills in one run at most.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random here.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train twice, once with ranks that die, and compare weights, optimizer state and rows seen; 1 when they differ."""
    import random

    from launch import chaos as chaotic
    from launch import dataset, progress
    from trainer import config as configs

    console = _console(as_json)
    resolved = configs.load(config, set_ or [])
    worlds = chaotic.Worlds.parse(world, resolved.train.nproc)
    if kills is not None and (worlds.change or signal_ in chaotic.SAVING):
        raise UserError("--soak: is for signals that the ranks are restarted after, and for the same number of ranks")
    dataset.prepare_missing(console, resolved)
    trial = chaotic.Chaos(resolved, worlds, _scheduler("local"), progress.make(console), signal=signal_)
    if kills is None:
        rng = random.Random(seed)
        fault = trial.fault(step=kill_at or max(1, trial.steps // 2), during=during, rng=rng, rank=rank)
        outcomes = [trial.disturb([fault])]
        if not outcomes[0].struck:
            raise UserError(f"--kill-at {fault.step} --during {during}: the run had no {during} at or after this step")
    else:

        def note(outcome: Any, struck: int) -> None:
            console.print(f"{struck} of {kills} kills: {chaotic.sentence(outcome)}", highlight=False, soft_wrap=True)

        outcomes = chaotic.soak(trial, kills, seed=seed, each=each, note=note)
    found = chaotic.summary(trial, outcomes)
    if as_json:
        print_json(found)
    else:
        chaotic.show(found, console)
    if not found["ok"]:
        raise typer.Exit(1)


@bench.command("data")
def bench_data(as_json: Json = False) -> None:
    """Rows per second of prepare and of the loader, beside pyarrow's own decode of the same files."""
    from benchmarks import data

    raise typer.Exit(data.main(json=as_json) or 0)


@bench.command("kernels")
def bench_kernels(
    as_json: Json = False,
    device: Annotated[str, typer.Option("--device", help='"cpu", or "cuda": the Triton kernels, on a GPU.')] = "cpu",
) -> None:
    """The embedding kernels beside FBGEMM's, torch.nn.EmbeddingBag and a plain gather loop (on a GPU: a copy)."""
    from benchmarks import gpu_kernels, kernels

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r}: there are cpu and cuda", param_hint="--device")
    raise typer.Exit((gpu_kernels.main(as_json=as_json) if device == "cuda" else kernels.main(json=as_json)) or 0)


@bench.command("plan")
def bench_plan(
    measure: Annotated[
        bool, typer.Option("--measure", help="Predicted steps beside measured ones instead, on this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The slowest rank's step under our plans, beside TorchRec's planner given the same topology."""
    from benchmarks import measured, plan

    raise typer.Exit((measured if measure else plan).main(json=as_json) or 0)


@bench.command("calibrate")
def bench_calibrate(
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks that work at once; default 2, or 1 on one core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine for the planner and keep the result, which a plan for the same number of ranks then uses."""
    from benchmarks import calibrate

    raise typer.Exit(calibrate.main(nproc=nproc, json=as_json) or 0)


@bench.command("step")
def bench_step(as_json: Json = False) -> None:
    """A whole training step beside stock TorchRec's, on one rank and on two."""
    from benchmarks import step

    raise typer.Exit(step.main(json=as_json) or 0)


Scale = Annotated[float, typer.Option(help="Factor on the rows of the tables.")]


@bench.command("rmc1")
def bench_rmc1(scale: Scale = 0.01, as_json: Json = False) -> None:
    """A training step of RMC1 (small): latency, samples/s and the share of each kind of work."""
    _bench_rmc("rmc1", scale, as_json)


@bench.command("rmc2")
def bench_rmc2(scale: Scale = 0.01, as_json: Json = False) -> None:
    """The same of RMC2, dominated by look-ups."""
    _bench_rmc("rmc2", scale, as_json)


@bench.command("rmc3")
def bench_rmc3(scale: Scale = 0.01, as_json: Json = False) -> None:
    """The same of RMC3, dominated by its layers."""
    _bench_rmc("rmc3", scale, as_json)


def _bench_rmc(name: str, scale: float, as_json: bool) -> None:
    from benchmarks import rmc

    raise typer.Exit(rmc.main(name, scale=scale, json=as_json) or 0)


@bench.command("ckpt")
def bench_ckpt(
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; default: the temporary folder.")] = None,
    gigabytes: Annotated[float, typer.Option(min=0.001, help="Size of the made-up model.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Saving and restoring beside a plain write and read of the same bytes; the step's pause; the size of a delta."""
    from benchmarks import ckpt as bench_of_ckpt

    raise typer.Exit(bench_of_ckpt.main(json=as_json, folder=folder, gigabytes=gigabytes) or 0)


@bench.command("idmap")
def bench_id_map(as_json: Json = False) -> None:
    """Ids to rows: look-ups and admissions per second, beside TorchRec's managed collision."""
    from benchmarks import id_map

    raise typer.Exit(id_map.main(json=as_json) or 0)


def print_error(message: str) -> None:
    """`error:` and the message in red on stderr, further lines indented under it."""
    first, *rest = message.strip().splitlines() or ["unknown"]
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/bold red] {escape(first)}", soft_wrap=True, highlight=False)
    for line in rest:
        console.print(f"       {escape(line)}", soft_wrap=True, highlight=False)


def print_failure(failure: Any) -> None:
    """Why a job ended early, and where the whole story is."""
    details = f"\nthe whole story: {_shown(failure.details)}" if failure.details else ""
    print_error(failure.message + details)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str), flush=True)


def _console(as_json: bool) -> Console:
    """Where progress goes: stdout belongs to the JSON object where one was asked for."""
    return Console(stderr=as_json)


def _scheduler(kind: str) -> Any:
    from kernels import registry

    return registry.load("launch.schedulers", kind).Scheduler()


def _resume_from(resume: str) -> str:
    """A local path as the ranks find it from any folder."""
    return resume if resume == "auto" or "://" in resume else str(Path(resume).resolve())


def _on_run(run: Path, action: Any, nproc: int | None, as_json: bool, values: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of a finished run again for `eval` or `predict`; returns what rank 0 wrote."""
    from launch import follow, job, progress, rundir
    from trainer import config as configs

    run_dir = rundir.find(run)
    resolved = configs.load(run_dir / "config.toml")
    nproc = nproc or resolved.train.nproc
    resolved.check_world_size(nproc)
    result = run_dir / f"{action}.json"
    result.unlink(missing_ok=True)
    given = {key: str(value) for key, value in values.items() if value is not None}
    work = job.make(
        name=run_dir.name, action=action, run_dir=run_dir, nproc=nproc, values=given | {"result": str(result)}
    )
    ended = follow.run(work, _scheduler("local"), progress.make(_console(as_json)))
    if ended is not None:
        print_failure(ended)
        if as_json:
            print_json({"error": ended.as_json(), "run_dir": str(run_dir)})
        raise typer.Exit(ended.exit_code)
    return json.loads(result.read_text())


def _print_run(run_dir: Path, found: dict[str, Any], page: Path, as_json: bool) -> None:
    """The key figures of a run and the path of its report, or all of report.json and both paths."""
    if as_json:
        print_json(found | {"run_dir": str(run_dir), "report_html": str(page)})
    else:
        console = _console(False)
        _print_figures(console, found)
        console.print(f"report: [link=file://{page}]{escape(_shown(page))}[/link]", soft_wrap=True, highlight=False)


def _print_profile(run_dir: Path, as_json: bool) -> None:
    """Where rank 0's steps went, on stderr beside a JSON object; nothing was traced in a run of a few steps."""
    from launch import figures

    file = run_dir / "profile" / "summary_0.json"
    if not file.exists():
        _console(as_json).print("too few steps to profile: the first ones are left out", highlight=False)
        return
    found = json.loads(file.read_text())
    _console(as_json).print(figures.profile(found))
    path = _shown(run_dir / found["trace"])
    _console(as_json).print(f"trace: {path} (open it in ui.perfetto.dev)", highlight=False, soft_wrap=True)


def _print_figures(console: Console, report: dict[str, Any]) -> None:
    from launch import figures

    console.print(figures.table(report))


def _shown(path: Path) -> str:
    """The path as a person would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _one_or_many(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values


def _shares(text: str) -> list[float]:
    """ "1,0.25" -> [1.0, 0.25]; UserError for what is not a number above 0."""
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(0.0)
        if not 0.0 < found[-1] < float("inf"):
            raise UserError(f"--budget {text!r}: {part!r} is not a share above 0; write it as --budget 1,0.5,0.25")
    return list(dict.fromkeys(found))


def _name_and_value(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"--set {text!r}: write it as --set name=value")
    return name.strip(), value.strip()


if __name__ == "__main__":
    main()
