import json
import os
import subprocess
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch import rundir
from launch.failure import Failure
from trainer.checkpoint import lock


def test_a_taken_name_gets_a_number_and_latest_follows(tmp_path):
    made = [rundir.create(tmp_path / "runs", "a") for _ in range(3)]
    assert [path.name for path in made] == ["a", "a-2", "a-3"]
    latest = tmp_path / "runs/latest"
    assert latest.is_symlink() and os.readlink(latest) == "a-3"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["a", "a-2", "a-3", "latest"]


def test_latest_may_follow_later(tmp_path):
    run = rundir.create(tmp_path, "a", latest=False)
    assert not os.path.lexists(tmp_path / "latest")
    rundir.make_latest(run)
    assert os.readlink(tmp_path / "latest") == "a"


def test_a_folder_named_latest_is_left_alone(tmp_path):
    (tmp_path / "latest").mkdir()
    rundir.create(tmp_path, "a")
    assert not (tmp_path / "latest").is_symlink()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run folder"):
        rundir.create(tmp_path / "file" / "runs", "a")


def test_find(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        rundir.find(tmp_path / "a")
    with pytest.raises(UserError, match=r"no config\.toml"):
        rundir.find(tmp_path)
    (tmp_path / "config.toml").write_text("")
    assert rundir.find(tmp_path) == tmp_path.resolve()


def test_close_completes_a_report_that_the_ranks_left_running(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"status": "running", "steps": 7, "name": "a"}))
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "time": 1.0, "step": 7}\n{"event": "tr')
    ended = Failure(kind="signal", message="rank 1 was killed", rank=1)
    rundir.close(tmp_path, name="a", world_size=2, started=1.0, began=1.0, failure=ended)
    report = rundir.report(tmp_path)
    assert (report["status"], report["steps"], report["world_size"]) == ("failed", 7, 2)
    assert report["error"] == {"rank": 1, "kind": "signal", "message": "rank 1 was killed"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "report.json"]
    *_, torn, end = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert torn == '{"event": "tr' and json.loads(end)["event"] == "end" and json.loads(end)["status"] == "failed"
    assert "rank 1 was killed" in (tmp_path / "report.html").read_text()


def test_the_cause_stands_above_what_a_stopped_rank_wrote(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"status": "interrupted", "name": "a"}))
    rundir.close(
        tmp_path, name="a", world_size=2, started=1.0, began=1.0, failure=Failure(kind="internal", message="x")
    )
    assert rundir.report(tmp_path)["status"] == "failed"


def test_an_interrupted_run_keeps_what_its_ranks_wrote(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"status": "interrupted", "name": "a", "steps": 3}))
    ended = Failure(kind="interrupted", message="stopped by Ctrl-C")
    rundir.close(tmp_path, name="a", world_size=2, started=1.0, began=1.0, failure=ended)
    assert rundir.report(tmp_path) == {"status": "interrupted", "name": "a", "steps": 3}


def test_a_refused_resume_is_put_back(tmp_path):
    """What the attempt wrote over is as it was, what it added is gone."""
    was = {"config.toml": "name = 'a'", "report.json": '{"status": "finished"}', "metrics.jsonl": '{"event": "end"}\n'}
    for name, text in was.items():
        (tmp_path / name).write_text(text)
    before = rundir.Before.of(tmp_path)
    (tmp_path / "config.toml").write_text("name = 'a'\nseed = 7")
    (tmp_path / "report.json").write_text('{"status": "failed"}')
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors/rank_0.json").write_text("{}")
    rundir.append_event(tmp_path, "phase", name="building")
    assert before.still()
    before.put_back()
    assert {name: (tmp_path / name).read_text() for name in was} == was
    assert not list((tmp_path / "errors").iterdir())


def test_a_run_that_went_on_or_that_another_writes_is_not_put_back(tmp_path):
    before = rundir.Before.of(tmp_path)
    lock.acquire(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        start = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        held = json.loads((tmp_path / "LOCK").read_text()) | {"pid": other.pid, "start": start}
        (tmp_path / "LOCK").write_text(json.dumps(held))
        try:
            assert before.taken() and not before.still()
        finally:
            other.kill()
    assert before.still() and not before.taken()
    rundir.append_event(tmp_path, "phase", name="training")
    assert not before.still()


def test_a_run_folder_that_is_read_only(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a read-only tmpfs cannot be mounted here: that needs root and CAP_SYS_ADMIN")
    try:
        with pytest.raises(UserError, match="cannot be written to"):
            rundir.check_writable(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
