"""Dead, frozen and hung ranks under the real agent: named by the others, and restarted within the budget."""

import io
import json

import pytest
from rich.console import Console

from launch import attempts, failure, follow, job, progress, rundir
from launch.schedulers.local import Scheduler

WHERE = "in data of step 5 (4 completed)"


def run(run_dir, monkeypatch, mode, *, module="tests.launch.pulse_rank", nproc=2, max_restarts=0):
    """(why it failed, screen)"""
    monkeypatch.setenv("PULSE", mode)
    monkeypatch.setenv("FAKE", mode)
    screen = io.StringIO()
    work = job.make(
        name="pulse", action="train", run_dir=run_dir, nproc=nproc, module=module, max_restarts=max_restarts
    )
    ended = follow.run(work, Scheduler(), progress.make(Console(file=screen, width=200)))
    return ended, screen.getvalue()


def peer_report(run_dir):
    found = json.loads((run_dir / "errors/rank_0.json").read_text())
    assert found["kind"] == "peer" and "pulse_rank.py" in found["traceback"]
    return found["message"]


def test_a_killed_rank_is_named_by_the_agent_and_by_the_other_rank(tmp_path, monkeypatch):
    ended, _ = run(tmp_path, monkeypatch, "kill")
    assert (ended.kind, ended.rank) == ("signal", 1)
    assert ended.message.startswith(f"rank 1 was killed by SIGKILL {WHERE}: ")
    assert peer_report(tmp_path) == f"rank 1 ended (SIGKILL) {WHERE}"


def test_a_frozen_rank_is_named(tmp_path, monkeypatch):
    ended, screen = run(tmp_path, monkeypatch, "stop")
    assert (ended.kind, ended.rank, ended.exit_code) == ("hang", 1, 1)
    assert ended.message.startswith("rank 1 ") and ended.message.endswith(WHERE)
    assert peer_report(tmp_path) == ended.message
    assert "the run ends when that lasts" in screen


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path, monkeypatch):
    ended, _ = run(tmp_path, monkeypatch, "hang")
    assert (ended.kind, ended.rank) == ("hang", 1)
    assert ended.message.startswith("rank 1 hangs: no progress for") and ended.message.endswith(WHERE)


def test_a_frozen_rank_that_is_alone_is_ended_by_the_agent(tmp_path, monkeypatch):
    ended, _ = run(tmp_path, monkeypatch, "stop", nproc=1)
    assert (ended.kind, ended.rank) == ("hang", 0)
    assert ended.message == f"rank 0 made no progress {WHERE} and was killed"


def test_a_restart_within_the_budget_ends_well(tmp_path, monkeypatch):
    ended, screen = run(tmp_path, monkeypatch, "once", max_restarts=2)
    assert ended is None
    assert f"restart 1 of 2: rank 1 was killed by SIGKILL {WHERE}" in screen
    kept = tmp_path / "errors/attempt_1"
    assert json.loads((kept / "agent.json").read_text())["failures"][0]["signal"] == "SIGKILL"
    assert json.loads((kept / "rank_0.json").read_text())["kind"] == "peer"
    assert (tmp_path / "logs/train/attempt_1/rank_1.err").exists()
    assert not (tmp_path / "errors/agent.json").exists()


def test_the_budget_ends(tmp_path, monkeypatch):
    ended, screen = run(tmp_path, monkeypatch, "kill", nproc=1, max_restarts=1)
    assert ended.message.startswith("rank 0 was killed by SIGKILL")
    assert screen.count("restart ") == 1


@pytest.mark.parametrize("mode", ["user", "exit_75"])
def test_what_a_restart_would_meet_again_or_nobody_wants_undone(tmp_path, monkeypatch, mode):
    ended, screen = run(tmp_path, monkeypatch, mode, module="tests.launch.fake_rank", max_restarts=3)
    assert ended.exit_code == (2 if mode == "user" else 75)
    assert "restart 1" not in screen and not list((tmp_path / "errors").glob("attempt_*"))


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(tmp_path):
    work = job.make(name="slow", action="train", run_dir=tmp_path, nproc=1)
    saved = failure.Failure(kind="interrupted", message=failure.saved(tmp_path), exit_code=75)

    def stop(checkpoint=None):
        if checkpoint is not None:
            rundir.append_event(tmp_path, "checkpoint", step=checkpoint)
        return attempts.count_stop(work, saved)

    steps = [*range(5), *[None] * (attempts.STOPS - 2), 9, *[None] * (attempts.STOPS - 2)]
    assert {stop(step).exit_code for step in steps} == {75}
    ended = stop()
    assert (ended.kind, ended.exit_code) == ("user", 2)
    assert f"stopped {attempts.STOPS} times with no new checkpoint between (the last one is of step 9)" in ended.message
    rundir.append_event(tmp_path, "end", status="failed")
    assert stop().exit_code == 75, "submitted again"
