"""Redis lost, flushed and rebuilt under a running control role, on real Kafka and Valkey."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid

import msgspec
from redis.asyncio import Redis

from headrace.api_keys import sha256
from headrace.control_client import ControlClient, command
from headrace.rebuild import FETCH_BYTES, rebuild
from headrace.registry import Registry
from headrace.settings import Settings
from processors.control.state import ControlState
from tests.support.control import ADMIN, Role, app, kept, until
from tests.support.publishing import sealed
from topics.catalogue import REQUESTS
from topics.clients import Producer
from topics.envelope import Envelope


async def test_a_flushed_redis_heals_by_itself_with_the_same_answers(
    infra: Settings, client: ControlClient, registry: Registry, redis: Redis
) -> None:
    before, snapshot = await client.read(), registry.snapshot
    await redis.flushall()

    async def whole() -> bool:
        return bool(await redis.exists("hr:gen"))

    assert await until(whole, within=10) < 5
    assert await client.read() == before
    healed = await registry.wait_complete(5)
    assert healed.models == snapshot.models
    assert (await registry.key(sha256(ADMIN))) is not None


async def test_rebuilds_beside_a_busy_processor_lose_nothing(infra: Settings, client: ControlClient) -> None:
    apps = [app() for _ in range(60)]
    done = asyncio.Event()

    async def change() -> None:
        for start in range(0, len(apps), 3):
            await client.submit([command(made, actor="test") for made in apps[start : start + 3]])
        done.set()

    changing = asyncio.create_task(change())
    rebuilds = 0
    while not done.is_set() or rebuilds < 3:
        await rebuild(infra)
        rebuilds += 1
    await changing
    plane = await client.read()
    assert {made.id for made in apps} <= plane.apps.keys()
    await kept(infra, lambda records: ControlState.of(records).apps == plane.apps)


async def test_a_rebuild_remembers_idempotent_requests_of_the_last_day(
    infra: Settings, control: Role, redis: Redis
) -> None:
    tenant, now = f"t-{uuid.uuid4().hex[:8]}", time.time_ns() // 1_000_000
    body = b'{"model":"m","messages":[]}'
    digest = hashlib.sha256(body).hexdigest()
    keyed = Envelope(uuid.uuid4().hex, "/test", now, tenant, "k", 3, digest, 60.0, 30, idempotency_key="order-1")
    plain = msgspec.structs.replace(keyed, request_id=uuid.uuid4().hex, idempotency_key=None)
    async with Producer(infra.kafka, "test") as producer:
        for envelope in (keyed, plain):
            await producer.send(
                REQUESTS.name, body, key=envelope.request_id, headers=sealed(envelope, body, infra.seals)
            )
        await producer.send(REQUESTS.name, b"no envelope")
    told: list[tuple[int, int]] = []
    assert (await rebuild(infra, progress=lambda done, total: told.append((done, total))))["idempotency"] >= 1
    assert told == sorted(told) and told[-1][0] == told[-1][1] >= 3
    name = f"hr:idem:{tenant}:{keyed.request_id}"
    assert [key.decode() for key in await redis.keys(f"hr:idem:{tenant}:*")] == [name]
    held = msgspec.json.decode(await redis.get(name))
    assert held == {"digest": digest, "reply_partition": 3, "created_ms": now, "state": "accepted"}
    assert 86_000 < await redis.ttl(name) <= 86_400
    await redis.set(name, b"newer")
    await rebuild(infra)
    assert await redis.get(name) == b"newer"


async def test_a_rebuild_gets_past_bodies_that_are_larger_than_a_fetch(
    infra: Settings, control: Role, redis: Redis
) -> None:
    tenant, now = f"t-{uuid.uuid4().hex[:8]}", time.time_ns() // 1_000_000
    body = b"x" * (3 * FETCH_BYTES)
    first = Envelope(uuid.uuid4().hex, "/test", now, tenant, "k", 3, "d" * 64, 60.0, 30, idempotency_key="order-1")
    sent = [first, *(msgspec.structs.replace(first, request_id=uuid.uuid4().hex) for _ in range(8))]
    async with Producer(infra.kafka, "test") as producer:
        for envelope in sent:
            await producer.send(
                REQUESTS.name, body, key=envelope.request_id, headers=sealed(envelope, body, infra.seals)
            )
    await rebuild(infra)
    held = {key.decode().rpartition(":")[2] for key in await redis.keys(f"hr:idem:{tenant}:*")}
    assert held == {envelope.request_id for envelope in sent}
