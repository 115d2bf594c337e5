"""The audit trail on real Kafka: chained by one writer through kills and takeovers, and no tampering unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.records_to_delete import RecordsToDelete

from headrace import audit, audit_trail
from headrace.audit_chain import digest
from headrace.audit_trail import Filter
from headrace.control_client import CommandsRefused, ControlClient, command, control_client
from headrace.settings import Settings
from schemas.audit import AuditEvent
from schemas.control import Model
from tests.support.control import Role, app, until
from topics.catalogue import AUDIT_EVENTS, AUDIT_HEADS, CONTROL_COMMANDS
from topics.clients import LogReader, Producer


async def events(infra: Settings, **wanted: str) -> list[AuditEvent]:
    """Events that match, oldest first."""
    return (await audit_trail.page(infra, Filter(**wanted), limit=5_000)).events[::-1]  # type: ignore[arg-type]


async def test_changes_refusals_notes_and_garbage_are_written_down_once(infra: Settings, client: ControlClient) -> None:
    made, actor = app("first"), f"test {uuid.uuid4().hex}"
    garbage = b"\xff" + uuid.uuid4().bytes
    renamed = msgspec.structs.replace(made, name="2nd")
    sent = [command(made, actor=actor, reason="wanted"), command(renamed, actor=actor)]
    await client.submit(sent)
    with pytest.raises(CommandsRefused):
        await client.submit([command(Model(id="m", provider="gone", backend_tag="x"), actor=actor)])
    said = audit.note("read", "requests", "r1", actor=actor, tenant="other")
    async with Producer(infra.kafka, "test") as producer:
        await audit.record(producer, said, said)
        at = await producer.send(CONTROL_COMMANDS.name, garbage)
        await producer.send(CONTROL_COMMANDS.name, msgspec.json.encode(sent[0]))  # Delivered again, much later.

    async def garbage_is_told() -> bool:
        place = f"{CONTROL_COMMANDS.name}/0/{at.offset}@{at.timestamp}"
        return bool(await events(infra, key=place, outcome="unreadable"))

    await until(garbage_is_told, within=10)
    await client.submit([command(app(), actor="test")])
    found = await events(infra, actor=actor)
    assert [(one.action, one.kind, one.key, one.outcome) for one in found] == [
        ("create", "apps", made.id, "applied"),
        ("update", "apps", made.id, "applied"),
        ("create", "models", "m", "refused"),
        ("read", "requests", "r1", "done"),
    ]
    assert (found[0].reason, found[1].changes["name"].after) == ("wanted", '"2nd"')
    assert found[2].refusal == "model 'm': there is no provider 'gone'"
    assert (await client.read()).apps[made.id].name == "2nd", "what comes again is not done again"
    verdict = await audit_trail.verify(infra)
    assert verdict.broken is None and verdict.anchors > 0 and verdict.first == 1


async def test_the_chain_goes_on_through_kills_and_nothing_is_written_twice(
    infra: Settings, control: Role, client: ControlClient
) -> None:
    actor = f"test {uuid.uuid4().hex}"
    apps = [app(str(number)) for number in range(300)]
    for start in range(0, 300, 100):
        batch = apps[start : start + 100]
        submitting = asyncio.create_task(client.submit([command(made, actor=actor) for made in batch]))

        async def some(last: str = batch[start // 10].id) -> bool:
            return last in (await client.read()).apps

        await until(some, within=30)
        await control.kill()
        await control.start()
        with contextlib.suppress(Exception):
            await submitting
    async with control_client(infra, timeout=60) as patient:
        await patient.submit([command(app(), actor="test")])
    found = await events(infra, actor=actor)
    assert [(one.key, one.outcome) for one in found] == [(made.id, "applied") for made in apps]
    assert (await audit_trail.verify(infra)).broken is None


async def test_a_page_ends_where_the_next_begins(infra: Settings, client: ControlClient) -> None:
    actor = f"test {uuid.uuid4().hex}"
    await client.submit([command(app(), actor=actor) for _ in range(7)])
    whole, got, before = await events(infra, actor=actor), [], None
    for _ in range(4):
        page = await audit_trail.page(infra, Filter(actor=actor), limit=2, before=before)
        got, before = got + page.events, page.next
    assert got == whole[::-1] and len(got) == 7


@pytest.fixture
async def copy(infra: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Settings]:
    """Where `verify` reads is a copy of the trail, which a test may write to."""
    copies = [replace(topic, name=f"test.{uuid.uuid4().hex}") for topic in (AUDIT_EVENTS, AUDIT_HEADS)]
    admin = AIOKafkaAdminClient(bootstrap_servers=infra.kafka_bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(made.name, 1, 1) for made in copies])
    async with LogReader(infra.kafka, "test", committed=True) as reader, Producer(infra.kafka, "test") as producer:
        for topic, made in zip((AUDIT_EVENTS, AUDIT_HEADS), copies, strict=True):
            async for record in reader.read_to_end(reader.assign([topic])):
                await producer.send(made.name, record.value, key=(record.key or b"").decode())
    monkeypatch.setattr(audit_trail, "AUDIT_EVENTS", copies[0])
    monkeypatch.setattr(audit_trail, "AUDIT_HEADS", copies[1])
    yield infra
    await admin.delete_topics([made.name for made in copies])
    await admin.close()


async def test_a_forged_event_at_the_end_is_found(copy: Settings, client: ControlClient) -> None:
    whole = await audit_trail.verify(copy)
    assert whole.broken is None
    forged: dict[str, object] = {"seq": whole.head.seq + 1, "previous": whole.head.hash, "at_ms": 1, "command": "c"}
    forged |= {"actor": "nobody"} | {"action": "update", "kind": "keys", "key": "key-1", "outcome": "applied"}
    forged["hash"] = digest(forged)
    async with Producer(copy.kafka, "test") as producer:
        await producer.send(audit_trail.AUDIT_EVENTS.name, json.dumps(forged).encode())
    broken = (await audit_trail.verify(copy)).broken
    assert broken is not None and broken.seq == whole.head.seq + 1


async def test_a_beginning_that_somebody_deleted_is_found(copy: Settings, client: ControlClient) -> None:
    """`kafka-delete-records` leaves what retention would leave, but too early."""
    whole = await audit_trail.verify(copy)
    admin = AIOKafkaAdminClient(bootstrap_servers=copy.kafka_bootstrap)
    await admin.start()
    partition = TopicPartition(audit_trail.AUDIT_EVENTS.name, 0)
    await admin.delete_records({partition: RecordsToDelete(before_offset=whole.head.seq)})
    await admin.close()
    broken = (await audit_trail.verify(copy)).broken
    assert broken is not None and broken.seq == whole.head.seq and "gone" in broken.why


async def test_a_writer_that_slept_through_its_replacement_adds_nothing(
    infra: Settings, control: Role, client: ControlClient
) -> None:
    """The last test here: it leaves no role running."""
    actor = f"test {uuid.uuid4().hex}"
    made = [app(str(number)) for number in range(3)]
    await client.submit([command(made[0], actor=actor)])
    control.send(signal.SIGSTOP)
    successor = Role(infra, "control-successor")
    await successor.start()
    try:
        async with control_client(infra, timeout=60) as patient:
            await patient.submit([command(made[1], actor=actor)])
            control.send(signal.SIGCONT)
            await patient.submit([command(made[2], actor=actor)])
        assert [one.key for one in await events(infra, actor=actor)] == [one.id for one in made]
        assert (await audit_trail.verify(infra)).broken is None
    finally:
        await successor.kill()
        await control.kill()
