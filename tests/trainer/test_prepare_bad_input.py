"""What is wrong with a source, a spec or the disk is said clearly, and no half dataset is left."""

import errno
import fcntl
import gzip

import pandas as pd
import pyarrow.parquet as pq
import pytest

from kernels.errors import UserError
from tests.trainer.criteo_text import criteo_lines
from trainer.data.dataset import load
from trainer.prepare import prepare, warnings
from trainer.prepare.write import SplitWriter

SPEC = """
[[label]]
column = "y"
[[categorical]]
columns = ["a"]
[[dense]]
columns = ["x"]
"""


@pytest.fixture
def source(tmp_path):
    """1,000 good Criteo lines: the lines, and a function that writes them and prepares."""
    lines = criteo_lines(1000)

    def run(**options):
        (tmp_path / "train.txt").write_bytes("".join(lines).encode("latin-1"))
        return prepare(f"criteo:{tmp_path / 'train.txt'}", tmp_path / "o", options={"block_bytes": 20_000} | options)

    return lines, run


def nothing_left(tmp_path):
    return not [p for p in tmp_path.iterdir() if p.name.startswith((".o", "o")) and p.name != "o.rejected.tsv"]


def table(tmp_path, **columns):
    path = tmp_path / "d.parquet"
    pd.DataFrame(columns).to_parquet(path)
    (tmp_path / "s.toml").write_text(SPEC)
    return str(path)


def replace(line: str, field: int, text: str) -> str:
    fields = line.rstrip("\n").split("\t")
    fields[field] = text
    return "\t".join(fields) + "\n"


def test_malformed_lines_are_set_aside_with_their_numbers(tmp_path, source):
    lines, run = source
    broken = {
        7: "1\t2\t3\n",
        10: lines[10].rstrip("\n") + "\textra\n",
        200: replace(lines[200], 3, "1.5"),
        201: replace(lines[201], 3, "99999999999999999999"),
        400: replace(lines[400], 20, "xyz\xff"),
        401: replace(lines[401], 21, "0" * 17),
        600: replace(lines[600], 0, "2"),
        601: replace(lines[601], 0, ""),
        999: lines[999][:40],
    }
    for at, text in broken.items():
        lines[at] = text
    lines.insert(500, "\n")  # a blank line is no malformed one, and counts
    lines.insert(500, "\r\n")
    dataset = run(max_rejected=0.01)
    assert dataset.rejected == 9 and sum(s.rows for s in dataset.splits.values()) == 991
    rejected = pd.read_csv(tmp_path / "o" / "rejected.tsv", sep="\t")
    assert rejected["line"].tolist() == [at + 1 if at < 500 else at + 3 for at in broken]
    reasons = rejected["reason"].tolist()
    assert reasons[:2] == ["expected 40 fields, found 3", "expected 40 fields, found 41"]
    assert reasons[2] == reasons[3] == "column 'I3' is not an integer of 64 bits"
    assert reasons[4] == "column 'C7' is not a hexadecimal number of at most 16 digits"
    assert reasons[6] == "label 'label' is neither 0 nor 1" and reasons[7] == "column 'label' is missing"
    assert rejected["text"][0] == "1\\t2\\t3"


def test_too_many_malformed_lines_stop_and_are_kept_for_reading(tmp_path, source):
    lines, run = source
    for at in (3, 500):
        lines[at] = "nonsense\n"
    with pytest.raises(
        UserError, match=r"2 of 1000 lines are malformed, 0.20%, and max_rejected allows 0.10%"
    ) as caught:
        run()
    assert "train.txt, line 4: expected 40 fields, found 1" in str(caught.value)
    assert nothing_left(tmp_path) and len((tmp_path / "o.rejected.tsv").read_text().splitlines()) == 3
    assert run(max_rejected=0.002).rejected == 2


