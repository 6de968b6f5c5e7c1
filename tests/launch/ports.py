"""Ports for tests that have to name one before anybody listens on it."""

import random
import socket

RANGE = range(22_000, 32_000)  # below those that kernels give to connections, and to listeners that name none


def free_ports(count: int) -> list[int]:
    """Different ones; not the same in two test processes that were seeded alike."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().choice(RANGE)
        with socket.socket() as one:
            try:
                one.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.add(port)
    return list(found)


def free_port() -> int:
    return free_ports(1)[0]
