"""A Valkey for the length of a benchmark, as the embedded stack configures it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from deploy.embedded import valkey
from deploy.embedded.ports import PortBook

START_S = 20.0


@contextmanager
def running_valkey(home: Path) -> Iterator[str]:
    """The URL of a server on loopback."""
    port = PortBook(home / "ports.json").port("valkey")
    spec = valkey.prepare(home, port, "bench")
    with (home / "log").open("ab") as out:
        process = subprocess.Popen(spec.argv, stdout=out, stderr=out)
    url = f"redis://:bench@127.0.0.1:{port}/0"
    try:
        give_up = time.monotonic() + START_S
        while True:
            try:
                with Redis.from_url(url) as client:
                    client.ping()
                break
            except RedisError:
                if time.monotonic() > give_up or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()