def test_quotes_that_never_close(tmp_path):
    (tmp_path / "d.csv").write_text("y,a,x\n" + '1,"5 inch,2\n0,b,3\n' * 20 + "1,c,2\n")
    (tmp_path / "s.toml").write_text(SPEC)
    with pytest.raises(UserError):
        prepare(str(tmp_path / "d.csv"), tmp_path / "o", spec=tmp_path / "s.toml")
    assert nothing_left(tmp_path)
    (tmp_path / "s.toml").write_text(SPEC + '[source]\nquote = ""\n')
    dataset = prepare(str(tmp_path / "d.csv"), tmp_path / "o", spec=tmp_path / "s.toml")
    assert sum(s.rows for s in dataset.splits.values()) == 41


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "aa"}, r"d.parquet: no column 'aa', which categorical.0 asks for; .*'a'"),
        ({"column": "colunm"}, r"s.toml: label.0.colunm: unknown key; did you mean 'column'"),
        (
            {'columns = ["x"]': 'columns = ["x"]\nlogp1 = true'},
            r"s.toml: dense.0.logp1: unknown key; did you mean 'log1p'",
        ),
        ({'columns = ["a"]': 'columns = ["a"]\nids = "hash"'}, r"ids = 'hash' needs rows"),
        ({'columns = ["a"]': 'columns = ["a"]\nbuckets = [3, 1]'}, r"increasing order"),
        ({'columns = ["x"]': 'columns = ["y"]'}, r"would be called 'y'"),
        ({'columns = ["a"]': 'columns = ["q*"]'}, r"no column matches 'q\*'"),
        ({"[[label]]": "[split]\nvalid = 0.7\ntest = 0.6\n[[label]]"}, r"leave some rows to train"),
        ({"[[label]]": "[split]\nby = 'time'\nvalid = 0.1\n[[label]]"}, r"needs a timestamp column"),
        ({"[[label]]": "[[label"}, r"s.toml: not valid TOML"),
    ],
)
def test_spec_errors_name_file_and_key(tmp_path, change, message):
    source = table(tmp_path, y=[0, 1] * 50, a=range(100), x=1.0)
    text = SPEC
    for old, new in change.items():
        text = text.replace(old, new) if old != "a" else text.replace('["a"]', '["aa"]')
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "o", spec=tmp_path / "s.toml")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": ["one", "two"] * 50}, r"d.parquet: column 'x' is (large_)?string, but 'x' is made of numbers"),
        ({"a": [0.5, 1.0] * 50}, r"d.parquet, row 0: column 'a' holds 0.5; ids are made of integers or text"),
        ({"x": [[1.0], [2.0]] * 50}, r"column 'x' is list.*one value a row"),
        ({"y": ["yes", "no"] * 50}, r"column 'y' is (large_)?string, but 'y' is made of numbers"),
        (
            {"y": [0, 5] * 50},
            r"50 of 100 rows are malformed.*(\n.*)*row 1: label 'y' is neither 0 nor 1(\n.*)*at_least",
        ),
        ({"x": [float("inf"), 1.0] * 50}, r"row 0: column 'x' is infinite"),
    ],
)
def test_parquet_columns_of_the_wrong_kind(tmp_path, columns, message):
    source = table(tmp_path, **({"y": [0, 1] * 50, "a": range(100), "x": 1.0} | columns))
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "o", spec=tmp_path / "s.toml")
    assert nothing_left(tmp_path)


def test_files_that_are_empty_cut_off_or_no_parquet(tmp_path):
    (tmp_path / "s.toml").write_text(SPEC)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("y,a,x\n")
    (tmp_path / "not.parquet").write_text("no")
    with gzip.open(tmp_path / "whole.csv.gz", "wt") as stream:
        stream.write("y,a,x\n" + "".join(f"1,{i * 7919},0.25\n" for i in range(5000)))
    (tmp_path / "cut.csv.gz").write_bytes((tmp_path / "whole.csv.gz").read_bytes()[:9000])
    for name, message in (
        ("empty.csv", "the file is empty"),
        ("header.csv", "the file has no rows"),
        ("not.parquet", "not a readable Parquet file"),
        ("cut.csv.gz", "cannot be read to its end"),
        ("missing.csv", "no such file"),
        ("nothing*.csv", "no file matches"),
    ):
        with pytest.raises(UserError, match=f"{name.replace('*', '.')}.*{message}"):
            prepare(str(tmp_path / name), tmp_path / "o", spec=tmp_path / "s.toml")
        assert nothing_left(tmp_path)


