"""Rebuilding Redis from Kafka: the control plane, idempotent requests, what models are, what limits hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import structlog
from redis.asyncio import Redis

from headrace.control_log import CommittedReader, Replay, end_offsets
from headrace.errors import Unavailable
from headrace.limits.restore import restore
from headrace.model_facts import FactsCache, rebuild_facts
from headrace.projection import Projection
from headrace.redis_client import connect
from headrace.senders import sender
from headrace.settings import Settings
from topics.catalogue import DAY_MS, REQUESTS
from topics.clients import LogReader
from topics.envelope import IDEMPOTENCY_HEADER, EnvelopeError
from topics.record import Record
from topics.signing import Seals

log = structlog.get_logger(__name__)

IDEMPOTENCY_TTL_MS = DAY_MS
TRIES = 100
RETRY_S = 0.1
FETCH_BYTES = 1024 * 1024
"""Of each partition at a time: bodies of a whole day pass by, and few of them should be here at once."""

Progress = Callable[[int, int], None]
"""Called with (requests read, requests to read)."""


def idempotency_key(tenant: str, request_id: str) -> str:
    """Redis key of what is remembered of an idempotent request."""
    return f"hr:idem:{tenant}:{request_id}"


async def rebuild(settings: Settings, *, progress: Progress | None = None, limits: bool = True) -> dict[str, int]:
    """Fill a new generation from Kafka and put it into force; counts of what was restored, by kind.

    What limits hold is restored after it, which takes longer: a month's usage is read. Without `limits` it is left out.

    Safe beside a running control processor: the new generation is put into force only when it holds at least what the
    old one holds, in the same atomic step, and a later record is applied to whichever is in force. Raises `RedisError`,
    `KafkaError` or `Unavailable`.
    """
    redis = connect(settings.redis_url)
    try:
        async with CommittedReader(settings.kafka, f"rebuild-{settings.instance}") as reader:
            projection, replay = Projection(redis), Replay(reader)
            await replay.read_on()
            remembered = await _restore_idempotency(settings, redis, progress)
            facts = await rebuild_facts(settings.kafka, f"rebuild-facts-{settings.instance}", FactsCache(redis))
            for _ in range(TRIES):
                if await _put_into_force(settings, projection, replay):
                    break
                await asyncio.sleep(RETRY_S)
                await replay.read_on()
            else:
                raise Unavailable(
                    "Redis could not be rebuilt: what it holds stays newer than what Kafka gives. Try again."
                )
        reserved = (
            await restore(settings.kafka, settings.instance, redis, settings.limits_default_output) if limits else 0
        )
    finally:
        await redis.aclose()
    others = {"idempotency": remembered, "facts": facts, "reservations": reserved}
    counts = {kind: len(held) for kind, held in replay.records.items()} | others
    log.info("redis_rebuilt", **counts)
    return counts


async def _put_into_force(settings: Settings, projection: Projection, replay: Replay) -> bool:
    """Whether what was read is now in force; if not, it was not new enough, or the server forgot it meanwhile."""
    fill = await projection.begin(replay.records, replay.offsets)
    outcome = await projection.flip(fill, replay.offsets)
    if outcome == "behind" and await _made_anew(settings, projection):
        outcome = await projection.flip(fill, replay.offsets, force=True)
    if outcome == "flipped":
        return True
    log.info("generation_not_in_force", outcome=outcome)
    await projection.drop(fill)
    return False


async def _made_anew(settings: Settings, projection: Projection) -> bool:
    """Whether Redis holds offsets that Kafka does not have: the topics were made anew, so Kafka decides."""
    held, ends = (await projection.state()).offsets, await end_offsets(settings)
    return any(held.get(topic, 0) > end for topic, end in ends.items())


async def _restore_idempotency(settings: Settings, redis: Redis, progress: Progress | None) -> int:
    """Remember again the idempotent requests of the last 24 h; what Redis still knows is left as it is."""
    count = done = 0
    seals = settings.seals
    seconds, micros = await redis.time()
    now_ms = seconds * 1000 + micros // 1000
    async with LogReader(
        settings.kafka, f"rebuild-idempotency-{settings.instance}", max_wait_ms=100, fetch_bytes=FETCH_BYTES
    ) as reader:
        assignment = reader.assign([REQUESTS])
        await reader.seek_to_time(assignment, now_ms - IDEMPOTENCY_TTL_MS)
        ends = await reader.consumer.end_offsets(assignment)
        total = sum([ends[at] - await reader.position(at) for at in assignment])
        async for records in reader.batches_to_end(assignment, ends):
            count += await _remember(redis, records, now_ms, seals)
            done += len(records)
            if progress is not None:
                progress(done, max(done, total))
    return count


async def _remember(redis: Redis, records: Sequence[Record], now_ms: int, seals: Seals) -> int:
    """Put the reservations of idempotent requests into Redis; how many it did not know. Only ingresses make them."""
    async with redis.pipeline(transaction=False) as pipe:
        for record in records:
            left_ms = record.timestamp + IDEMPOTENCY_TTL_MS - now_ms
            if left_ms <= 0 or not any(name == IDEMPOTENCY_HEADER for name, _ in record.headers):
                continue
            try:
                envelope = sender(record, seals, {}).envelope
            except EnvelopeError:
                continue  # The router counts and buries it.
            value = {
                "digest": envelope.digest,
                "reply_partition": envelope.reply_partition,
                "created_ms": envelope.time_ms,  # As in the public id that the first caller was given.
                "state": "accepted",
            }
            key = idempotency_key(envelope.tenant, envelope.request_id)
            pipe.set(key, json.dumps(value), nx=True, px=left_ms)
        return sum(bool(made) for made in await pipe.execute())
