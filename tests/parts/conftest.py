"""Kafka, Valkey and ClickHouse without a role; the control plane on them, and a database of a test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from clickhouse.migrate import migrate
from headrace.control_client import ControlClient, control_client
from headrace.redis_client import connect
from headrace.registry import Registry
from headrace.settings import Settings
from schemas.ids import new_request_id
from tests.support.control import Role, running_control
from tests.support.stacks import running_infra
from topics.apply import apply_all
from topics.clients import Producer


@pytest.fixture(scope="package")
async def infra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    """Kafka with the catalogue's topics, Valkey, and ClickHouse with its tables; no role runs."""
    with running_infra(tmp_path_factory.mktemp("infra") / "data") as conf:
        await apply_all(conf, workers=["w1"])
        await asyncio.to_thread(migrate, conf)
        yield conf


@pytest.fixture(scope="module")
async def control(infra: Settings) -> AsyncIterator[Role]:
    """A running control role with the default configuration in force."""
    async with running_control(infra) as role:
        yield role


@pytest.fixture
async def client(infra: Settings, control: Role) -> AsyncIterator[ControlClient]:
    """Who asks the control role for changes."""
    async with control_client(infra, timeout=20) as made:
        yield made


@pytest.fixture
async def redis(infra: Settings) -> AsyncIterator[Redis]:
    """Where the control role keeps its projection."""
    made = connect(infra.redis_url)
    yield made
    await made.aclose()


@pytest.fixture
async def registry(control: Role, redis: Redis) -> AsyncIterator[Registry]:
    """The projection as an ingress reads it."""
    made = Registry(redis)
    await made.start()
    await made.wait_complete(20)
    yield made
    await made.stop()


@pytest.fixture
async def conf(infra: Settings) -> Settings:
    """A database of its own; a sink of an earlier test may still have to be timed out by the group."""
    database = f"sink_{new_request_id()}"
    made = infra.model_copy(update={"clickhouse_database": database, "instance": "sink-test"})
    await asyncio.to_thread(migrate, made)
    return made


@pytest.fixture
async def producer(infra: Settings) -> AsyncIterator[Producer]:
    async with Producer(infra.kafka, "sink-test") as made:
        yield made