def test_sources_that_do_not_fit_what_was_asked(tmp_path):
    (tmp_path / "test.txt").write_text("".join(line.split("\t", 1)[1] for line in criteo_lines(5)))
    (tmp_path / "d.csv").write_text("y,a,x\n1,2,3\n")
    (tmp_path / "e.csv").write_text("y,b,x\n1,2,3\n")
    (tmp_path / "s.toml").write_text(SPEC)
    for source, options, message in (
        (f"criteo:{tmp_path}/test.txt", {}, "test file without labels"),
        (f"criteo:{tmp_path}/d.csv", {}, "1 tab-separated fields"),
        (f"{tmp_path}/d.csv", {}, "needs --spec"),
        ("synthetic:criteoo", {}, "did you mean 'criteo'"),
        ("synthetic:criteo", {"rowz": 5}, "rowz: unknown key; did you mean 'rows'"),
        ("synthetic:zipf4", {"rows": "many"}, "rows: .*many"),
        ("synthetic:zipf4", {"scale": 1}, "scale: unknown key"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "o", options=options)
    with pytest.raises(UserError, match=r"e.csv: its header differs .*lacks 'a'"):
        prepare(f"{tmp_path}/d.csv,{tmp_path}/e.csv", tmp_path / "o", spec=tmp_path / "s.toml")
    with pytest.raises(UserError, match="given for valid and elsewhere"):
        options = {"valid": f"{tmp_path}/d.csv"}
        prepare(f"{tmp_path}/d.csv", tmp_path / "o", spec=tmp_path / "s.toml", options=options)
    with pytest.raises(UserError, match="the split 'valid' got no row out of 1"):
        prepare(f"{tmp_path}/d.csv", tmp_path / "o", spec=tmp_path / "s.toml", options={"valid": 0.001})
    assert nothing_left(tmp_path)


def test_a_finished_dataset_is_kept_reused_or_replaced_as_asked(tmp_path, source):
    _, run = source
    first = run()
    with pytest.raises(UserError, match="finished dataset already"):
        run()
    assert run(existing="replace", seed=5).fingerprint != first.fingerprint
    replaced = load(tmp_path / "o")
    with pytest.raises(UserError, match="made from other inputs"):
        run(existing="reuse", seed=6)
    assert load(tmp_path / "o") == replaced
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare("synthetic:zipf4", tmp_path / "n", options={"rows": 100, "existing": "replace"})
    assert (tmp_path / "n" / "notes").read_text() == "mine"
    made = prepare("synthetic:zipf4", tmp_path / "z", options={"rows": 100})
    assert (
        prepare("synthetic:zipf4", tmp_path / "z", options={"rows": "100", "existing": "reuse", "threads": 1}) == made
    )


def test_an_interrupted_run_leaves_nothing_and_a_rerun_starts_clean(tmp_path, source):
    lines, run = source
    (tmp_path / "train.txt").write_text("".join(lines))

    def interrupt(done, total, text):
        if text == "writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options = {"block_bytes": 20_000, "row_group_rows": 64}
        prepare(f"criteo:{tmp_path / 'train.txt'}", tmp_path / "o", options=options, progress=interrupt)
    assert nothing_left(tmp_path)
    # What a killed process leaves: a partial folder whose lock nobody holds.
    partial = tmp_path / ".o.partial"
    (partial / "train").mkdir(parents=True)
    (partial / "train" / "part-00009.parquet").write_text("half")
    dataset = run()
    assert not partial.exists() and not (tmp_path / "o" / "train" / "part-00009.parquet").exists()
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["dataset.json", "encoding", *sorted(dataset.splits)]


def test_two_processes_do_not_prepare_the_same_folder(tmp_path, source):
    _, run = source
    partial = tmp_path / ".o.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing it"):
            run()
    assert run().rejected == 0


def test_a_full_disk_is_a_clear_error(tmp_path, source, monkeypatch):
    _, run = source
    write = SplitWriter._write
    calls = []

    def full(self, rows):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "_write", full)
        with pytest.raises(UserError, match=r"the disk was full after .* MB; free some space"):
            run(row_group_rows=64)
    assert nothing_left(tmp_path)


def test_the_lock_does_not_stay_in_the_dataset(tmp_path):
    prepare("synthetic:zipf4", tmp_path / "o", options={"rows": 50})
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["dataset.json", "test", "train"]
    assert pq.read_table(tmp_path / "o" / "train" / "part-00000.parquet").num_rows == 40


def write(tmp_path, name, text, spec=SPEC):
    (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "s.toml").write_text(spec)
    return str(tmp_path / name)


GOOD = "y,x,a\n" + "".join(f"{i % 2},{i},k{i % 5}\n" for i in range(300))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("\n1,101,k", '\n1,101,"k').replace("\n0,202,k", '\n0,202,"k'), "d.csv, line 103: the quote that"),
        (GOOD.replace("\n1,101,k", '\n1,101,"k'), "d.csv, line 103: somewhere in the next"),
        (GOOD.replace("\n", "\r"), "d.csv, line 1: the header cannot be read"),
        ("\n" + GOOD, "d.csv, line 1: is blank"),
        (GOOD.replace(",", ";"), r"no ',' in the header, but ';'; set delimiter = \";\""),
    ],
)
def test_text_that_would_be_read_as_something_else(tmp_path, text, message):
    source = write(tmp_path, "d.csv", text)
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "o", spec=tmp_path / "s.toml")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [("y,a\n0,b\n", "it lacks 'x'"), ("y,x,a,q\n0,1,b,2\n", "it has 'q' too"), ("a,y,x\nb,0,1\n", "another order")],
)
def test_a_file_with_other_columns(tmp_path, header, message):
    other = write(tmp_path, "other.csv", header)
    source = write(tmp_path, "d.csv", GOOD)
    with pytest.raises(UserError, match=f"other.csv: its header differs from that of .*d.csv: .*{message}"):
        prepare(source, tmp_path / "o", spec=tmp_path / "s.toml", options={"valid": other})


