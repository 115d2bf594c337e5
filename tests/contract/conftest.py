"""What contract tests share: engines, a Valkey and a ClickHouse."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from clickhouse_connect.driver.asyncclient import AsyncClient
from redis.asyncio import Redis

from clickhouse.client import connect as connect_clickhouse
from clickhouse.migrate import migrate
from deploy.embedded.ports import PortBook
from headrace.projection import Projection
from headrace.redis_client import connect
from headrace.settings import Settings
from tests.support.backends import MAKERS, Backend
from tests.support.valkey import Valkey


@pytest.fixture(scope="session", params=MAKERS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Each kind of provider with a loaded model; one engine a kind for all suites."""
    async with MAKERS[request.param]() as made:
        await made.provider.load(made.model)
        yield made


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server of the module's own, to be killed and started again."""
    made = Valkey(tmp_path_factory.mktemp("valkey"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    """A client of it, which finds it empty."""
    client = connect(valkey.url)
    await valkey.answer(client)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def projection(redis: Redis) -> Projection:
    """The projection over it."""
    return Projection(redis)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    port = PortBook(tmp_path_factory.mktemp("ports") / "ports.json").port("clickhouse")
    data = tmp_path_factory.mktemp("clickhouse")
    argv = [sys.executable, "-m", "deploy.embedded.clickhouse_server", "--data", str(data), "--port", str(port)]
    process = subprocess.Popen(argv, cwd=Path(__file__).parents[2])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(url, process)
        yield Settings(clickhouse_url=url)
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=1):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError("ClickHouse did not come up")


@pytest.fixture(scope="session")
def migrated(server: Settings) -> Settings:
    migrate(server)
    return server


@pytest.fixture
async def client(migrated: Settings) -> AsyncIterator[AsyncClient]:
    connected = await connect_clickhouse(migrated)
    yield connected
    await connected.close()
