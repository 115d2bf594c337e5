"""The router's agent: reads `inference.requests`, writes `inference.routed` or a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import msgspec
import structlog

from headrace.errors import Unavailable
from headrace.redis_client import connect
from headrace.registry import Registry, Snapshot
from headrace.settings import Settings
from processors.router.route import Unreadable, route, unreadable_terminal
from schemas.events import Routed, Stage, Terminal
from topics.agents import AgentRole, Message
from topics.catalogue import REQUESTS, ROUTED
from topics.clients import Producer
from topics.dead_letters import bury
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)


class Router:
    """Moves batches of requests on; keeps nothing between them."""

    def __init__(self, producer: Producer, registry: Registry, instance: str) -> None:
        self._producer = producer
        self._registry = registry
        self._outcomes = Outcomes(producer, "router", instance)

    async def handle(self, batch: list[Message]) -> None:
        """Route a batch; returns when all its outputs are durable."""
        snapshot = await self._snapshot()
        waits: list[Awaitable[object]] = []
        for message in batch:
            waits += await self._one(message, snapshot)
        await asyncio.gather(*waits)

    async def _snapshot(self) -> Snapshot:
        """The registry, waited for: an incomplete projection must refuse nobody's model."""
        while True:
            try:
                return self._registry.snapshot
            except Unavailable as error:
                log.warning("registry_unavailable", error=error.message)
                await asyncio.sleep(0.25)

    async def _one(self, message: Message, snapshot: Snapshot) -> list[Awaitable[object]]:
        try:
            routed = route(
                message.value,
                message.headers,
                partition=message.partition,
                offset=message.offset,
                accepted_ms=message.timestamp,
                now_ms=now_ms(),
                snapshot=snapshot,
            )
        except Unreadable as bad:
            waits: list[Awaitable[object]] = [bury(self._producer, message, reason=bad.reason, role="router")]
            if bad.envelope is not None:
                terminal = unreadable_terminal(bad.envelope, message.timestamp, now_ms(), bad.reason)
                waits.append(self._outcomes.end(terminal))
            return waits
        if isinstance(routed, Terminal):
            return [self._outcomes.end(routed)]
        return [await self._forward(routed)]

    async def _forward(self, routed: Routed) -> Awaitable[object]:
        sent = await self._producer.post(ROUTED.name, msgspec.json.encode(routed), key=routed.pool)
        self._outcomes.event(
            routed.request_id,
            routed.tenant,
            Stage.ROUTED,
            at_ms=routed.routed_ms,
            detail={"model": routed.model, "alias": routed.alias, "pool": routed.pool},
        )
        return sent


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life."""
    client = connect(settings.redis_url)
    registry = Registry(client)
    async with Producer(settings.kafka, settings.instance) as producer:
        await registry.start()
        try:
            router = Router(producer, registry, settings.instance)
            await AgentRole(settings, "router", REQUESTS, router.handle).run(stop)
        finally:
            await registry.stop()
            await client.aclose()
