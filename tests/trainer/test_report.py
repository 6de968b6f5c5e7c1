"""report.json and report.html: what they hold, and that nothing about a run can break them."""

import errno
import json
import math
import os
import re

import numpy as np
import pytest
import torch

from kernels.errors import UserError
from tests.trainer import fake_runs
from trainer import report, report_tables
from trainer.charts import MAX_POINTS, LineChart, Rule, Series, calibration_chart, line_chart, ticks
from trainer.report_page import view
from trainer.words import bound_text, duration, percent, size

SECTIONS = (
    "learning",
    "time",
    "quality",
    "foretold",
    "tables",
    "placement",
    "data",
    "messages",
    "checkpoints",
    "config",
    "environment",
)


def page_of(run_dir) -> str:
    return report.write_html(run_dir).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_json_round_trip_without_nan(tmp_path):
    written = {
        "a": math.nan,
        "b": [math.inf, -math.inf, 1.5],
        "c": {"d": np.float32(0.5), 7: torch.tensor([1, 2])},
        "e": tmp_path,
    }
    path = report.write_json(tmp_path, written)
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert report.read(tmp_path) == {
        "a": None, "b": [None, None, 1.5], "c": {"d": 0.5, "7": [1, 2]}, "e": str(tmp_path),
    }  # fmt: skip


def test_on_a_full_disk_a_report_takes_the_old_ones_room_or_leaves_it(tmp_path, monkeypatch):
    report.write_json(tmp_path, {"status": "running"})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    report.write_json(tmp_path, {"status": "failed"})
    assert report.read(tmp_path) == {"status": "failed"}
    with pytest.raises(UserError, match=r"report\.json: cannot be written: No space left on device .*MiB free"):
        report.write_json(tmp_path, {"status": "x" * 100_000})
    assert report.read(tmp_path) == {"status": "failed"}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("text", "rule"), [(None, "is this a run"), ("{", "not JSON"), ("[1]", "a JSON object is needed")]
)
def test_read_says_what_is_wrong(tmp_path, text, rule):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=rule):
        report.read(tmp_path)


def test_write_html_wants_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        report.write_html(tmp_path / "nothing")


def test_a_finished_run_shows_everything(tmp_path):
    page = page_of(fake_runs.finished(tmp_path / "run"))
    for section in SECTIONS:
        assert f'id="{section}"' in page and f'href="#{section}"' in page
    text = text_of(page)
    for shown in (
        "Test AUC 0.7914, 0.0042 below the best possible 0.7956 — it learned",
        "exact to ±0.000017", "80,863", "50.1 ms", "p99 71.3 ms", "best possible 0.7956", "row wise", "C26", "I13",
        "step, median", "42.7 ms", "0.85",
        "37 ids of table C3", "checkpoints/step_147", "fbgemm", "2.13.0", "Example CPU", "600,000 rows",
    ):  # fmt: skip
        assert shown in text, shown
    assert page.count("<svg") == 5 and "best possible 0.8261" in text


def test_the_tables_are_those_of_the_config(tmp_path):
    """3 x 640,000 bytes asked for; 12,800 + 640,000 + 656,384 + 204,096 + 1,048,576 taken, of which 133.4%."""
    page = page_of(fake_runs.finished(tmp_path / "run"))
    text = text_of(page[page.index('id="tables"') : page.index('id="placement"')])
    for shown in (
        "1.8 MiB would be one standard fp32 table each", "take 133.4% of that", "state of rowwise_adagrad",
        "C2 compositional mean of bags 10,000 × 16", "2 tables, 200 rows table wise 2.0% 12.5 KiB",
        "C3 collisionless", "2.50", "199 KiB 1.0 MiB", "Rows given to ids", "7,000 600,000 10.0% 7,200 200 0",
    ):  # fmt: skip
        assert shown in text, (shown, text)
    assert "op = mult, sizes = [100, 100]" in page
    assert "; id maps and filters · 610 KiB" in page and "optimizer state, id maps and filters" in text_of(page)


def test_tables_of_a_report_join_plan_data_and_what_was_counted():
    fake = dict.fromkeys(("dense_bytes", "optimizer_bytes", "filter_bytes"), 0)
    entry = {"name": "t", "features": ["f", "g"], "physical": ["t#0"], "bytes": 60, "id_map_bytes": 30, **fake}
    made = {
        "dataset": {"features": [{"name": "f", "stats": {"rows": 10, "ids": 25}}, {"name": "g", "stats": None}]},
        "row_balance": [{"table": "t#0", "fullest": 1.5}, {"table": "u", "fullest": 2.0}],
        "id_maps": {"t#0": {"ids": 4}},
    }
    (row,) = report_tables.tables({"logical": [entry | {"standard_bytes": 180}]}, made, "sgd")
    assert row["ids_per_bag"] == {"f": 2.5, "g": None} and row["of_standard"] == 0.5 and row["optimizer"] == "sgd"
    assert row["balance"] == {"t#0": 1.5} and row["id_map"] == {"ids": 4}


