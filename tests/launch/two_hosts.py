"""Two hosts on one machine: network namespaces with host names of their own, joined by a veth pair.

    with Hosts() as hosts:
        hosts.start(0, "python", "-m", "launch.node", ...)     a process on the first host
        hosts.unplug(); hosts.plug(); hosts.limit("20mbit"); hosts.lose(0.05)

Root and a Linux that has namespaces, veth, tbf and iptables' statistic match; `missing()` says what is not there. No
traffic control of packet loss (netem) is needed. Everything is removed at the end, also when a process still runs.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAMS = ("ip", "tc", "iptables", "unshare")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("left", "right")
SBIN = "/usr/sbin:/sbin"


def missing() -> str | None:
    """Why two hosts cannot be made here, or None."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install iproute2 iptables)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Hosts() as hosts:
            hosts.lose(0.5)
            hosts.limit("1mbit")
    except Failed as error:
        return str(error)
    return None


class Failed(RuntimeError):
    """A command of the system's, and what it said."""


class Hosts:
    def __init__(self) -> None:
        self._spaces = [f"tm{os.getpid()}{name}" for name in NAMES]
        self._links = [f"tm{os.getpid()}v{number}" for number in (0, 1)]
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        try:
            for space in self._spaces:
                _call("ip", "netns", "add", space)
            _call("ip", "link", "add", self._links[0], "type", "veth", "peer", "name", self._links[1])
            for space, link, address in zip(self._spaces, self._links, ADDRESSES, strict=True):
                _call("ip", "link", "set", link, "netns", space)
                _call("ip", "-n", space, "addr", "add", f"{address}/24", "dev", link)
                _call("ip", "-n", space, "link", "set", link, "up")
                _call("ip", "-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for space in self._spaces:
            listed = _call("ip", "netns", "pids", space, check=False)
            for pid in listed.split():
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
            _call("ip", "netns", "del", space, check=False)  # its end of the pair, and so the pair, goes with it

    def start(self, host: int, *words: str, **options: Any) -> subprocess.Popen:
        """A process on this host, which has a name that only it knows, as on a machine without DNS."""
        shell = 'hostname "$0" && exec "$@"'
        full = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", "sh", "-c", shell, NAMES[host], *words]
        process = subprocess.Popen([_program("ip"), *full[1:]], **options)
        self._processes.append(process)
        return process

    def unplug(self) -> None:
        """Take the second host's interface down: its addresses go silent, nothing is refused."""
        _call("ip", "-n", self._spaces[1], "link", "set", self._links[1], "down")

    def limit(self, rate: str) -> None:
        """What each host sends at most, such as "20mbit"."""
        for space, link in zip(self._spaces, self._links, strict=True):
            words = ("rate", rate, "burst", "32kbit", "latency", "400ms")
            _call("tc", "-n", space, "qdisc", "replace", "dev", link, "root", "tbf", *words)

    def lose(self, share: float) -> None:
        """Drop this share of the packets that arrive from the other host, at both, at random."""
        for space, link in zip(self._spaces, self._links, strict=True):
            rule = ("-A", "INPUT", "-i", link, "-m", "statistic", "--mode", "random", "--probability", str(share))
            self._iptables(space, *rule, "-j", "DROP")

    def dropped(self, host: int) -> int:
        """Packets that `lose` has dropped there."""
        told = self._iptables(self._spaces[host], "-vnxL", "INPUT")
        return sum(int(line.split()[0]) for line in told.splitlines() if " DROP " in line and "statistic" in line)

    def _iptables(self, space: str, *words: str) -> str:
        """-w: its lock is one for all of the machine, and whoever has it is waited for."""
        return _call("ip", "netns", "exec", space, _program("iptables") or "iptables", "-w", *words)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=SBIN)


def _call(*words: str, check: bool = True) -> str:
    program = _program(words[0])
    assert program is not None
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False, timeout=60)
    if check and done.returncode:
        raise Failed(f"{Path(program).name} {' '.join(words[1:])}: {done.stderr.strip()}")
    return done.stdout
