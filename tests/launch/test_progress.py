import io

import pytest
from rich.console import Console

from launch import figures, progress

START = {
    "event": "start",
    "run": "quick",
    "world_size": 2,
    "device": "cpu",
    "steps_total": 100,
    "epochs": 1,
    "batch_size": 4096,
    "train_rows": 409600,
    "tables": 26,
    "table_bytes": 64_000_000,
    "bayes": {"auc": 0.8, "logloss": 0.4},
}
TRAIN = {
    "event": "train",
    "step": 40,
    "samples": 163840,
    "loss": 0.51,
    "ne": 0.93,
    "auc": 0.7123,
    "samples_per_second": 81920.0,
}
EVAL = {
    "event": "eval",
    "step": 60,
    "split": "valid",
    "auc": 0.75,
    "ne": 0.9,
    "logloss": 0.45,
    "rows": 9,
    "seconds": 1.0,
}


def plain():
    screen = io.StringIO()
    return progress.make(Console(file=screen, width=40)), screen


def test_not_a_terminal_gives_plain_whole_lines():
    display, screen = plain()
    for event in (START, {"event": "phase", "name": "building"}, TRAIN, EVAL):
        display.event(event)
    display.close()
    assert screen.getvalue().splitlines() == [
        "quick  ·  2 ranks on cpu  ·  26 tables, 64.0 MB  ·  best possible AUC 0.8000",
        "  409,600 rows in 100 steps of 4,096",
        "  building ...",
        "  train   40/100  loss 0.5100  NE 0.930  AUC 0.7123  81.9k/s  ETA 0:03",
        "  valid   step     60  AUC 0.7500  NE 0.9000  log loss 0.4500  (9 rows, 1.0 s)",
    ]


def test_plain_lines_come_at_a_sane_rate_and_the_last_is_not_lost():
    display, screen = plain()
    display.event(START)
    for step in range(1, 101):
        display.event(TRAIN | {"step": step, "samples": step * 4096})
    display.close()
    shown = [line for line in screen.getvalue().splitlines() if "train" in line]
    assert len(shown) < 10
    assert "100/100" in shown[-1]


def test_a_terminal_keeps_the_lasting_lines():
    screen = io.StringIO()
    display = progress.make(Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"}))
    for event in (START, TRAIN, EVAL, {"event": "message", "level": "warning", "text": "odd [things]"}):
        display.event(event)
    display.work(5, 10, "writing")
    display.close()
    display.close()
    assert "AUC 0.7500" in screen.getvalue()
    assert "odd [things]" in screen.getvalue()
    assert "50%" in screen.getvalue()


def test_events_with_figures_missing_or_null():
    display, screen = plain()
    display.event({"event": "train", "step": 1, "loss": None, "auc": None})
    display.event({"event": "eval", "auc": None})
    display.event({"event": "a new kind"})
    display.close()
    assert "step 1" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(3, "0:03"), (75, "1:15"), (3675, "1:01:15")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


def test_figures():
    screen = io.StringIO()
    report = {
        "eval": {"split": "test", "auc": 0.79, "auc_error_bound": 1e-5, "ne": 0.9, "rows": 60000},
        "bayes": {"auc": 0.795},
        "train": {"samples_per_second": 81000.0, "step_ms": {"p50": 50.0}},
        "memory": {"peak_bytes": 4e8},
    }
    Console(file=screen, width=100).print(figures.table(report))
    lines = [line.split("  ", 1) for line in screen.getvalue().splitlines()]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert shown["test AUC"] == "0.7900 (± 1.0e-05)"
    assert shown["best possible"] == "0.7950 (Bayes), 0.0050 above this"
    assert shown["training speed"] == "81.0k samples/s, 50.0 ms a step"
    assert shown["peak memory"] == "400.0 MB in the largest rank"


def test_figures_of_an_empty_report():
    assert figures.table({}).row_count == 0
