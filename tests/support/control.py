"""A control role as a process, and what its tests ask."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from headrace.apply import apply_config
from headrace.config import default_config
from headrace.control_client import command, control_client
from headrace.control_log import replay_control
from headrace.settings import Settings
from processors.control.writer import TOPICS
from schemas.control import App
from topics.apply import apply_all
from topics.catalogue import CONTROL_COMMANDS, DEAD_LETTERS
from topics.clients import LogReader
from topics.dead_letters import describe

ADMIN = "hr-test-admin"
START = "from headrace.cli import main; main()"


class Role:
    """`headrace run control` as a process."""

    def __init__(self, settings: Settings, instance: str) -> None:
        self._env = os.environ | {
            "HEADRACE_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
            "HEADRACE_REDIS_URL": settings.redis_url,
            "HEADRACE_DATA_DIR": str(settings.data_dir),
            "HEADRACE_INSTANCE": instance,
        }
        self._log = settings.data_dir / f"{instance}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", START, "run", "control", env=self._env, stdout=log, stderr=log
            )

    def send(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    async def ended(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    def log(self) -> str:
        return self._log.read_text()

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def until(holds: Callable[[], Awaitable[bool]], within: float) -> float:
    """Wait for something to become true; seconds that it took. Fails after `within` seconds."""
    start = time.monotonic()
    async with asyncio.timeout(within):
        found = await holds()
        while not found:
            await asyncio.sleep(0.01)
            found = await holds()
    return time.monotonic() - start


@asynccontextmanager
async def running_control(infra: Settings) -> AsyncIterator[Role]:
    """A running control role with the default configuration in force."""
    await apply_all(infra, workers=[])
    role = Role(infra, "control-test")
    await role.start()
    try:
        await apply_config(infra, default_config(), admin_key=ADMIN)
        async with control_client(infra, timeout=60) as client:
            await client.submit([command(app(), actor="test")])  # Only an owner answers; all else may be in force.
        yield role
    finally:
        await role.kill()


def app(name: str = "") -> App:
    return App(id=f"app-{uuid.uuid4().hex[:8]}", name=name or "A test's")


async def kept(settings: Settings, look: Callable[[dict[str, dict[str, bytes]]], bool]) -> None:
    """Wait until the control topics, read whole, are as `look` wants them.

    A transaction is acknowledged before the marks that end it are in its topics, and readers pass it over until then.
    """

    async def as_wanted() -> bool:
        return look((await replay_control(settings, TOPICS)).records)

    await until(as_wanted, within=10)


async def letters(infra: Settings) -> list[tuple[str, bytes | None]]:
    """Reason and value of every dead letter of control commands."""
    async with LogReader(infra.kafka, "test", max_wait_ms=100) as reader:
        found = [record async for record in reader.read_to_end(reader.assign([DEAD_LETTERS]))]
    described = [(describe(record.headers)[0], record.value) for record in found]
    return [(letter.reason, value) for letter, value in described if letter.source_topic == CONTROL_COMMANDS.name]
