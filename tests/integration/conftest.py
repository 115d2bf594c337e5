"""Fixtures of tests on projections: a database of their own, and a producer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from clickhouse.migrate import migrate
from headrace.settings import Settings
from schemas.ids import new_request_id
from topics.clients import Producer


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
