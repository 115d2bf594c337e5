"""Ports of a stack's parts: free when chosen, remembered in the data directory, used again while they are free."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

_RANGE = range(20_000, 32_000)
"""Below the ports that operating systems give to outgoing connections, which would take a stopped part's port."""


class NoFreePort(Exception):
    """No port of the range could be bound."""


def is_free(host: str, port: int) -> bool:
    """Whether a listener could bind the port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class PortBook:
    """Name of a part -> its port, kept in a small JSON file."""

    def __init__(self, path: Path, chance: random.Random | None = None) -> None:
        self._path = path
        self._chance = chance or random.SystemRandom()
        self._ports = _read(path)

    def port(self, name: str, host: str = "127.0.0.1") -> int:
        """The port of a part: the one it had if that is free, else another free one. Raises NoFreePort."""
        known = self._ports.get(name)
        if known is not None and is_free(host, known):
            return known
        taken = set(self._ports.values())
        for port in self._chance.sample(_RANGE, 200):
            if port not in taken and is_free(host, port):
                self._ports[name] = port
                return port
        raise NoFreePort(f"none of 200 ports tried between {_RANGE.start} and {_RANGE.stop} of {host} is free")

    def save(self) -> None:
        """Write what was chosen."""
        self._path.write_text(json.dumps(self._ports, indent=1))


def _read(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): int(port) for name, port in found.items()} if isinstance(found, dict) else {}
