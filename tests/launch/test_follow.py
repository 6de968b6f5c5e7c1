"""Jobs of two real processes under the real agent and TorchX's local scheduler, with a stand-in for the trainer."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch import follow, job, progress
from launch.schedulers.local import Scheduler

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE = "tests.launch.fake_rank"
PATIENCE_SECONDS = 240


def run(run_dir: Path, monkeypatch, mode: str):
    """(failure, screen) of a job of two fake ranks."""
    monkeypatch.setenv("FAKE", mode)
    screen = io.StringIO()
    work = job.make(name="fake", action="train", run_dir=run_dir, nproc=2, module=MODULE)
    failure = follow.run(work, Scheduler(), progress.make(Console(file=screen, width=80)))
    for pid in run_dir.glob("rank_*.pid"):
        assert gone(int(pid.read_text())), "a rank outlived its job"
    return failure, screen.getvalue()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_success(tmp_path, monkeypatch):
    failure, screen = run(tmp_path, monkeypatch, "ok")
    assert failure is None
    assert "2 ranks on cpu" in screen
    assert "loss 0.5000" in screen
    assert screen.count("real trouble ahead") == 1, "said by both ranks, shown once"
    assert "DTensor" not in screen and "torch's source" not in screen
    env = json.loads((tmp_path / "rank_1.env").read_text())
    assert env["WORLD_SIZE"] == "2" and env["OMP_NUM_THREADS"].isdigit()
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert json.loads((tmp_path / "JOB.json").read_text()) == {"action": "train", "run_dir": str(tmp_path)}


def test_user_error_in_a_rank(tmp_path, monkeypatch):
    failure, screen = run(tmp_path, monkeypatch, "user")
    assert (failure.kind, failure.rank, failure.exit_code) == ("user", 1, 2)
    assert failure.message == "table t7: id 9 is outside its 8 rows\nset id_policy = 'hash'"
    assert "ChildFailedError" not in screen and "=====" not in screen


def test_killed_rank_takes_a_stuck_one_along(tmp_path, monkeypatch):
    failure, screen = run(tmp_path, monkeypatch, "stuck")
    assert (failure.kind, failure.rank, failure.exit_code) == ("signal", 1, 1)
    assert "rank 1 was killed by SIGKILL" in failure.message
    assert "elastic" not in screen
    ended = json.loads((tmp_path / "errors/agent.json").read_text())["failures"]
    assert [(e["rank"], e["exit_code"], e["signal"]) for e in ended] == [(1, -9, "SIGKILL")]


def test_uncaught_exception(tmp_path, monkeypatch):
    failure, screen = run(tmp_path, monkeypatch, "raise")
    assert failure.message == "rank 1 ended with exit code 1:\nRuntimeError: boom"
    assert "Traceback" in failure.details.read_text()
    assert "Traceback" not in screen


def test_stopped_after_a_checkpoint(tmp_path, monkeypatch):
    failure, _ = run(tmp_path, monkeypatch, "exit_75")
    assert failure.exit_code == 75


def test_an_early_ctrl_c_does_not_reach_the_process_that_now_has_the_last_agents_number(tmp_path):
    work = job.make(name="fake", action="train", run_dir=tmp_path, nproc=2, module=MODULE)
    work.logs.mkdir(parents=True)
    (work.logs / "agent.pid").write_text("1")
    found = []

    class Starting(Scheduler):
        def submit(self, job):
            return "x"

        def status(self, id):
            raise KeyboardInterrupt

        def cancel(self, id):
            found.extend(work.logs.iterdir())

    ended = follow.run(work, Starting(), progress.make(Console(file=io.StringIO())))
    assert ended.kind == "interrupted" and not found


def test_ranks_die_with_their_agent(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "kill_agent")
    work = job.make(name="fake", action="train", run_dir=tmp_path, nproc=2, module=MODULE)
    failure = follow.run(work, Scheduler(), progress.make(Console(file=io.StringIO())))
    assert failure.kind == "launch" and failure.exit_code == 1
    pids = [int(path.read_text()) for path in tmp_path.glob("rank_*.pid")]
    assert len(pids) == 2
    until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_command_stops_the_ranks(tmp_path, number):
    config = _config(tmp_path)
    command = [sys.executable, "-m", "launch.cli", "train", str(config), "--module", MODULE]
    env = os.environ | {"FAKE": "wait", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell without job control has its background jobs ignore SIGINT, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        run_dir = tmp_path / "runs/quickstart"
        until(lambda: len(list(run_dir.glob("rank_*.env"))) == 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    pids = [int(path.read_text()) for path in run_dir.glob("rank_*.pid")]
    until(lambda: all(gone(pid) for pid in pids))
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert "error: stopped by Ctrl-C or SIGTERM" in errors
        report = json.loads((run_dir / "report.json").read_text())
        assert report["status"] == "interrupted" and report["error"]["kind"] == "interrupted"


def _config(folder: Path) -> Path:
    """The quickstart's config beside a data set that is there; the fake ranks do not read it."""
    (folder / "data/quickstart").mkdir(parents=True)
    (folder / "data/quickstart/dataset.json").write_text("{}")
    path = folder / "config.toml"
    path.write_text((ROOT / "configs/quickstart.toml").read_text())
    return path


def test_lines_come_whole(tmp_path):
    path = tmp_path / "f"
    lines = follow.Lines(path)
    assert lines.new() == []
    path.write_bytes(b"one\ntw")
    assert lines.new() == ["one"]
    with open(path, "ab") as file:
        file.write("o\ndrei ü\n".encode())
    assert lines.new() == ["two", "drei ü"]
    assert follow.Lines(path, from_end=True).new() == []


def test_what_is_shown_of_stderr():
    sort = follow.Filter()
    lines = [
        ("[rank1]: x.py:3: FutureWarning: `broadcast_buffers` is deprecated. Use y.", "noise"),
        ("  DistributedDataParallel(", "noise"),
        ("x.py:3: UserWarning: the learning rate is odd", "text"),
        ("  lr = 1e9", "text"),
        ("", "noise"),
        ("[rank1]: Traceback (most recent call last):", "traceback"),
        ('[rank1]:   File "a.py", line 1, in f', "traceback"),
        ("[rank1]: KeyError: 3", "traceback"),
        ("", "noise"),
        ("During handling of the above exception, another exception occurred:", "traceback"),
        ("", "noise"),
        ("Traceback (most recent call last):", "traceback"),
        ("    g()", "traceback"),
        ("ValueError: 4", "traceback"),
        ("goodbye", "text"),
    ]
    assert [sort.classify(line) for line, _ in lines] == [kind for _, kind in lines]