@pytest.mark.parametrize("make", [fake_runs.finished, fake_runs.failed, fake_runs.multi_task])
def test_the_page_loads_nothing(tmp_path, make):
    page = page_of(make(tmp_path / "run"))
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)
    for name, value in re.findall(r"""\b(src|href|srcset|action|data)\s*=\s*["']([^"']*)["']""", page):
        assert value.startswith("#") or value == "data:,", (name, value)
    assert "default-src 'none'" in page


def test_html_is_balanced(tmp_path):
    from html.parser import HTMLParser

    open_tags: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "br", "input"):
                open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag, self.getpos()

    for make in (fake_runs.finished, fake_runs.failed, fake_runs.multi_task):
        Balanced().feed(page_of(make(tmp_path / make.__name__)))
        assert not open_tags


def test_what_users_name_is_escaped(tmp_path):
    evil = """<script>alert(1)</script>'"&"""
    made = fake_runs.report(name=evil, error={"rank": 0, "kind": "user", "message": evil}, status="failed")
    made["dataset"] |= {"name": evil, "source": evil, "features": fake_runs.features(3, evil + "{}")}
    made["dataset"]["dense"] = [{"name": evil, "transform": {evil: True}}]
    made["tables"] = fake_runs.tables(evil + "{}")
    made["tables"][0] |= {"kind": evil, "options": {evil: evil}, "optimizer": evil, "sharding": [evil]}
    made["versions"][evil] = made["hardware"][evil] = evil
    made["kernels"] = {evil: {"backend": evil, "why": evil}}
    made["eval"] |= {
        "split": evil,
        "tasks": {evil: made["eval"]["tasks"]["click"], "b": made["eval"]["tasks"]["click"]},
    }
    log = fake_runs.events(62)
    log += [{"event": "message", "level": evil, "text": evil}, {"event": "checkpoint", "step": 3, "path": evil}]
    log += [{"event": "eval", "step": 60, "split": evil, "auc": 0.7}]
    page = page_of(
        fake_runs.write(tmp_path / "run", report=made, events=log, plan=fake_runs.plan(3, 2, evil + "{}"), config=evil)
    )
    assert page.count("<script>") == 1 and "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_failed_run_says_why_first(tmp_path):
    text = text_of(page_of(fake_runs.failed(tmp_path / "run")).split("<body>")[1])
    cause, tiles = text.index("step 62: the loss is NaN"), text.index("Peak memory".lower())
    assert text.index("Rank 1 failed after step 62") < cause < tiles
    assert text.index("Rank 1 (not a number)") < text.index("Rank 0 (noticed that another rank was gone)")


def test_empty_and_broken_folders_still_render(tmp_path):
    assert "Nothing has been recorded yet" in page_of(tmp_path)
    (tmp_path / "report.json").write_text('{"status": "runn')
    (tmp_path / "plan.json").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 5, "auc": 0.6}\n\n7\n{"event": "tra')
    assert "Running: step 5" in page_of(tmp_path)


@pytest.mark.parametrize("gone", sorted(fake_runs.report()))
def test_any_part_of_the_report_may_be_missing_or_null(tmp_path, gone):
    made = fake_runs.report()
    for value in (None, {}):
        changed = made | {gone: value}
        if gone in ("status", "name"):
            changed.pop(gone)
        elif not isinstance(made[gone], dict):
            changed[gone] = None
        page_of(fake_runs.write(tmp_path / "run", report=changed, events=fake_runs.events(60), plan=fake_runs.plan()))


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"status": "interrupted"}, "Stopped at step 147"),
        ({"status": "running", "steps": 0}, "Running: step 145 of 147"),
        ({"bayes": None}, "Test AUC 0.7914 — it learned"),
        ({"bayes": {"auc": 0.99}}, "— it learned some of what there is"),
        (
            {"eval": {"auc": 0.502, "split": "valid"}},
            "Valid AUC 0.5020, 0.2936 below the best possible 0.7956 — it did not",
        ),
        ({"eval": {"auc": 0.7961}}, "Test AUC 0.7961, 0.0005 above the best possible 0.7956 — it learned"),
        ({"eval": {"auc": 0.51, "ne": 1.02}, "bayes": None}, "Test AUC 0.5100 — it did not learn"),
        ({"eval": None}, "Finished after 147 steps"),
    ],
)
def test_the_verdict_in_words(tmp_path, changes, headline):
    fake_runs.write(tmp_path / "run", report=fake_runs.report(**changes), events=fake_runs.events())
    assert headline in view(tmp_path / "run")["verdict"].headline


