import io
import json
import resource
import socket
from pathlib import Path

import pytest
from rich.console import Console

from launch import doctor, machine

GOOD = dict.fromkeys(doctor.NEEDED, "1.0") | {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "torchmetrics": "1.0.3",
    "fbgemm-gpu-cpu": "1.8.0",
}


def states(checks):
    return {check.name: check.state for check in checks}


def only_problem(checks):
    problems = [check for check in checks if check.state == "problem"]
    assert len(problems) == 1
    assert problems[0].fix
    return problems[0]


def test_the_pinned_versions_are_well():
    assert set(states(doctor.packages(GOOD)).values()) == {"ok"}
    cuda = {k: v for k, v in GOOD.items() if k != "fbgemm-gpu-cpu"} | {"fbgemm-gpu": "1.8.0", "torch": "2.13.0"}
    assert set(states(doctor.packages(cuda)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("changed", "name", "text"),
    [
        ({"torch": "2.12.1"}, "torchrec", "torch 2.13"),
        ({"torchrec": "1.7.0"}, "torchrec", "torch 2.12"),
        ({"fbgemm-gpu-cpu": "1.9.0"}, "fbgemm-gpu-cpu", "torch 2.14"),
        ({"torchmetrics": "1.2.0"}, "torchmetrics", "torchmetrics==1.0.3"),
        ({"fbgemm-gpu": "1.8.0"}, "fbgemm", "rm -rf .venv"),
        ({"fbgemm-gpu-cpu": None}, "fbgemm", "make install"),
        ({"pyarrow": None}, "packages", "make install"),
    ],
)
def test_versions_that_do_not_fit(changed, name, text):
    versions = {k: v for k, v in (GOOD | changed).items() if v is not None}
    problems = [check for check in doctor.packages(versions) if check.state == "problem"]
    assert name in [check.name for check in problems]
    assert any(text in check.fix for check in problems)


def test_python():
    assert doctor.python((3, 11, 0)).state == "ok"
    assert doctor.python((3, 10, 9)).state == "problem"


def test_a_package_of_the_same_name(tmp_path):
    found = {name: doctor.ROOT / name for name in doctor.OURS}
    assert states(doctor.ours(found)) == {"our packages": "ok"}
    other = Path("/elsewhere/site-packages/kernels")
    problem = only_problem(doctor.ours(found | {"kernels": other}))
    assert "pip uninstall kernels" in problem.fix and str(other) in problem.found
    assert only_problem(doctor.ours(found | {"trainer": None})).found == "cannot be imported"


def test_ours_are_the_ones_imported_here():
    assert states(doctor.ours(doctor.origins())) == {"our packages": "ok"}


def test_processor(monkeypatch):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    assert doctor.processor("x", frozenset({"avx2", "fma"}))[0].state == "ok"
    assert "AVX2" in only_problem(doctor.processor("x", frozenset({"sse2"}))).fix


def test_threads():
    assert states(doctor.threads(8, None, {})) == {"threads": "ok"}
    assert states(doctor.threads(8, None, {"OMP_NUM_THREADS": "4"})) == {"threads": "ok"}
    assert states(doctor.threads(8, 2.0, {"OMP_NUM_THREADS": "4"})) == {"threads": "note"}
    assert states(doctor.threads(8, None, {"OMP_NUM_THREADS": "many"})) == {"threads": "problem"}


def test_room():
    assert doctor.shared_memory(32 << 20).state == "problem"
    assert doctor.shared_memory(64 << 20).state == "note"
    assert doctor.shared_memory(4 << 30).state == "ok"
    assert doctor.disk(100 << 20).state == "problem"
    assert doctor.disk(5 << 30).state == "note"
    assert doctor.open_files(128, 4096).state == "problem"
    assert doctor.open_files(512, 512).state == "note"
    assert doctor.open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY).state == "ok"


def test_name_lookup():
    def resolve(host):
        if host != "localhost":
            raise socket.gaierror(-2, "Name or service not known")
        return "127.0.0.1"

    checks = doctor.hosts("box", resolve)
    assert [check.state for check in checks] == ["ok", "note"]
    assert "/etc/hosts" in checks[1].fix
    assert (
        doctor.hosts("box", lambda host: resolve("box" if host == "localhost" else "localhost"))[0].state == "problem"
    )


def test_gpus_with_a_cpu_build():
    checks = doctor.gpus([("H100", "80 GiB", "570.1")], GOOD)
    assert [check.state for check in checks] == ["ok", "note"]
    assert "TARGET=cuda" in checks[1].fix
    assert states(doctor.gpus(None, GOOD)) == {"GPU": "ok"}


def test_cgroup_limits(tmp_path):
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("4096\n")
    assert machine.cpu_quota(tmp_path) == 1.5
    assert machine.cores(tmp_path) == 1
    assert machine.memory_limit(tmp_path) == 4096
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory_limit(tmp_path) is None


def test_table_and_json_tell_the_same():
    checks = [
        doctor.Check(group="a", name="fine", state="ok", found="yes"),
        doctor.Check(group="b", name="bad", state="problem", found="[no]", fix="mend it"),
    ]
    screen = io.StringIO()
    doctor.show(checks, Console(file=screen, width=100))
    assert "[no]" in screen.getvalue() and "→ mend it" in screen.getvalue()
    assert "1 problem to fix first" in screen.getvalue()
    told = json.loads(json.dumps(doctor.as_json(checks)))
    assert told["ok"] is False
    assert [check["name"] for check in told["checks"]] == ["fine", "bad"]
