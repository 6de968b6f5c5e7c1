"""A Slurm cluster of two nodes on this machine, from nothing: munged, mariadbd, slurmdbd, slurmctld, two slurmd.

Needs Debian's slurm-wlm, slurmdbd, munge and mariadb-server, and root: `missing()` says what is not there. Everything
lives in one folder (keys, database, spool, logs) and on ports of its own, beside a cluster that may already run here;
nothing under /etc but one line in /etc/hosts per node, which `stop` takes away again.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch import ports

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sacctmgr", "srun", "sbatch")
NODES = ("tablemesh-n1", "tablemesh-n2")
START_SECONDS = 60.0  # a loaded machine; an idle one takes 3 to 8 s
SBIN = "/usr/sbin:/sbin"


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm slurmdbd munge mariadb-server)"
    if os.geteuid() != 0:
        return "slurmd and munged are started as root here"
    return None


class Cluster:
    """start() and stop(); `env` is what Slurm's commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._running: dict[str, subprocess.Popen] = {}
        self._hosts_added = False
        names = ("slurmctld", "slurmdbd", *NODES, "sql")
        self._ports = dict(zip(names, ports.free_ports(len(names)), strict=True))

    def start(self) -> None:
        for name in ("munge", "db", "state", "spool", "run", "log"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._munge()
        self._database()
        self._write_config()
        self._add_hosts()
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._until(lambda: self.call("sacctmgr", "-n", "list", "cluster", check=False).returncode == 0, "slurmdbd")
        self.call("sacctmgr", "--immediate", "add", "cluster", "tablemesh")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "two idle nodes")

    def stop(self) -> None:
        """End every process, jobs and their ranks included, and take the lines out of /etc/hosts."""
        for name in list(self._running):
            self._kill(name, signal.SIGTERM)
        for pid in _processes_with(f"SLURM_CONF={self.folder}"):
            _signal(pid, signal.SIGKILL)
        self._remove_hosts()

    def call(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        """One of Slurm's commands on this cluster."""
        done = subprocess.run(words, env=os.environ | self.env, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done

    def states(self) -> dict[str, str]:
        lines = self.call("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).stdout.splitlines()
        return dict(line.split() for line in lines)

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if the machine were switched off: slurmd, its step daemons and all that they started, SIGKILL."""
        self._kill(node, signal.SIGKILL)
        for pid in _processes_with(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder}"):
            _signal(pid, signal.SIGKILL)
        for pid in _processes_named("slurmstepd", f"{self.folder}/spool/{node}"):
            _signal(pid, signal.SIGKILL)

    def _munge(self) -> None:
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        here = str(self.folder / "munge")
        (self.folder / "munge").chmod(0o711)
        words = [
            *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
            *(
                f"--socket={here}/socket",
                f"--pid-file={here}/pid",
                f"--seed-file={here}/seed",
                f"--log-file={here}/log",
            ),
        ]
        self._daemon("munged", *words)
        self._until((self.folder / "munge/socket").exists, "munged")

    def _database(self) -> None:
        data, socket_file = self.folder / "db/data", self.folder / "db/socket"
        common = ["--no-defaults", f"--datadir={data}", "--user=root"]
        self._run("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db")
        words = ["mariadbd", *common, f"--socket={socket_file}", f"--port={self._ports['sql']}"]
        words += ["--bind-address=127.0.0.1", f"--pid-file={self.folder}/db/pid", "--innodb-buffer-pool-size=32M"]
        self._daemon("mariadbd", *words)
        self._until(socket_file.exists, "mariadbd")
        sql = "CREATE DATABASE slurm; CREATE USER slurm@localhost IDENTIFIED BY 'slurm'; "
        sql += "CREATE USER slurm@127.0.0.1 IDENTIFIED BY 'slurm'; "
        sql += "GRANT ALL ON slurm.* TO slurm@localhost; GRANT ALL ON slurm.* TO slurm@127.0.0.1;"
        self._run("mariadb", "--no-defaults", f"--socket={socket_file}", "--execute", sql)

    def _write_config(self) -> None:
        here, host = self.folder, socket.gethostname()
        auth = f"AuthType=auth/munge\nAuthInfo=socket={here}/munge/socket,cred_expire=5\n"
        (here / "slurmdbd.conf").write_text(
            f"{auth}DbdHost=localhost\nDbdPort={self._ports['slurmdbd']}\nSlurmUser=root\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={self._ports['sql']}\n"
            f"StorageUser=slurm\nStoragePass=slurm\nStorageLoc=slurm\n"
            f"PidFile={here}/run/slurmdbd.pid\nLogFile={here}/log/slurmdbd\n"
        )
        (here / "slurmdbd.conf").chmod(0o600)
        nodes = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[node]} CPUs=2 RealMemory=2000\n"
            for node in NODES
        )
        (here / "slurm.conf").write_text(
            f"ClusterName=tablemesh\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={self._ports['slurmctld']}\n"
            f"{auth}SlurmUser=root\nSlurmdUser=root\nCredType=cred/munge\n"
            f"StateSaveLocation={here}/state\nSlurmdSpoolDir={here}/spool/%n\n"
            f"SlurmctldPidFile={here}/run/slurmctld.pid\nSlurmdPidFile={here}/run/%n.pid\n"
            f"SlurmctldLogFile={here}/log/slurmctld\nSlurmdLogFile={here}/log/%n\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSchedulerType=sched/backfill\n"
            "SchedulerParameters=sched_interval=1,bf_interval=1\nMpiDefault=none\nSwitchType=switch/none\n"
            "ReturnToService=2\nSlurmdTimeout=10\nSlurmctldTimeout=10\nKillWait=5\nMinJobAge=60\nInactiveLimit=0\n"
            "EnforcePartLimits=ALL\nJobRequeue=1\nOverTimeLimit=0\nBatchStartTimeout=30\nMessageTimeout=20\n"
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
            f"AccountingStoragePort={self._ports['slurmdbd']}\nAccountingStoragePass={here}/munge/socket\n"
            f"{nodes}PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=60 State=UP OverSubscribe=YES:4\n"
        )

    def _add_hosts(self) -> None:
        with open("/etc/hosts", "a") as file:
            file.write("".join(f"127.0.0.1 {node}\n" for node in NODES))
        self._hosts_added = True

    def _remove_hosts(self) -> None:
        if self._hosts_added:
            path = Path("/etc/hosts")
            kept = [line for line in path.read_text().splitlines() if not line.endswith(NODES)]
            path.write_text("\n".join(kept) + "\n")
            self._hosts_added = False

    def _daemon(self, name: str, *words: str) -> None:
        log = open(self.folder / "log" / f"{name}.out", "ab")
        program = _program(words[0])
        assert program is not None
        self._running[name] = subprocess.Popen(
            [program, *words[1:]],
            env=os.environ | self.env | {"PATH": f"{os.environ['PATH']}:{SBIN}"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def _run(self, *words: str) -> None:
        program = _program(words[0])
        assert program is not None
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def _kill(self, name: str, number: signal.Signals) -> None:
        process = self._running.pop(name)
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not true():
            logs = "\n".join(
                f"{p.name}: {p.read_text(errors='replace')[-800:]}" for p in (self.folder / "log").glob("*")
            )
            assert time.monotonic() < deadline, f"{what} did not come within {START_SECONDS:.0f} s\n{logs}"
            time.sleep(0.1)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=SBIN)


def _processes_with(*settings: str) -> list[int]:
    """Processes in whose environment each of these stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if all(f"\0{setting}" in f"\0{text}" for setting in settings) and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def _processes_named(name: str, mention: str) -> list[int]:
    """Processes of this name with a file open, or a working directory, whose path holds `mention`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() != name:
                continue
            links = [os.readlink(link) for link in (folder / "fd").iterdir()]
        except OSError:
            continue
        if any(mention in link for link in links):
            found.append(int(folder.name))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
