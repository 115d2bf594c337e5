"""The router's agent: reads `inference.requests`, writes `inference.routed` or a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.access import USER_PREFIX, as_key
from headrace.choice import Choice
from headrace.errors import DeadlineExceeded, HeadraceError, Unavailable
from headrace.limits.limiter import Limiter
from headrace.pools import Pools
from headrace.projection import text
from headrace.redis_client import connect
from headrace.registry import Registry, Snapshot
from headrace.settings import Settings
from processors.router.admission import RouterAdmission
from processors.router.route import Request, Unreadable, decode, refused, route, routed, unreadable_terminal
from schemas.control import Key, Model
from schemas.events import Stage, Status, Terminal
from schemas.ids import is_idempotent
from topics import frames
from topics.agents import AgentRole, Message
from topics.catalogue import DAY_MS, REPLIES, REQUESTS, ROUTED
from topics.clients import Producer
from topics.dead_letters import bury
from topics.envelope import Envelope
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)

RETRY_S = 0.25


class Router:
    """Moves batches of requests on; keeps nothing between them."""

    def __init__(
        self,
        producer: Producer,
        registry: Registry,
        pools: Pools,
        redis: Redis,
        admission: RouterAdmission,
        instance: str,
    ) -> None:
        self._producer = producer
        self._registry = registry
        self._pools = pools
        self._redis = redis
        self._admission = admission
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
                await asyncio.sleep(RETRY_S)

    async def _one(self, message: Message, snapshot: Snapshot) -> list[Awaitable[object]]:
        try:
            request = decode(
                message.value,
                message.headers,
                partition=message.partition,
                offset=message.offset,
                accepted_ms=message.timestamp,
            )
        except Unreadable as bad:
            waits: list[Awaitable[object]] = [bury(self._producer, message, reason=bad.reason, role="router")]
            if bad.envelope is not None:
                terminal = unreadable_terminal(bad.envelope, message.timestamp, now_ms(), bad.reason)
                waits.append(self._outcomes.end(terminal))
            return waits
        key = await self._key(request.envelope)
        if request.may_lead_elsewhere(snapshot):
            await self._pools.heard(model.pool for model in snapshot.models.values() if model.enabled)
        at = now_ms()
        standing_of = self._pools.standing((request.patient_ms - at) / 1000)
        chosen = route(request, now_ms=at, snapshot=snapshot, key=key, standing_of=standing_of)
        if isinstance(chosen, Terminal):
            return [self._outcomes.end(chosen)]
        model = chosen.model if chosen.pools == 1 else await self._once(request, chosen.model, snapshot)
        try:
            admitted = await self._admission.admit(request, key, model, snapshot)
        except Unavailable:
            gone = DeadlineExceeded("Its limits could not be checked before its deadline; send it again.")
            return [self._outcomes.end(refused(request, now_ms(), gone, status=Status.EXPIRED))]
        except HeadraceError as error:
            return [self._outcomes.end(refused(request, now_ms(), error))]
        return await self._forward(request, chosen, admitted.model, at, admitted.cap)

    async def _key(self, envelope: Envelope) -> Key | None:
        """Under which key a request was sent; None where that is not known."""
        key_id = envelope.key_id
        while True:
            try:
                if not key_id.startswith(USER_PREFIX):
                    return await self._registry.key_by_id(key_id)
                user = await self._registry.user(key_id.removeprefix(USER_PREFIX))
                return as_key(user, envelope.tenant) if user is not None else None
            except Unavailable as error:
                log.warning("key_unavailable", error=error.message)
                await asyncio.sleep(RETRY_S)

    async def _once(self, request: Request, model: Model, snapshot: Snapshot) -> Model:
        """The model that this request was given first: routed again after a crash, it must not reach a second pool.

        Within a pool its scheduler tells a duplicate by itself.
        """
        envelope = request.envelope
        left_ms = DAY_MS if is_idempotent(envelope.request_id) else max(1_000, request.late_ms - now_ms())
        name = f"hr:routed:{envelope.tenant}:{envelope.request_id}"
        while True:
            try:
                before = await self._redis.set(name, model.id, nx=True, get=True, px=left_ms)
                break
            except (RedisError, OSError) as error:
                log.warning("choice_not_kept", request_id=envelope.request_id, error=repr(error))
                await asyncio.sleep(RETRY_S)
        return snapshot.models.get(text(before), model) if isinstance(before, bytes | str) else model

    async def _forward(
        self, request: Request, choice: Choice, model: Model, at_ms: int, cap: int | None
    ) -> list[Awaitable[object]]:
        """Hand a request on to its model's pool, and tell its caller's ingress where that is not the one it named."""
        record = routed(request, model, at_ms, cap)
        waits: list[Awaitable[object]] = []
        elsewhere = record.alias not in (model.id, *model.aliases)
        if elsewhere:
            told = frames.Delta(bytes.fromhex(record.request_id), 0, 0, frames.Kind.MODEL, 0, model.id)
            waits.append(
                await self._producer.post(REPLIES.name, frames.encode([told]), partition=record.reply_partition)
            )
        waits.append(await self._producer.post(ROUTED.name, msgspec.json.encode(record), key=record.pool))
        detail: dict[str, str | int | float | bool] = {
            "model": record.model,
            "alias": record.alias,
            "pool": record.pool,
            "priority": record.priority,
        }
        if choice.task:
            detail["task"] = choice.task
        elif elsewhere:
            detail["fallback"] = True
        if choice.explanation and model is choice.model:
            detail["not_chosen"] = choice.explanation
        self._outcomes.event(record.request_id, record.tenant, Stage.ROUTED, at_ms=record.routed_ms, detail=detail)
        return waits


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life. Raises what its agent, or its reader of `pool.status`, raised."""
    client = connect(settings.redis_url)
    registry = Registry(client)
    pools = Pools(settings.kafka, settings.instance)
    async with Producer(settings.kafka, settings.instance) as producer:
        await registry.start()
        limiter = Limiter(client, allow_on_outage=settings.limits_on_outage == "allow")
        admission = RouterAdmission(limiter, settings.limits_default_output)
        router = Router(producer, registry, pools, client, admission, settings.instance)
        agent = AgentRole(settings, "router", REQUESTS, router.handle)
        listening = asyncio.create_task(pools.run())
        listening.add_done_callback(
            lambda done: None if done.cancelled() else agent.fail(done.exception() or RuntimeError("pools"))
        )
        try:
            await agent.run(stop)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await registry.stop()
            await client.aclose()
