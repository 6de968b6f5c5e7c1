"""docker/Dockerfile built and run on this machine, where no registry of images is to be had.

    image = build(folder)                       a tar file for `docker load`
    with Daemon(folder / "docker") as daemon:   a docker daemon of its own, at daemon.env["DOCKER_HOST"]
        daemon.load(image)

build: mmdebstrap makes the base image (Debian bookworm with its Python 3.11), which buildah tags with the name in the
Dockerfile's FROM line; pip gets its packages from a folder of wheels that this machine has downloaded by its own pip
settings, served on the loopback interface, so that none of those settings, nor a certificate, is needed in the image.
The daemon lives in a network namespace of its own and keeps all files in one folder: at its end its bridges and
firewall rules vanish, and a docker that runs here already notices nothing.

`missing()` says what is not there. Root is needed, and some gigabytes and minutes.
"""

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "docker/Dockerfile"
PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "buildah": "buildah",
    "dockerd": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "unshare": "util-linux",
    "ip": "iproute2",
    "iptables": "iptables",
}
IMAGE = "tablemesh:cpu"
START_SECONDS = 60.0
SBIN = "/usr/sbin:/sbin"


def missing() -> str | None:
    """Why no image can be built and run here, or None."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        packages = " ".join(sorted({PROGRAMS[name] for name in absent}))
        return f"not installed: {', '.join(absent)} (apt-get install {packages})"
    if os.geteuid() != 0:
        return "the base image is made, and the docker daemon started, as root here"
    return None


def build(folder: Path) -> Path:
    """The CPU image as a tar file in `folder`, which gets some gigabytes."""
    wheels, context = folder / "wheels", folder / "context"
    for path in (wheels, context):
        path.mkdir(parents=True)
    download(wheels)
    copy_context(context)
    storage = ["--root", str(folder / "store"), "--runroot", str(folder / "store-run")]
    buildah = functools.partial(_run, "buildah", *storage)
    archive = folder / "image.tar"
    try:
        with served(wheels) as index:
            _base(folder, buildah, index)
            words = ["--isolation", "chroot", "--pull-never", "--file", str(DOCKERFILE), "--target", "cpu"]
            words += ["--build-arg", f"TORCH_INDEX={index}", "--tag", IMAGE]
            buildah("build", *words, str(context))
        buildah("push", "--quiet", IMAGE, f"docker-archive:{archive}:{IMAGE}")
    finally:
        buildah("rmi", "--all", "--force")
        shutil.rmtree(folder / "store")
    return archive


def download(wheels: Path) -> None:
    """All that locks/cpu.txt names, into a folder a package: the tree of a package index."""
    lock = ROOT / "locks/cpu.txt"
    torch = re.search(r"^torch==.*$", lock.read_text(), flags=re.MULTILINE)
    assert torch is not None
    index = os.environ.get("TORCH_INDEX")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", str(wheels)]
    # As the Makefile has it: a wheel of CUDA needs more than the lock file has.
    _run(*pip, *(["--no-deps", "--index-url", index] if index else ["--constraint", str(lock)]), torch[0])
    _run(*pip, "--no-deps", "--requirement", str(lock))
    for wheel in wheels.glob("*.whl"):
        name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        (wheels / name).mkdir(exist_ok=True)
        wheel.rename(wheels / name / wheel.name)


def copy_context(context: Path) -> None:
    """What docker/Dockerfile.dockerignore lets through; of two builders only one reads a file of that name."""
    lines = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    for name in (line[1:] for line in lines if line.startswith("!")):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (context / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, context / name)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on the loopback interface; yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def _base(folder: Path, buildah: functools.partial[str], index: str) -> None:
    """The image that the Dockerfile begins with, under its name, with pip set to this index."""
    (name,) = re.findall(r"^FROM (\S+:\S+) AS base$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    tar = folder / "base.tar"
    hook = f'printf "[global]\\nindex-url = {index}\\n" > "$1/etc/pip.conf"'
    words = ["--quiet", "--variant=minbase", "--include=python3,python3-venv", f"--customize-hook={hook}"]
    _run("mmdebstrap", *words, "bookworm", str(tar))
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, str(tar), "/")
    buildah("commit", "--quiet", "--rm", container, f"docker.io/library/{name}")
    tar.unlink()


class Daemon:
    """env: what docker's clients need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.env = {"DOCKER_HOST": f"unix://{self.socket}"}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Daemon":
        import docker

        self.folder.mkdir(parents=True)
        (self.folder / "daemon.json").write_text("{}")  # not the one of /etc
        words = ["dockerd", "--data-root", str(self.folder / "root"), "--exec-root", str(self.folder / "exec")]
        words += ["--host", self.env["DOCKER_HOST"], "--pidfile", str(self.folder / "pid")]
        words += ["--config-file", str(self.folder / "daemon.json")]
        full = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words]
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [_program(full[0]) or full[0], *full[1:]],
                env=os.environ | {"PATH": f"{os.environ['PATH']}:{SBIN}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = docker.DockerClient(base_url=self.env["DOCKER_HOST"], version="1.41", timeout=120)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            said = (self.folder / "log").read_text(errors="replace")[-1500:]
            assert self._process.poll() is None and time.monotonic() < deadline, f"dockerd does not start: {said}"
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(Exception):  # whatever is wrong with the daemon, it has to end
                for container in self.client.containers.list(all=True):
                    container.remove(force=True)
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.client.close()

    def load(self, archive: Path) -> None:
        with open(archive, "rb") as file:
            self.client.images.load(file)

    def _answers(self) -> bool:
        import docker

        try:
            return self.socket.exists() and self.client.ping()
        except (docker.errors.APIError, OSError):
            return False


def compose() -> list[str] | None:
    """The words that docker's compose is called by, or None."""
    for words in (["docker-compose"], ["docker", "compose"]):
        if shutil.which(words[0]) and subprocess.run([*words, "version"], capture_output=True).returncode == 0:
            return words
    return None


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=SBIN)


def _run(*words: str) -> str:
    """stdout; AssertionError with what the program said when it fails."""
    done = subprocess.run([_program(words[0]) or words[0], *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
