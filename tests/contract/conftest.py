"""What contract tests share: an engine of each kind, a Valkey; and what the summary of a run says of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from headrace.projection import Projection
from headrace.redis_client import connect
from tests.support.backends import MAKERS, Backend, ran
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Ollama server the provider suite ran against."""
    for server in ran:
        terminalreporter.write_line(f"ollama provider: ran against {server}")
