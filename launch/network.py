"""Which network interface leads to the other nodes of a job.

Gloo listens at the address that the host's name resolves to. On many hosts that is a loopback address (Debian writes
127.0.1.1 into /etc/hosts), which no other node reaches; the interface by which node 0 is reached is the right one.
NCCL chooses for itself, by speed, and is left alone.
"""

import fcntl
import os
import socket
import struct

GLOO = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: an interface's IPv4 address


def choose(master: str) -> None:
    """Have this node's ranks listen where node 0, at `master`, is reached; what the user has set stays."""
    if GLOO not in os.environ and (name := interface_to(master)):
        os.environ[GLOO] = name


def interface_to(host: str) -> str | None:
    """The interface whose IPv4 address packets to `host` come from; None where there is no telling.

    Node 0 gets the one that has its own address, unless it is told "localhost" and not that address, as on Kubernetes.
    Nothing is sent.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            own = probe.getsockname()[0]
            if own.startswith("127."):
                return None
            for _, name in socket.if_nameindex():
                if _address(probe, name) == own:
                    return name
    except OSError:  # an unknown name, or no route
        return None
    return None


def _address(probe: socket.socket, name: str) -> str | None:
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(answer[20:24])
