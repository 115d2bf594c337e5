"""The metering agent: reads `inference.log`, writes `usage.events`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import msgspec
import structlog

from headrace import metrics
from headrace.cancellation import end
from headrace.limits.limiter import Limiter
from headrace.redis_client import connect
from headrace.settings import Settings
from processors.metering.meter import usage_of
from processors.metering.settlement import Settlement
from schemas.events import Terminal
from topics import request_log
from topics.agents import AgentRole, Message
from topics.catalogue import LOG, USAGE
from topics.clients import Producer
from topics.dead_letters import bury
from topics.log_memory import LogMemory

log = structlog.get_logger(__name__)

GATHER_S = 0.1
"""Usage may come this much later; many terminals share a write then."""


class Metering:
    """Folds the log into usage. What it must remember of a request is in the log itself, shortly before."""

    def __init__(self, settings: Settings, producer: Producer) -> None:
        self._producer = producer
        self._memory = LogMemory(settings.kafka, "metering-warm-up")

    async def handle(self, batch: list[Message]) -> None:
        """Meter a batch; returns when its usage events are durable."""
        waits: list[Awaitable[object]] = []
        for message in batch:
            try:
                record = request_log.decode(message.value or b"")
            except msgspec.MsgspecError as error:
                waits.append(bury(self._producer, message, reason=str(error), role="metering"))
                continue
            terminal = await self._memory.apply(record, message.partition, message.offset, message.timestamp)
            if terminal is not None:
                waits.append(await self._meter(terminal))
        await asyncio.gather(*waits)

    async def _meter(self, terminal: Terminal) -> Awaitable[object]:
        usage = usage_of(terminal)
        metrics.USAGE_EVENTS.labels(status=usage.status.value).inc()
        metrics.USAGE_TOKENS.labels(model=usage.model, kind="prompt").inc(usage.prompt_tokens)
        metrics.USAGE_TOKENS.labels(model=usage.model, kind="completion").inc(usage.completion_tokens)
        return await self._producer.post(USAGE.name, msgspec.json.encode(usage), key=usage.tenant)

    def forget_partitions(self, partitions: frozenset[int]) -> None:
        """Another member may move these on; look back again when they return."""
        self._memory.drop(partitions)


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life: usage by the agent, and beside it the settlement of the same partitions."""
    redis = connect(settings.redis_url)
    settlement = Settlement(settings, Limiter(redis))
    async with Producer(settings.kafka, settings.instance) as producer:
        metering = Metering(settings, producer)
        agent = AgentRole(settings, "metering", LOG, metering.handle, gather_s=GATHER_S)

        async def lost(partitions: frozenset[int]) -> None:
            metering.forget_partitions(partitions)
            settlement.lost(partitions)

        async def gained(partitions: frozenset[int]) -> None:
            metering.forget_partitions(partitions)
            settlement.gained(partitions)

        agent.on_partitions(gained, lost)
        settling = asyncio.create_task(settlement.run(), name="settlement")
        settling.add_done_callback(
            lambda done: None if done.cancelled() else agent.fail(done.exception() or RuntimeError("settlement"))
        )
        try:
            await agent.run(stop)
        finally:
            await end(settling)
            await redis.aclose()