def test_one_column_with_integers_in_one_file_and_text_in_another(tmp_path):
    for name, values in (("1.parquet", [1, 2]), ("2.parquet", ["1", "2"])):
        pd.DataFrame({"y": [0, 1], "x": [0.0, 1.0], "a": values}).to_parquet(tmp_path / name)
    (tmp_path / "s.toml").write_text(SPEC)
    with pytest.raises(UserError, match=r"2.parquet: column 'a' is .*string, and integers in .*1.parquet"):
        prepare(str(tmp_path / "*.parquet"), tmp_path / "o", spec=tmp_path / "s.toml")


def test_the_list_of_rejected_lines_is_not_taken_for_a_source(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", "d.csv", GOOD + "x,y,z\n")
    spec = tmp_path / "in" / "s.toml"
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 301 lines are malformed"):
            prepare(str(tmp_path / "in"), tmp_path / "in" / "o", spec=spec)
    assert prepare(str(tmp_path / "in"), tmp_path / "in" / "o", spec=spec, options={"max_rejected": 0.1}).rejected == 1


def test_no_rows_for_a_split_by_a_share_of_0(tmp_path):
    source = write(tmp_path, "d.csv", GOOD)
    dataset = prepare(source, tmp_path / "o", spec=tmp_path / "s.toml", options={"valid": "0", "test": "0.1"})
    assert list(dataset.splits) == ["train", "test"]


def test_what_looks_like_a_slip_is_said(tmp_path):
    nothing = "".join(f"0,,{'' if i < 299 else 'k'}\n" for i in range(300))
    source = write(tmp_path, "d.csv", "y,x,a\n" + nothing)
    dataset = prepare(source, tmp_path / "o", spec=tmp_path / "s.toml", options={"valid": 0.1, "seed": 3})
    said = warnings(dataset)
    assert said[0] == "label 'y' is 0 in every row: there is nothing to learn"
    assert said[-1] == "dense column 'x' has no value in any row"
    assert not warnings(prepare(write(tmp_path, "g.csv", GOOD), tmp_path / "g", spec=tmp_path / "s.toml"))
    years = "y,x,a\n" + "".join(f"{i % 2},{1990 + i % 30},k\n" for i in range(300))
    (said,) = warnings(prepare(write(tmp_path, "h.csv", years), tmp_path / "h", spec=tmp_path / "s.toml"))
    assert "dense column 'x' has mean 2,00" in said and "standardise = true" in said


def test_iso_times_with_and_without_a_zone(tmp_path):
    spec = SPEC.replace('"a"', '"t"').replace(
        "[[label]]", 'timestamp = { column = "when", parse = "iso8601" }\n[[label]]'
    )
    for name, form in (("z", "%Y-%m-%dT%H:%M:%SZ"), ("plus", "%Y-%m-%d %H:%M:%S+00:00"), ("none", "%Y-%m-%d %H:%M:%S")):
        times = pd.date_range("2024-01-01", periods=50, freq="h")
        frame = pd.DataFrame({"y": [0, 1] * 25, "x": 1, "t": range(50), "when": times.strftime(form)})
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        (tmp_path / "s.toml").write_text(spec)
        options = {"split": "time", "valid_from": "2024-01-03", "block_bytes": 500}
        prepare(str(tmp_path / f"{name}.csv"), tmp_path / name, spec=tmp_path / "s.toml", options=options)
        valid = pq.read_table(tmp_path / name / "valid")
        assert valid["when"].to_pylist() == [int(t.timestamp()) for t in times[48:]]


def test_whole_numbers_as_pandas_writes_them_beside_missing_ones(tmp_path):
    text = "y,x,a\n" + "".join(f"{i % 2},1,{f'{i}.0' if i % 3 else ''}\n" for i in range(100))
    source = write(tmp_path, "d.csv", text, SPEC.replace('["a"]', '["a"]\nids = "as_is"'))
    dataset = prepare(source, tmp_path / "o", spec=tmp_path / "s.toml", options={"valid": 0.5})
    found = [i for split in ("train", "valid") for i in pq.read_table(tmp_path / "o" / split)["a"].to_pylist()]
    assert sorted(i for i in found if i is not None) == [i for i in range(100) if i % 3]
    assert dataset.rejected == 0
    source = write(
        tmp_path, "huge.csv", text.replace("\n1,1,1.0\n", f"\n1,1,{10**12}\n"), (tmp_path / "s.toml").read_text()
    )
    dataset = prepare(source, tmp_path / "huge", spec=tmp_path / "s.toml", options={"valid": 0.5})
    assert "1,000,000,000,001 rows for" in warnings(dataset)[0]
