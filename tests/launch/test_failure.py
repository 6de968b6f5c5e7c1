import json
from types import SimpleNamespace

from launch import failure, job


def left_behind(run_dir, *, ranks=(), agent=None, logs=None):
    """A job whose ranks and agent have left these files."""
    work = job.make(name="fake", action="train", run_dir=run_dir, nproc=2)
    work.errors.mkdir()
    work.logs.mkdir(parents=True)
    for rank, time, kind, message in ranks:
        # The wall clock runs backwards here: it may be set at any time, and decides nothing.
        report = {"rank": rank, "time": -time, "at": time, "kind": kind, "message": message, "traceback": "..."}
        text = json.dumps(report | ({"hung": [1]} if "hangs" in message and kind == "peer" else {}))
        (work.errors / f"rank_{rank}.json").write_text(text)
    if agent is not None:
        ended = [
            {"rank": r, "exit_code": c, "signal": s, "time": -t, "at": t, "where": "in data of step 3 (2 completed)"}
            for r, c, s, t in agent
        ]
        (work.errors / "agent.json").write_text(json.dumps({"time": 0, "stopped_by": None, "failures": ended}))
    for rank, text in (logs or {}).items():
        (work.logs / f"rank_{rank}.err").write_text(text)
    return work


def test_the_earliest_error_that_is_not_a_peers_is_the_cause(tmp_path):
    ranks = [
        (0, 10.0, "peer", "rank 2 has gone"),
        (1, 12.0, "internal", "later"),
        (2, 11.0, "nan", "loss is NaN at step 7"),
        (3, 9.0, "peer", "connection closed"),
    ]
    found = failure.explain(left_behind(tmp_path, ranks=ranks, agent=[(2, 1, None, 11.0)]))
    assert (found.kind, found.rank, found.exit_code) == ("nan", 2, 1)
    assert found.message == "loss is NaN at step 7"
    assert found.details == tmp_path / "errors/rank_2.json"


def test_a_killed_rank_comes_before_the_broken_connection_it_caused(tmp_path):
    ranks = [(0, 20.05, "internal", "connection reset by peer")]
    found = failure.explain(left_behind(tmp_path, ranks=ranks, agent=[(1, -9, "SIGKILL", 20.1)]))
    assert found.message.startswith("rank 1 was killed by SIGKILL")
    assert found.details == tmp_path / "logs/train"


def test_an_error_of_before_comes_before_the_killed_rank(tmp_path):
    ranks = [(0, 10.0, "user", "no such column")]
    found = failure.explain(left_behind(tmp_path, ranks=ranks, agent=[(1, -9, "SIGKILL", 20.0)]))
    assert (found.message, found.exit_code) == ("no such column", 2)


def test_a_frozen_rank_is_named_by_those_that_waited_for_it(tmp_path):
    ranks = [(0, 30.0, "peer", "rank 1 hangs: no progress for 60 s, in data of step 3 (2 completed)")]
    found = failure.explain(left_behind(tmp_path, ranks=ranks, agent=[(0, 1, None, 30.2)]))
    assert (found.kind, found.rank) == ("hang", 1)
    assert found.message == ranks[0][3]


def test_out_of_memory_is_named_when_the_kernel_counted_it(tmp_path):
    work = left_behind(tmp_path, agent=[(1, -9, "SIGKILL", 20.0)])
    assert "memory ran out" in failure.explain(work, oom_kills=1).message
    assert "most likely" in failure.explain(work, oom_kills=0).message


def test_a_crash_in_native_code_shows_its_last_words(tmp_path):
    logs = {1: "hello\nterminate called: bad size\nFatal Python error: Aborted\n\nThread 0x1:\n  File x\n"}
    found = failure.explain(left_behind(tmp_path, agent=[(1, -6, "SIGABRT", 20.0)], logs=logs))
    assert found.message.splitlines() == [
        "rank 1 was killed by SIGABRT in data of step 3 (2 completed): native code gave up",
        "hello",
        "terminate called: bad size",
    ]


def test_a_rank_that_wrote_nothing_is_told_by_its_log(tmp_path):
    logs = {1: "Traceback (most recent call last):\n  File x\nImportError: no module named y\n"}
    found = failure.explain(left_behind(tmp_path, agent=[(1, 1, None, 20.0)], logs=logs))
    assert found.message == "rank 1 ended with exit code 1:\nImportError: no module named y"


def test_half_written_files_are_no_second_error(tmp_path):
    work = left_behind(tmp_path, agent=[(1, 1, None, 20.0)])
    (work.errors / "rank_1.json").write_text('{"rank": 1, "ki')
    assert failure.explain(work).message == "rank 1 ended with exit code 1 and printed nothing"


def test_nothing_at_all(tmp_path):
    work = left_behind(tmp_path)
    found = failure.explain(work, agent_output="ImportError: libtorch.so\n")
    assert found.kind == "launch" and "libtorch.so" in found.message


def test_clear_removes_an_earlier_jobs_errors(tmp_path):
    work = left_behind(tmp_path, ranks=[(0, 1.0, "user", "x")], agent=[])
    failure.clear(work)
    assert not list(work.errors.iterdir())


def test_when_nobody_could_write_on_a_full_disk(tmp_path, monkeypatch):
    work = left_behind(tmp_path)
    (work.errors / "rank_0.json").write_text("")
    monkeypatch.setattr(failure.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    found = failure.explain(work)
    assert (found.kind, found.exit_code) == ("user", 2) and "is full" in found.message
