"""`tablemesh submit` and its dry runs, held by golden files; a job in the background from submission to its end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch import handles, submit
from launch.job import Mount
from trainer import config as configs

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests/golden/submit"
MODULE = "tests.launch.fake_rank"
QUICKSTART = "configs/quickstart.toml"

CASES = {
    "local": ("--on", "local"),
    "docker": ("--on", "docker", "--nodes", "2", "--image", "tablemesh:cpu", "--memory", "8G", "--cpus", "2"),
    "slurm": (
        *("--on", "slurm", "--nodes", "2", "--gpus-per-node", "2", "--cpus", "32", "--memory", "200G"),
        *("--time", "12h", "--option", "partition=gpu", "--env", "NCCL_DEBUG=INFO", "--preflight"),
    ),
    "kubernetes": (
        *("--on", "kubernetes", "--nodes", "2", "--gpus-per-node", "4", "--cpus", "64", "--memory", "400G"),
        *("--image", "registry.example/tablemesh:cuda", "--mount", "tablemesh:/workspace"),
        *("--option", "node_selector=gpu:h100", "--option", "tolerate=nvidia.com/gpu"),
        *("--option", "env_secret=bucket", "--set", "checkpoint.dir=s3://bucket/checkpoints"),
    ),
    "aws_batch": (
        *("--on", "aws_batch", "--nodes", "2", "--gpus-per-node", "4", "--cpus", "96", "--memory", "700G"),
        *("--image", "registry.example/tablemesh:cuda", "--mount", "fs-1:/workspace", "--option", "queue=train"),
    ),
}


@pytest.fixture
def fixed(monkeypatch):
    """What differs from one submission, user or machine to the next."""
    from torchx.schedulers import aws_batch_scheduler, docker_scheduler, kubernetes_scheduler

    from launch import machine
    from launch.schedulers import docker

    for module in (aws_batch_scheduler, docker_scheduler, kubernetes_scheduler):
        monkeypatch.setattr(module, "make_unique", lambda name: f"{name}-xyz")
    monkeypatch.setattr(docker, "user", lambda: "1000:1000")
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(configs.Config, "to_toml", lambda self: f'name = "{self.name}"  # and so on\n')
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("USER", "somebody")


@pytest.mark.parametrize("kind", CASES)
def test_a_dry_run_is_the_golden_one(kind, command, config, fixed, tmp_path):
    code, out, err = command("submit", config, *CASES[kind], "--name", "golden", "--dry-run")
    assert (code, err) == (0, "")
    text = out.replace(str(tmp_path), "/home/somebody").replace(sys.executable, "/venv/bin/python")
    text = re.sub(r"(torchx.pytorch.org/user: ).*", r"\1somebody", text.replace(str(ROOT), "/opt/code"))
    path = GOLDEN / f"{kind}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "a changed request? UPDATE_GOLDEN=1 pytest tests/launch/test_submit.py writes it"
    assert not (tmp_path / "runs").exists() and not (tmp_path / "state").exists()


def test_the_pods_are_valid_for_kubernetes(command, config, fixed):
    """Each task's template as a Pod: Volcano's own kind is unknown to the validator, which would pass anything."""
    import kubernetes_validate
    import yaml

    _, out, _ = command("submit", config, *CASES["kubernetes"], "--name", "golden", "--dry-run")
    job = yaml.safe_load(out)
    assert (job["apiVersion"], job["kind"], job["spec"]["minAvailable"]) == ("batch.volcano.sh/v1alpha1", "Job", 2)
    assert len(job["spec"]["tasks"]) == 2
    for task in job["spec"]["tasks"]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": task["name"]}} | task["template"]
        pod["metadata"] = {**task["template"]["metadata"], "name": task["name"]}
        kubernetes_validate.validate(pod, "1.32", strict=True)
        pod["spec"]["restartPolicyy"] = "Never"
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, "1.32", strict=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "slrum"), "did you mean 'slurm'?"),
        (("--on", "slurm", "--option", "partion=x"), "did you mean 'partition'?"),
        (("--on", "slurm", "--option", "job_dir=x"), "slurm has no such option"),
        (("--on", "os.path"), "has no class Scheduler"),
        (("--on", "slurm", "--image", "x"), "leave it out"),
        (("--on", "local", "--nodes", "2"), "--on local is this machine alone"),
        (("--on", "local", "--memory", "8G"), "--on local takes what this machine has"),
        (("--on", "local", "--nproc", "2", "--gpus-per-node", "64"), "--gpus-per-node 64: this machine has"),
        (("--on", "docker"), "name its image with --image"),
        (("--on", "kubernetes", "--image", "x"), "--mount CLAIM:/workspace"),
        (("--on", "aws_batch", "--image", "x"), "--memory 60G"),
        (("--on", "slurm", "--nodes", "3"), "6 ranks do not divide data.streams = 8"),
        (("--on", "slurm", "--gpus-per-node", "1", "--nproc", "2"), "more ranks than the 1 GPUs"),
        (("--on", "slurm", "--memory", "much"), "write it as 60G"),
        (("--on", "slurm", "--time", "soon"), "write it as 45m"),
        (("--on", "slurm", "--time", "3m"), "it needs more time than that"),
        (("--on", "slurm", "--env", "A"), "write it as --env NAME=VALUE"),
        (("--on", "docker", "--image", "x", "--mount", "x"), "write it as FOLDER_OR_VOLUME:/FOLDER/INSIDE"),
        (("--on", "docker", "--image", "x", "--option", "privileged=perhaps"), "true or false"),
        (("--on", "kubernetes", "--image", "x", "--mount", "c:/workspace", "--name", "A_b"), "small letters"),
    ],
)
def test_bad_input_names_the_way_out(words, said, command, config, tmp_path):
    code, _, err = command("submit", config, *words)
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_no_slurm_here(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = command("submit", config, "--on", "slurm")
    assert code == 2 and "there is no `sinfo` here" in err
    assert not (tmp_path / "runs").exists(), "a run folder without a job"


def program(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_job_that_slurm_refuses_leaves_everything_as_it_was(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path, "sinfo", "")
    program(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1")
    (tmp_path / "runs/earlier").mkdir(parents=True)
    (tmp_path / "runs/latest").symlink_to("earlier")
    code, _, err = command("submit", config, "--on", "slurm", "--option", "partition=nowhere")
    assert code == 2 and "invalid partition specified: nowhere" in err and "`sinfo` lists the partitions" in err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["earlier", "latest"]
    assert os.readlink(tmp_path / "runs/latest") == "earlier"
    program(tmp_path, "sbatch", "echo 7")
    assert command("submit", config, "--on", "slurm")[1].splitlines()[-1] == "slurm://tablemesh/7"
    assert os.readlink(tmp_path / "runs/latest") == "quickstart"


def test_a_job_that_runs_is_told_even_where_its_handle_cannot_be_noted(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "config.toml"))  # which is no folder
    program(tmp_path, "sinfo", "")
    program(tmp_path, "sbatch", "echo 7")
    code, out, _ = command("submit", config, "--on", "slurm")
    assert code == 0 and "warning: the job was submitted; its handle could not be written down" in out
    assert out.splitlines()[-1] == "slurm://tablemesh/7"


def test_a_job_that_slurm_has_forgotten(command, config, tmp_path, monkeypatch):
    """Minutes after its end, without accounting: the run folder still tells how it ended and what it printed."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path, "sinfo", "")
    program(tmp_path, "sbatch", "echo 7")
    for name in ("squeue", "sacct", "scontrol"):
        program(tmp_path, name, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    command("submit", config, "--on", "slurm")
    run = tmp_path / "runs/quickstart"
    for words in (("status", run), ("logs", run), ("logs", run, "--follow"), ("cancel", run)):
        code, _, err = command(*words)
        assert code == 2 and ("slurm knows no job 7" in err or "slurm has forgotten job 7" in err), words
    (run / "report.json").write_text('{"status": "finished"}')
    (run / "logs/slurm-7.log").write_text("run 0 ended with exit code 0\n")
    assert "succeeded: by the run's report; slurm has forgotten it" in command("status", run)[1]
    for words in (("logs", "slurm://tablemesh/7"), ("logs", run, "--follow")):
        assert command(*words)[:2] == (0, "run 0 ended with exit code 0\n")
    assert "succeeded, now succeeded" in command("cancel", run)[1]


def test_what_a_slurm_script_says(command, config, monkeypatch):
    """Words with spaces stay one option; threads are counted on the node unless --cpus says how many CPUs it has."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = command("submit", config, "--on", "slurm", "--option", "comment=two words", "--dry-run")[1]
    assert "\n#SBATCH '--comment=two words'\n" in script
    assert "OMP_NUM_THREADS" not in script and "cpus-per-task=" not in script


def test_a_job_of_torchx_run_that_slurm_refuses_leaves_no_folder(tmp_path, monkeypatch):
    from torchx.specs import AppDryRunInfo

    from launch.schedulers import slurm

    monkeypatch.setenv("PATH", str(tmp_path))
    script = slurm.Script([], {}, ["true"], run_dir=str(tmp_path / "runs/a"))
    with pytest.raises(UserError, match="there is no `sbatch` here"):
        slurm.Slurm("torchx").schedule(AppDryRunInfo(script, repr))
    assert not (tmp_path / "runs/a").exists()


def test_a_machine_of_no_cluster(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path, "sinfo", "echo 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1")
    code, _, err = command("submit", config, "--on", "slurm")
    assert code == 2 and "Could not establish a configuration source" in err and "slurm.conf in SLURM_CONF" in err


def test_no_docker_daemon_here(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    (tmp_path / "data/quickstart/dataset.json").unlink()
    code, _, err = command("submit", config, "--on", "docker", "--image", "x")
    assert not list((tmp_path / "data/quickstart").iterdir()), "data prepared for nothing"
    assert code == 2 and "no docker daemon answers" in err and "systemctl start docker" in err


def test_no_cluster_here(command, config, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, _, err = command("submit", config, "--on", "kubernetes", "--image", "x", "--mount", "c:/workspace")
    assert code == 2 and "no Kubernetes API server answers" in err


@pytest.mark.parametrize("words", [("status",), ("logs",), ("cancel",)])
def test_handles_that_are_none(words, command, tmp_path):
    assert "is neither a handle such as" in command(*words, "nothing")[2]
    code, _, err = command(*words, "slrum://tablemesh/1")
    assert code == 2 and "did you mean 'slurm'?" in err
    assert "is not a handle" in command(*words, "slurm://")[2]
    assert "are called NAMESPACE:NAME" in command(*words, "kubernetes://tablemesh/x")[2]
    assert "x was not sent from here" in command(*words, "aws_batch://tablemesh/x")[2]


def test_sizes_times_and_mounts():
    assert (submit.memory_mb("60G"), submit.memory_mb("1.5GiB"), submit.memory_mb("900")) == (61440, 1536, 900)
    assert (submit.minutes("45"), submit.minutes("90m"), submit.minutes("1d12h")) == (45, 90, 2160)
    assert submit.mount("/a:/b:ro") == Mount(source="/a", target="/b", read_only=True)
    assert submit.mount("claim:/b").is_volume
    with pytest.raises(UserError):
        submit.minutes("")


def test_a_run_folder_by_its_handle(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("first", "second"):  # a cluster that was set up anew counts from 1 again
        (tmp_path / name).mkdir()
        assert handles.record("slurm", "1", tmp_path / name) == "slurm://tablemesh/1"
    assert handles.find("slurm://tablemesh/1").run_dir == tmp_path / "second"
    assert handles.find(str(tmp_path / "first")).handle == "slurm://tablemesh/1"


def wait(command, run, state, seconds=240):
    deadline = time.monotonic() + seconds
    while (told := json.loads(command("status", run, "--json")[1]))["state"] != state:
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    return told


def test_a_job_in_the_background_to_its_end(command, config, tmp_path, monkeypatch):
    code, out, _ = command("submit", config, "--on", "local", "--module", MODULE, "--json", "--nproc", "2")
    assert code == 0
    told = json.loads(out)
    run = tmp_path / "runs/quickstart"
    assert told == {"handle": f"local://tablemesh/{run}", "run_dir": str(run)}
    found = wait(command, told["handle"], "succeeded")
    assert found["progress"]["status"] == "finished" and found["progress"]["auc"] == 0.7
    assert json.loads((run / "JOB.json").read_text())["resume"] == "auto"
    out = command("logs", told["handle"])[1]
    assert out.count("real trouble ahead") == 1, "of both ranks, once"
    assert "deprecating ShardedTensor" not in out
    assert "deprecating ShardedTensor" in command("logs", told["handle"], "--rank", "1")[1]
    assert "succeeded, now succeeded" in command("cancel", told["handle"])[1]


def test_cancel_stops_all_of_a_background_job(command, config, tmp_path):
    command("submit", config, "--on", "local", "--module", MODULE, "--env", "FAKE=wait", "--nproc", "2")
    run = tmp_path / "runs/quickstart"
    deadline = time.monotonic() + 240
    while len(list(run.glob("rank_*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "running, now " in command("cancel", run)[1]
    for file in run.glob("rank_*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert json.loads(command("status", run, "--json")[1])["state"] in ("cancelled", "failed")


def test_a_failure_starts_again_and_then_is_told(command, config, tmp_path):
    words = ("--module", MODULE, "--env", "FAKE=boom", "--restarts", "1", "--nproc", "2")
    command("submit", config, "--on", "local", *words)
    run = tmp_path / "runs/quickstart"
    found = wait(command, run, "failed")
    assert found["progress"]["status"] == "failed"
    log = (run / "logs/node.log").read_text()
    assert log.count("starting again from the newest checkpoint") == 1 and "error: " in log


def test_containers_that_started_go_when_a_later_one_cannot(monkeypatch):
    """Whatever the reason, such as a daemon that has gone."""
    from types import SimpleNamespace

    from torchx.specs import AppDryRunInfo

    from launch.schedulers import docker

    left = []

    class Container:
        def start(self):
            left.append(self)
            if len(left) == 2:
                raise ConnectionError("gone")

        def remove(self, force):
            left.remove(self)

    client = SimpleNamespace(containers=SimpleNamespace(create=lambda *words, **options: Container()))
    monkeypatch.setattr(docker, "daemon", lambda scheduler: client)
    monkeypatch.setattr(docker, "ensure_network", lambda client: None)
    monkeypatch.setattr(docker.Docker, "find", lambda self, image: None)
    containers = [SimpleNamespace(image="x", command=[], kwargs={}) for _ in range(3)]
    with pytest.raises(UserError, match="docker: gone"):
        docker.Docker("x").schedule(AppDryRunInfo(docker.Request("a", containers), repr))
    assert not left


@pytest.mark.parametrize("program", ["true", "false"])
def test_success_is_written_for_success_alone(program, tmp_path):
    from torchx import specs

    from launch import torchx_local

    scheduler = torchx_local.create_scheduler("x")
    role = specs.Role(name="a", image="", entrypoint=program)
    id = scheduler.submit(specs.AppDef(name="a", roles=[role]), {"log_dir": str(tmp_path)})
    for _ in range(3000):
        if specs.is_terminal(scheduler.describe(id).state):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the job has no end")
    assert bool(list(tmp_path.rglob("SUCCESS"))) == (program == "true")


def torchx(tmp_path, *words):
    """`torchx run WORDS` in the repository's folder, whose .torchxconfig it reads; no docker daemon answers."""
    full = [Path(sys.executable).parent / "torchx", "run", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    return subprocess.run(full, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)


def test_torchx_run(tmp_path):
    """The shipped .torchxconfig makes the component and this machine the defaults."""
    done = torchx(tmp_path, "--dryrun", "--", "--config", QUICKSTART)
    assert done.returncode == 0, done.stderr
    assert "launch.node" in done.stdout and "TABLEMESH_CONFIG" in done.stdout


def test_torchx_run_needs_no_docker_daemon_to_show_a_request(tmp_path):
    """Nor does it make an image of the working directory, which TorchX does unless .torchxconfig says otherwise."""
    done = torchx(
        tmp_path, "--dryrun", "-s", "local_docker", "--", "--config", QUICKSTART, "--image", "x", "--nodes", "2"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("image: x\n") == 2


def test_bad_input_of_torchx_run_is_told_in_words(tmp_path):
    done = torchx(tmp_path, "--dryrun", "--", "--config", QUICKSTART, "--nodes", "3")
    assert done.returncode == 1
    assert "error: 6 ranks do not divide data.streams = 8" in done.stderr and "Traceback" not in done.stderr