def test_several_tasks_have_a_row_and_a_plot_each(tmp_path):
    page = page_of(fake_runs.multi_task(tmp_path / "run"))
    assert all(f"Calibration of {task}" in page for task in ("click", "like", "buy"))
    assert "bound on its error" in page


def test_many_tables_on_many_ranks(tmp_path):
    run_dir = fake_runs.large(tmp_path / "run", tables=60, world_size=32)
    page = page_of(run_dir)
    assert 'placeholder="find a table"' in page and "0–31" in page
    points = [len(p.split()) for p in re.findall(r'<polyline class="curve s\d" points="([^"]+)"', page)]
    assert max(points) <= MAX_POINTS


def test_steps_run_again_after_a_resume_count_once(tmp_path):
    log = fake_runs.events(60) + [
        {"event": "train", "step": 40, "auc": 0.7},
        {"event": "train", "step": 45, "auc": 0.71},
    ]
    fake_runs.write(tmp_path / "run", report=fake_runs.report(), events=log)
    page = page_of(tmp_path / "run")
    curve = re.search(r'<polyline class="curve s1" points="([^"]+)"', page)
    xs = [float(p.split(",")[0]) for p in curve[1].split()]
    assert xs == sorted(set(xs)) and len(xs) == 12


def test_versions_and_hardware_are_ready_for_json():
    found = report.versions()
    assert found["python"] and found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    machine = report.hardware()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28 and machine["cpu"] and machine["gpus"] is not None
    json.dumps([found, machine], allow_nan=False)


def test_charts_of_awkward_data():
    assert line_chart(LineChart(title="x", x_label="step", format_y=str, series=[])) == ""
    assert calibration_chart(title="x", bins=[]) == ""
    for points in ([(5, 0.0)], [(0, 1.0), (1, 1.0)], [(0, 1e30), (1, -1e30)], [(i, 1e-12 * i) for i in range(3)]):
        chart = line_chart(LineChart(
            title="x", x_label="step", format_y=str, series=[Series(name="a", points=points, colour=1)],
            rules=[Rule(value=0.5, label="half")],
        ))  # fmt: skip
        assert "<svg" in chart and "nan" not in chart
    assert "<svg" in calibration_chart(title="x", bins=[{"predicted": 0.0, "actual": 0.0, "weight": 1.0}])


def test_ticks_are_round_and_inside():
    assert ticks(0.68, 0.83) == [0.7, 0.75, 0.8]
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(-1, 1) == [-1, -0.5, 0, 0.5, 1]


def test_numbers_become_words():
    assert [size(b) for b in (0, 1023, 1536, 2**40 * 3, None)] == ["0 B", "1023 B", "1.5 KiB", "3.0 TiB", "–"]
    assert [percent(s) for s in (0, 0.0001, 0.123, None)] == ["0.0%", "<0.1%", "12.3%", "–"]
    assert [duration(s) for s in (7.42, 61, 3723)] == ["7.4 s", "1 min 01 s", "1 h 02 min"]
    assert [bound_text(b) for b in (0.0, 1.7e-5, 1.74e-5, 0.5)] == ["0", "0.000017", "0.000018", "0.50"]


def test_saves_pauses_and_restarts_are_shown(tmp_path):
    log = fake_runs.events(60) + [
        {"event": "checkpoint", "step": 20, "path": "c/step_20", "delta": False, "seconds": 1.5,
         "pause_seconds": 0.0123, "background": True, "compacted": False, "bytes": 3 << 20},
        {"event": "restart", "number": 1, "of": 3, "rank": 1, "kind": "signal", "message": "rank 1 was killed <here>"},
        {"event": "resume", "step": 20, "path": "c/step_20", "passed_over": ["step_30: the file is missing"]},
        {"event": "checkpoint", "step": 40, "path": "c/step_40", "delta": True, "seconds": 0.25, "pause_seconds": 0.25,
         "background": False, "compacted": True, "bytes": 1 << 20},
    ]  # fmt: skip
    saved = {"saved": 2, "failed": 1, "bytes": 4 << 20, "pause_seconds": 0.26, "background_seconds": 1.5}
    made = fake_runs.report() | {"checkpoints": saved}
    page = page_of(fake_runs.write(tmp_path / "run", report=made, events=log))
    text = text_of(page)
    for shown in (
        "2 saved, 1 failed", "the steps stood still for 0.26 s", "1.50 s of writing went on beside them",
        "restart 1 of 3 rank 1 was killed &lt;here&gt;", "went on from c/step_20, after 20 steps",
        "passed over step_30: the file is missing", "20 full 3.0 MiB 12.3 ms 1.50 beside the steps c/step_20",
        "40 delta, merged 1.0 MiB 250.0 ms 0.25 in the pause c/step_40",
    ):  # fmt: skip
        assert shown in text, shown
