"""The command as a user meets it: what it prints, where, and its exit codes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

from kernels.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE = "tests.launch.fake_rank"


def test_help_names_every_command(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("prepare", "train", "eval", "predict", "report", "doctor", "chaos", "bench"):
        assert re.search(rf"\b{name}\b", out)


def test_wrong_usage_is_2(command):
    assert command("train")[0] == 2
    assert command("trian", "x")[0] == 2
    assert command("train", "x", "--nproc", "0")[0] == 2


def test_missing_config(command):
    code, out, err = command("train", "no/such.toml")
    assert (code, out) == (2, "")
    assert err == "error: no/such.toml: No such file or directory\n"


def test_every_complaint_has_its_line(command, config):
    text = config.read_text().replace("batch_size = 4096", "batch_sise = 4096\nepocks = 2")
    config.write_text(text)
    code, _, err = command("train", config)
    lines = err.splitlines()
    assert code == 2
    assert lines[0].startswith("error: ") and all(line.startswith("       ") for line in lines[1:])
    assert "did you mean 'batch_size'?" in err and "did you mean 'epochs'?" in err
    assert "Traceback" not in err


def test_user_error_as_json(command):
    code, out, err = command("train", "no.toml", "--json")
    assert code == 2
    assert json.loads(out)["error"]["kind"] == "user"
    assert err.startswith("error: no.toml")


def test_full_disk(command, config, monkeypatch):
    from launch import rundir

    def full(parent, name):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/quickstart/config.toml")

    monkeypatch.setattr(rundir, "create", full)
    code, _, err = command("train", config)
    assert code == 2
    assert err == "error: the disk is full while writing runs/quickstart/config.toml; make room and try again\n"


def test_world_size_that_does_not_divide_the_streams(command, config):
    code, _, err = command("train", config, "--nproc", "3")
    assert code == 2
    assert "3 ranks do not divide data.streams = 8; use 1, 2, 4, 8 ranks" in err


def test_no_data_and_no_way_to_make_it(command, config):
    text = re.sub(r"^prepare.*$", "", config.read_text(), flags=re.MULTILINE)
    config.write_text(text)
    code, _, err = command("train", config, "--set", "data.path=elsewhere")
    assert code == 2
    assert "tablemesh prepare SOURCE elsewhere" in err
    assert not Path("runs").exists()


def test_data_is_prepared_first(command, config, monkeypatch):
    from trainer import prepare

    asked = {}

    def refuse(source, dest, *, spec, options, progress):
        asked.update(source=source, dest=dest, options=options)
        progress(1, 2, "writing")
        raise UserError("the disk is full")

    monkeypatch.setattr(prepare, "prepare", refuse)
    code, out, err = command("train", config, "--set", "data.path=fresh")
    assert code == 2 and "the disk is full" in err
    asked_for = tomllib.loads(config.read_text())["data"]
    assert asked == {"source": asked_for["prepare"], "dest": Path("fresh"), "options": asked_for["prepare_options"]}
    assert "writing: 50%" in out


def test_dry_run_starts_nothing(command, config, tmp_path):
    code, out, _ = command("train", config, "--dry-run", "--nproc", "2")
    assert code == 0
    assert "2 ranks on this machine" in out and "-m trainer" in out and "OMP_NUM_THREADS=" in out
    assert not (tmp_path / "runs").exists()
    code, out, _ = command("train", config, "--dry-run", "--json")
    assert "-m launch.agent --nproc 2" in json.loads(out)["request"]


def test_unknown_scheduler(command, config):
    code, _, err = command("train", config, "--scheduler", "locl")
    assert code == 2 and "did you mean 'local'?" in err


def test_train_to_the_end(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "ok")
    code, out, err = command("train", config, "--module", MODULE, "--name", "first", "--set", "train.epochs=3")
    assert (code, err) == (0, "")
    assert "0.7900" in out and "0.0050 above this" in out
    assert out.splitlines()[-1] == "report: runs/first/report.html"
    run_dir = tmp_path / "runs/first"
    assert "epochs = 3" in (run_dir / "config.toml").read_text()
    assert (tmp_path / "runs/latest").resolve() == run_dir

    code, out, err = command("train", config, "--module", MODULE, "--name", "first", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["status"], Path(told["run_dir"]).name) == ("finished", "first-2")
    assert "2 ranks on cpu" in err, "progress goes to stderr when stdout is for the JSON object"


def test_failing_rank(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "user")
    code, out, err = command("train", config, "--module", MODULE, "--json")
    assert code == 2
    told = json.loads(out)
    assert told["status"] == "failed"
    assert told["error"] == json.loads((tmp_path / "runs/latest/report.json").read_text())["error"]
    tail = err[err.index("error:") :]
    assert tail.splitlines() == [
        "error: table t7: id 9 is outside its 8 rows",
        "       set id_policy = 'hash'",
    ]


def test_a_resume_that_is_stopped_by_hand_at_its_start_leaves_the_config(command, config, tmp_path, monkeypatch):
    from launch import follow
    from launch.failure import Failure

    monkeypatch.setenv("FAKE", "ok")
    command("train", config, "--module", MODULE, "--name", "first")
    run_dir = tmp_path / "runs/first"
    before = {name: (run_dir / name).read_text() for name in ("config.toml", "report.json", "metrics.jsonl")}
    stopped = Failure(kind="interrupted", message="stopped by Ctrl-C")
    monkeypatch.setattr(follow, "run", lambda work, scheduler, display: stopped)
    code, out, _ = command("train", run_dir, "--resume", "auto", "--set", "train.epochs=9", "--json")
    assert code == 1 and json.loads(out)["status"] == "interrupted"
    assert {name: (run_dir / name).read_text() for name in before} == before


def test_eval_and_predict_hand_the_ranks_their_order(command, config, tmp_path, monkeypatch):
    from launch import follow

    run_dir = tmp_path / "runs/a"
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(config.read_text())
    jobs = []

    def finish(work, scheduler, display):
        jobs.append(work)
        Path(work.values["result"]).write_text(json.dumps({"split": "test", "auc": 0.8, "rows": 1234}))

    monkeypatch.setattr(follow, "run", finish)
    code, out, _ = command("eval", run_dir, "--data", "data/quickstart", "--split", "test", "--nproc", "1")
    assert code == 0 and "test AUC" in out and "0.8000" in out
    code, out, _ = command("predict", run_dir, "data/quickstart", "out.parquet", "--json")
    assert code == 0 and json.loads(out)["rows"] == 1234
    first, second = jobs
    assert (first.action, first.nproc, first.file.name) == ("eval", 1, "JOB-eval.json")
    assert first.values == {"dataset": "data/quickstart", "split": "test", "result": str(run_dir / "eval.json")}
    assert (second.action, second.nproc) == ("predict", 2)
    assert second.values["out"] == str(tmp_path / "out.parquet")


def test_eval_of_what_is_no_run(command, tmp_path):
    code, _, err = command("eval", tmp_path / "runs/none")
    assert code == 2 and "no such run folder" in err


def test_predict_into_a_missing_folder(command, tmp_path):
    code, _, err = command("predict", tmp_path, "data", "no/out.parquet")
    assert code == 2 and "does not exist" in err


def test_prepare_hands_over_its_options(command, monkeypatch):
    from trainer import prepare

    asked = {}

    def remember(source, dest, *, spec, options, progress):
        asked.update(options)
        return SimpleNamespace(model_dump=lambda mode: {"name": "x"})

    monkeypatch.setattr(prepare, "prepare", remember)
    words = [
        "--rows",
        "10",
        "--seed",
        "3",
        "--valid",
        "a.csv",
        "--valid",
        "b.csv",
        "--test",
        "0.1",
        "--bad-rows",
        "0.01",
    ]
    code, out, _ = command("prepare", "x.csv", "dest", *words, "--set", "split=time", "--replace", "--json")
    assert code == 0 and json.loads(out) == {"name": "x"}
    assert asked == {
        "rows": 10,
        "seed": 3,
        "valid": ["a.csv", "b.csv"],
        "test": "0.1",
        "max_rejected": 0.01,
        "split": "time",
        "existing": "replace",
    }


def test_doctor_exit_code(command, monkeypatch):
    from launch import doctor

    bad = doctor.Check(group="a", name="torch", state="problem", found="2.0", fix="make install")
    monkeypatch.setattr(doctor, "examine", lambda: [bad])
    code, out, _ = command("doctor", "--json")
    assert code == 1 and json.loads(out)["ok"] is False
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check(group="a", name="torch", state="ok", found="2.13.0")])
    code, out, _ = command("doctor")
    assert code == 0 and "ready to train" in out


def test_an_interrupted_prepare_says_so_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "prepare", "synthetic:zipf4", "d", "--rows", "100000000"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control has its background jobs ignore SIGINT, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / ".d.partial/train").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 1 and "error: stopped by Ctrl-C or SIGTERM" in said
    assert not list(tmp_path.iterdir())
