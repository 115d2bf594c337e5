"""The router's agent: reads `inference.requests`, writes `inference.routed` or a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import structlog
from aiokafka.errors import KafkaError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace import metrics
from headrace.access import USER_PREFIX, as_key
from headrace.choice import Choice
from headrace.errors import DeadlineExceeded, HeadraceError, Unavailable
from headrace.limits.limiter import Limiter
from headrace.pools import Pools
from headrace.projection import text
from headrace.published_answers import Answer, refusal
from headrace.redis_client import connect
from headrace.registry import Registry, Snapshot
from headrace.senders import Sent, sender
from headrace.settings import Settings
from processors.router.admission import RouterAdmission
from processors.router.admit import CLAIM_MS, SKEW_MS, check_model, key_of, not_acceptable, read_published
from processors.router.route import Request, Unreadable, decode, refused, route, routed, streams, unreadable_terminal
from schemas.control import Key, Model
from schemas.events import BodyRef, Cancellation, Stage, Status, Terminal
from schemas.ids import is_idempotent
from topics import frames
from topics.agents import AgentRole, Message
from topics.answers import AnswerWriter
from topics.apply import ApplyError
from topics.catalogue import CANCELLATIONS, DAY_MS, REPLIES, REQUESTS, ROUTED, frames_at
from topics.clients import Producer
from topics.dead_letters import NOT_ACCEPTED, bury
from topics.envelope import Envelope, EnvelopeError, Published
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)

RETRY_S = 0.25
T = TypeVar("T")


class Router:
    """Moves batches of requests on; keeps nothing between them."""

    def __init__(
        self,
        settings: Settings,
        producer: Producer,
        registry: Registry,
        pools: Pools,
        redis: Redis,
        admission: RouterAdmission,
    ) -> None:
        self._producer = producer
        self._seals = settings.seals
        self._answers = AnswerWriter(settings, producer)
        self._registry = registry
        self._pools = pools
        self._redis = redis
        self._admission = admission
        self._outcomes = Outcomes(producer, "router", settings.instance)

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
            sent = sender(message, self._seals, snapshot.apps)
        except EnvelopeError as error:
            metrics.NOT_AUTHENTIC.inc()
            return [bury(self._producer, message, reason=f"{NOT_ACCEPTED}{error}", role="router")]
        if sent.published is not None:
            return await self._published(message, sent, sent.published, snapshot)
        try:
            request = decode(
                sent, message.value, partition=message.partition, offset=message.offset, accepted_ms=message.timestamp
            )
        except Unreadable as bad:
            waits: list[Awaitable[object]] = [bury(self._producer, message, reason=bad.reason, role="router")]
            if bad.envelope is not None:
                terminal = unreadable_terminal(bad.envelope, message.timestamp, now_ms(), bad.reason)
                waits.append(self._outcomes.end(terminal))
            return waits
        key = await self._key(request.envelope)
        return await self._choose(request, key, snapshot)

    async def _choose(self, request: Request, key: Key | None, snapshot: Snapshot) -> list[Awaitable[object]]:
        """Choose a request's model, admit it on that, and hand it on; or refuse it."""
        if request.may_lead_elsewhere(snapshot):
            await self._pools.heard(model.pool for model in snapshot.models.values() if model.enabled)
        at = now_ms()
        standing_of = self._pools.standing((request.patient_ms - at) / 1000, request.envelope.priority)
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

    # --- direct publishers ------------------------------------------------------------------------------------

    async def _published(
        self, message: Message, sent: Sent, published: Published, snapshot: Snapshot
    ) -> list[Awaitable[object]]:
        """A message of a direct publisher: checked here as an ingress checks a request over HTTP."""
        envelope, at = sent.envelope, now_ms()
        if published.cancels:
            return [self._cancel(message, sent, at)]
        if (error := not_acceptable(sent, message.timestamp)) is not None:
            metrics.PUBLISHED.labels(outcome="not_acceptable").inc()
            reason = f"{NOT_ACCEPTED}{error.message}"
            return [
                bury(self._producer, message, reason=reason, role="router"),
                self._tell(envelope.tenant, refusal(envelope.request_id, error.info(), at)),
            ]
        if not await self._claim(message, envelope):
            metrics.PUBLISHED.labels(outcome="duplicate").inc()
            metrics.DUPLICATES.inc()
            detail: dict[str, str | int | float | bool] = {"live": False, "source": envelope.source}
            self._outcomes.event(envelope.request_id, envelope.tenant, Stage.DUPLICATE, detail=detail)
            return []
        ref = BodyRef(message.partition, message.offset)
        request = read_published(sent, published, message.value, ref, message.timestamp, at)
        if isinstance(request, Terminal):
            return self._refuse(request)
        detail = {"alias": request.asked.model, "stream": streams(request), "bytes": len(request.value)}
        detail |= {"key_id": envelope.key_id, "publisher": published.publisher}
        self._outcomes.event(
            envelope.request_id, envelope.tenant, Stage.ACCEPTED, at_ms=request.accepted_ms, detail=detail
        )
        admitted = await self._admit(request, published, snapshot)
        if isinstance(admitted, Terminal):
            return self._refuse(admitted)
        metrics.PUBLISHED.labels(outcome="accepted").inc()
        return await self._choose(*admitted, snapshot)

    async def _tell(self, app: str, answer: Answer) -> None:
        """Answer a message that made no request. Best effort: nothing was accepted."""
        try:
            await (await self._answers.post(app, *answer))
        except (ApplyError, KafkaError) as error:
            log.error("refusal_not_told", request_id=answer.request_id, app=app, error=repr(error))

    def _refuse(self, terminal: Terminal) -> list[Awaitable[object]]:
        metrics.PUBLISHED.labels(outcome="refused").inc()
        return [self._outcomes.end(terminal)]

    async def _admit(
        self, request: Request, published: Published, snapshot: Snapshot
    ) -> tuple[Request, Key] | Terminal:
        """A publisher's request, under the key whose rights and limits it has, or its refusal.

        Limits are asked in `_choose`.
        """
        found = await self._api_key(published.api_key_id) if published.api_key_id else None
        try:
            key = key_of(published, found, snapshot, now_ms() / 1000)
        except HeadraceError as error:
            return refused(request, now_ms(), error)
        request = request._replace(envelope=msgspec.structs.replace(request.envelope, key_id=key.id))
        await self._pools.heard(model.pool for model in snapshot.models.values() if model.enabled)
        standing_of = self._pools.standing((request.patient_ms - now_ms()) / 1000, request.envelope.priority)
        return check_model(request, key, snapshot, standing_of, now_ms()) or (request, key)

    async def _claim(self, message: Message, envelope: Envelope) -> bool:
        """Whether this record is the first with its id. The scheduler tells a duplicate too, of what reached it."""
        place = f"{message.partition}:{message.offset}"
        name = f"hr:published:{envelope.request_id}"
        while True:
            try:
                before = await self._redis.set(name, place, nx=True, get=True, px=CLAIM_MS)
                return not isinstance(before, bytes | str) or text(before) == place
            except (RedisError, OSError) as error:
                log.warning("id_not_claimed", request_id=envelope.request_id, error=repr(error))
                await asyncio.sleep(RETRY_S)

    async def _cancel(self, message: Message, sent: Sent, at_ms: int) -> None:
        """Pass a publisher's wish on to the schedulers, who compare its tenant with the request's."""
        envelope = sent.envelope
        if sent.refusal or abs(message.timestamp - envelope.time_ms) > SKEW_MS:
            reason = sent.refusal or f"ce_time is more than {SKEW_MS // 1000} s from the brokers'"
            await bury(self._producer, message, reason=f"{NOT_ACCEPTED}{reason}", role="router")
            return
        metrics.PUBLISHED.labels(outcome="cancel").inc()
        wish = Cancellation(
            envelope.request_id, envelope.tenant, "The publisher asked for it.", at_ms, by=envelope.source
        )
        await self._producer.send(CANCELLATIONS.name, msgspec.json.encode(wish), key=envelope.request_id)

    # --- what both need ---------------------------------------------------------------------------------------

    async def _key(self, envelope: Envelope) -> Key | None:
        """Under which key an ingress admitted a request, or as what key its user counts; None where unknown."""
        if not envelope.key_id.startswith(USER_PREFIX):
            return await self._api_key(envelope.key_id)
        user_id = envelope.key_id.removeprefix(USER_PREFIX)
        user = await self._known(lambda: self._registry.user(user_id))
        return as_key(user, envelope.tenant) if user is not None else None

    async def _api_key(self, key_id: str) -> Key | None:
        """The API key with this id; never a user, whom only an ingress may name."""
        return await self._known(lambda: self._registry.key_by_id(key_id))

    async def _known(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the registry answers, for as long as that takes."""
        while True:
            try:
                return await ask()
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
        if request.published is not None:
            if record.stream:
                # Durable before anybody can write a frame: who reads them learns first whom they are for.
                opened = frames.Opened(record.tenant, record.accepted_ms, model.id)
                data = msgspec.json.encode(opened).decode()
                told = frames.Delta(bytes.fromhex(record.request_id), 0, 0, frames.Kind.OPENED, 0, data)
                topic, partition = frames_at(record.reply_partition)
                await self._producer.send(topic.name, frames.encode([told]), partition=partition)
        elif elsewhere:
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
        router = Router(settings, producer, registry, pools, client, admission)
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
