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
from launch import ckpt, cli_bench, cli_jobs, cli_plan, cli_trials, schedulers
from launch.terminal import Json, Set, console_for, print_error, print_failure, print_json, shown
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

    console = console_for(as_json)
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
    set_: Set = None,
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
    preflight: Annotated[
        bool,
        typer.Option("--preflight", help="Try a run on many ranks in this one process: batch, plan, memory, shapes."),
    ] = False,
    world_size: Annotated[int | None, typer.Option(min=1, help="With --preflight: how many ranks.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="With --preflight: PROFILE or PROFILE:HOSTSxRANKS; default h100-80gb.")
    ] = None,
    figures_of: Annotated[
        Path | None, typer.Option("--dataset", help="With --preflight: a dataset.json made elsewhere.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="With --preflight: whose part to build; default: the fullest.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model and evaluate it; prepares the data first where the config says how."""
    from launch import dataset, follow, job, progress, rundir
    from trainer import config as configs
    from trainer import report as reports

    console = console_for(as_json)
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
    if preflight:
        cli_plan.preflight(
            resolved, world_size=world_size, cluster=cluster, dataset=figures_of, rank=rank, as_json=as_json
        )
        return
    for option, value in (("--world-size", world_size), ("--cluster", cluster), ("--dataset", figures_of),
                          ("--rank", rank)):  # fmt: skip
        if value is not None:
            raise UserError(f"{option}: belongs to --preflight; a run takes --nproc, or `tablemesh submit`")
    if resume is not None and run_dir is None:
        run_dir = rundir.newest(resolved.run.dir, resolved.name)
    nproc = nproc or resolved.train.nproc
    resolved.check_world_size(nproc)
    starter = schedulers.named(scheduler)
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
    before = None
    if run_dir is None:
        run_dir = rundir.create(resolved.run.dir, resolved.name)
    else:
        before = rundir.reopen(run_dir, resolved)
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
    try:
        reports.write_text(run_dir / "config.toml", resolved.located().to_toml())
        ended = follow.run(work, starter, progress.make(console))
    except BaseException:  # a scheduler that refuses, Ctrl-C at once
        if before is not None and before.still():
            before.put_back()
        raise
    if ended is not None:
        would_meet_it_again = ended.exit_code in (2, 75) or ended.kind == "nan"
        print_failure(ended, way_out="" if would_meet_it_again else rundir.way_on(run_dir, resolved, nproc=nproc))
        given_up = ended.exit_code == 2 or ended.kind == "interrupted"
        refused = before is not None and given_up and before.still()
        others = before is not None and before.taken()
        try:
            if refused:
                before.put_back()
            elif not others:
                rundir.close(run_dir, name=run_dir.name, world_size=nproc, started=started, began=began, failure=ended)
        except UserError as error:
            print_error(f"and the report could not be written: {error}")
        if as_json:
            by_hand = "interrupted" if ended.kind == "interrupted" else "failed"
            status = by_hand if refused or others else rundir.report(run_dir).get("status")
            print_json({"status": status, "error": ended.as_json(), "run_dir": str(run_dir)})
        raise typer.Exit(ended.exit_code)
    _print_run(run_dir, rundir.report(run_dir), run_dir / "report.html", as_json)
    if profile:
        _print_profile(run_dir, as_json)


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
        _print_figures(console_for(False), {"eval": result, "bayes": result.get("bayes")})


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
        console_for(False).print(f"{result.get('rows', 0):,} predictions in {out}", highlight=False)


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


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine and what is installed; exit code 1 when something has to be fixed."""
    from launch import doctor as examination

    checks = examination.examine()
    if as_json:
        print_json(examination.as_json(checks))
    else:
        examination.show(checks, console_for(False))
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


def _resume_from(resume: str) -> str:
    """A local path as the ranks find it from any folder."""
    return resume if resume == "auto" or "://" in resume else str(Path(resume).resolve())


def _on_run(run: Path, action: Any, nproc: int | None, as_json: bool, values: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of a finished run again for `eval` or `predict`; returns what rank 0 wrote."""
    from launch import follow, job, progress, rundir
    from trainer import config as configs

    run_dir = rundir.find(run)
    rundir.check_writable(run_dir)
    resolved = configs.load(run_dir / "config.toml")
    nproc = nproc or resolved.train.nproc
    resolved.check_world_size(nproc)
    result = run_dir / f"{action}.json"
    result.unlink(missing_ok=True)
    given = {key: str(value) for key, value in values.items() if value is not None}
    work = job.make(
        name=run_dir.name, action=action, run_dir=run_dir, nproc=nproc, values=given | {"result": str(result)}
    )
    ended = follow.run(work, schedulers.named("local"), progress.make(console_for(as_json)))
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
        console = console_for(False)
        _print_figures(console, found)
        console.print(f"report: [link=file://{page}]{escape(shown(page))}[/link]", soft_wrap=True, highlight=False)


def _print_profile(run_dir: Path, as_json: bool) -> None:
    """Where rank 0's steps went, on stderr beside a JSON object; nothing was traced in a run of a few steps."""
    from launch import figures

    file = run_dir / "profile" / "summary_0.json"
    if not file.exists():
        console_for(as_json).print("too few steps to profile: the first ones are left out", highlight=False)
        return
    found = json.loads(file.read_text())
    console_for(as_json).print(figures.profile(found))
    path = shown(run_dir / found["trace"])
    console_for(as_json).print(f"trace: {path} (open it in ui.perfetto.dev)", highlight=False, soft_wrap=True)


def _print_figures(console: Console, report: dict[str, Any]) -> None:
    from launch import figures

    console.print(figures.table(report))


def _one_or_many(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values


def _name_and_value(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"--set {text!r}: write it as --set name=value")
    return name.strip(), value.strip()


app.command()(cli_plan.plan)
app.command()(cli_trials.compare_tables)
app.command()(cli_trials.chaos)
for command in (cli_jobs.submit, cli_jobs.status, cli_jobs.logs, cli_jobs.cancel):
    app.command()(command)
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(cli_bench.app, name="bench")

if __name__ == "__main__":
    main()
