"""The CPU image of docker/Dockerfile, built and run (tests/launch/containers.py). `make test-image`.

Marked "cluster": minutes, gigabytes, root and Debian's packages. TABLEMESH_IMAGE=FILE takes a tar of an image that was
built before (`docker save tablemesh:cpu`) in place of building one.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.launch import containers, small

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINTS = "[checkpoint]\nevery_steps = 10\n"


@pytest.fixture(scope="module")
def daemon():
    """A docker daemon that has the image."""
    why = containers.missing()
    if why:
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="tm") as folder:  # short: the daemon's socket is in it
        given = os.environ.get("TABLEMESH_IMAGE")
        archive = Path(given) if given else containers.build(Path(folder) / "image")
        with containers.Daemon(Path(folder) / "docker") as made:
            made.load(archive)
            yield made


@pytest.fixture
def command(daemon, tmp_path):
    return small.command(tmp_path, daemon.env)


def names(daemon):
    return sorted(container.name for container in daemon.client.containers.list(all=True))


def test_the_image_is_as_it_should_be(daemon):
    image = daemon.client.images.get(containers.IMAGE)
    assert image.attrs["Config"]["User"] == "1000:1000"
    said = daemon.client.containers.run(
        containers.IMAGE, ["sh", "-c", "id -u; pwd; tablemesh doctor --json"], remove=True, network_mode="none"
    ).decode()
    user, folder, doctor = said.split("\n", 2)
    assert (user, folder) == ("1000", "/workspace")
    assert not [check for check in json.loads(doctor)["checks"] if check["state"] == "problem"]


def test_compose_trains_the_quickstart_and_shows_it(daemon, tmp_path):
    words = containers.compose()
    if words is None:
        pytest.skip("neither docker-compose nor `docker compose` is installed (apt-get install docker-compose)")
    for name in ("docker", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    tmp_path.chmod(0o755)

    def compose(*more):
        full = [*words, "-p", "tablemesh", "-f", str(tmp_path / "docker/compose.yaml"), *more]
        done = subprocess.run(full, env=os.environ | daemon.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    try:
        compose("up", "--no-build", "train")
        report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
        assert report["status"] == "finished" and report["world_size"] == 2
        assert abs(report["eval"]["auc"] - report["bayes"]["auc"]) <= 0.01
        page = tmp_path / "runs/quickstart/report.html"
        assert page.stat().st_size > 0 and page.stat().st_uid == 1000
        compose("up", "--no-build", "--detach", "tensorboard")
        (board,) = daemon.client.containers.list(filters={"label": "com.docker.compose.service=tensorboard"})
        ask = "import urllib.request as u; print(u.urlopen('http://localhost:6006/data/runs').read().decode())"
        deadline = time.monotonic() + 100
        while "quickstart" not in (said := board.exec_run(["python", "-c", ask]).output.decode()):
            assert time.monotonic() < deadline, said
            time.sleep(1)
    finally:
        compose("down")


def test_two_containers_train_to_the_losses_of_one_host(command, daemon, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    small.train_here(small.write(alone, name="alone", data=tmp_path / "data"))
    path = small.write(tmp_path, name="two", data=tmp_path / "data")
    told = command("submit", path, "--on", "docker", "--nodes", "2", "--nproc", "1", "--image", containers.IMAGE)
    found = small.until(command, told["handle"], small.ended, "the end")
    said = command("logs", told["handle"], text=True)
    assert found["state"] == "succeeded", said
    run = Path(told["run_dir"])
    assert small.losses(run) == pytest.approx(small.losses(alone / "runs/alone"), rel=1e-6)
    report = json.loads((run / "report.json").read_text())
    assert report["world_size"] == 2 and (run / "report.html").stat().st_uid == os.getuid()
    assert len(names(daemon)) == 2


def test_cancel_saves_and_stops_both(command, daemon, tmp_path):
    path = small.write(tmp_path, name="long", data=tmp_path / "data", epochs=500, more=CHECKPOINTS)
    told = command("submit", path, "--on", "docker", "--nodes", "2", "--nproc", "1", "--image", containers.IMAGE)
    small.until(command, told["handle"], lambda found: (found["progress"]["step"] or 0) >= 10, "step 10")
    stopped = command("cancel", told["handle"])
    assert stopped["state"] in ("cancelled", "failed"), stopped
    assert not daemon.client.containers.list(), "both have ended"
    assert list(Path(told["run_dir"]).glob("checkpoints/step_*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--image", "no/such:image"), "docker has no such image here; `docker pull no/such:image`"),
        (("--image", containers.IMAGE, "--mount", "/no/such/folder:/there"), "bind source path does not exist"),
        (("--image", containers.IMAGE, "--gpus-per-node", "1"), "could not select device driver"),
    ],
)
def test_bad_input_leaves_no_container(words, said, command, daemon, tmp_path):
    before = names(daemon)
    path = small.write(tmp_path, name="bad", data=tmp_path / "data")
    told = command("submit", path, "--on", "docker", "--nodes", "2", "--nproc", "1", *words)
    assert isinstance(told, str) and "error: " in told and said in told, told
    assert names(daemon) == before and not list((tmp_path / "runs").glob("bad*"))
