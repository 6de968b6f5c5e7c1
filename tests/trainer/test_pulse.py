"""Who is blamed when the ranks stand still, and what a rank's limits are."""

import time
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trainer import pulse
from trainer.pulse import Board, Pulse, Seen, judge


def rank(number, *, marks=10, age=0.1, limit=60.0, **others):
    silent = others.pop("silent", 0.1)
    return Seen(rank=number, marks=marks, step=7, phase="data", age=age, silent=silent, limit=limit, **others)


def blamed(*ranks):
    verdict = judge(ranks)
    return verdict and (verdict.kind, [r.rank for r in verdict.ranks])


def test_nothing_is_wrong_while_the_last_one_is_within_its_limit():
    assert blamed(rank(0, marks=11, age=200), rank(1, age=59)) is None


def test_the_one_that_is_behind_is_blamed_not_those_that_wait_for_it():
    assert blamed(rank(0, marks=11, age=61, waits=True), rank(1, age=61)) == ("hang", [1])


def test_a_first_call_may_take_longer_than_the_others_wait():
    assert blamed(rank(0, marks=11, age=100), rank(1, age=100, limit=300)) is None


def test_a_frozen_process_is_blamed_even_when_it_is_ahead():
    assert blamed(rank(0, age=61, waits=True), rank(1, marks=11, age=61, silent=61)) == ("hang", [1])


def test_the_old_row_of_a_host_that_went_silent_holds_nobody_back():
    gone = rank(1, marks=3, limit=600, age=20, silent=20, far=True)
    assert blamed(rank(0, age=61, waits=True), gone) == ("hang", [1])
    assert blamed(rank(0, age=59, waits=True), gone) is None
    assert blamed(rank(0, age=61, waits=True), replace(gone, silent=1.0)) is None, "it is heard of, and still in time"


def test_of_equals_the_one_that_does_not_wait_is_blamed():
    assert blamed(rank(0, age=61, waits=True), rank(1, age=61), rank(2, age=61, waits=True)) == ("hang", [1])


def test_when_all_wait_all_are_named():
    assert blamed(rank(0, age=61, waits=True), rank(1, age=61, waits=True)) == ("hang", [0, 1])


def test_the_dead_come_first_and_the_finished_are_left_alone():
    assert blamed(rank(0, age=99), rank(1, ended=-9)) == ("ended", [1])
    done = replace(rank(1, marks=5, age=999), phase="done")
    assert blamed(rank(0), done, replace(done, rank=2, ended=75)) is None


def test_ranks_that_have_not_begun_are_not_judged():
    assert blamed(rank(0, marks=0, age=1e9), rank(1, marks=0, age=1e9)) is None


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0.0, 61.0]), st.booleans()), min_size=1, max_size=5))
def test_somebody_is_late_in_every_verdict(rows):
    seen = [rank(i, marks=marks, age=age, waits=waits) for i, (marks, age, waits) in enumerate(rows)]
    verdict = judge(seen)
    least = min(r.marks for r in seen)
    assert (verdict is not None) == any(r.marks == least and r.age > r.limit for r in seen)


def test_messages():
    said = judge([rank(0, marks=11, age=61), rank(1, age=61)]).message()
    assert said == "rank 1 hangs: no progress for 61 s, in data of step 7 (6 completed)"
    said = judge([rank(0), replace(rank(1, ended=-9), phase="save", step=40)]).message(lambda code: f"signal {-code}")
    assert said == "rank 1 ended (signal 9) in save after step 40"


def test_rows_are_seen_by_who_opens_the_board(tmp_path):
    board = Board.create(tmp_path / "board", 2)
    own = Pulse(Board.open(tmp_path / "board"), 1, hang_seconds=60, first_seconds=300)
    own.mark("backward", 38)
    board.set_ended(0, -9)
    first, second = board.seen(first_rank=4)
    assert (first.rank, first.ended, first.marks) == (4, -9, 0)
    assert (second.rank, second.where) == (5, "in backward of step 38 (37 completed)")
    assert second.age < 60 and second.limit == 300
    own.done()
    assert board.seen()[1].phase == "done"


def test_limits_follow_progress(monkeypatch):
    now = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    own = Pulse(Board.private(), 0, hang_seconds=60, first_seconds=300)

    def stay(phase, seconds):
        own.mark(phase, 1)
        limit = own.board.seen()[0].limit
        now[0] += int(seconds * 1e9)
        return limit

    assert [stay("eval", 100) for _ in range(pulse.FIRST_TIMES)] == [300] * pulse.FIRST_TIMES
    assert stay("eval", 1) == 300, "three times the 100 s that it took before"
    assert [stay("data", 1) for _ in range(5)][-1] == 60
    own.touch("save")
    assert own.board.seen()[0].age == 1, "the main thread is in another phase"
    own.touch("data")
    assert own.board.seen()[0].age == 0
    own.set_limits(hang_seconds=0, first_seconds=300)
    assert stay("data", 1) == float("inf")


def test_marks_without_a_pulse_do_nothing(monkeypatch):
    monkeypatch.setattr(pulse, "_pulse", None)
    pulse.mark("data", 1)
    pulse.touch("data")
