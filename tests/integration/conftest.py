"""Fixtures that several integration tests share: the API as a key sees it, the control plane, a database of its own."""

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
from tests.support.chat import Api
from tests.support.control import Role, running_control
from tests.support.stacks import Stack
from topics.clients import Producer


@pytest.fixture
async def api(stack: Stack) -> AsyncIterator[Api]:
    """The API at the first ingress, as the admin's key sees it."""
    async with Api(stack) as made:
        yield made


@pytest.fixture
async def other(stack: Stack) -> AsyncIterator[Api]:
    """The same at the other ingress."""
    async with Api(stack, ingress=1) as made:
        yield made


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
