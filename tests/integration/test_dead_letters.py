"""Garbage on any topic that a role consumes: it lies in dead.letters as it was, and the stream goes on."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator

import pytest

from bench.gateway.spec import Spec
from headrace import letters
from headrace.letters import Letter
from schemas.ids import PublicId, new_request_id
from tests.support.accounts import settled
from tests.support.chat import Api, body, fresh
from tests.support.publishing import sealed
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics.catalogue import (
    CANCELLATIONS,
    CONTROL_COMMANDS,
    EVENTS,
    INGRESS_STATUS,
    LOG,
    POOL_COMMANDS,
    PUBLISHED,
    REPLIES,
    REQUESTS,
    ROUTED,
    USAGE,
    WORKER_STATUS,
    Topic,
    worker_commands,
)
from topics.clients import Producer
from topics.envelope import Envelope

GARBAGE = b"\x00\xff not what anybody expects {"
CONSUMED = [REQUESTS, ROUTED, LOG, USAGE, EVENTS, CONTROL_COMMANDS, worker_commands("w1")]
FOLLOWED = [CANCELLATIONS, WORKER_STATUS, INGRESS_STATUS, POOL_COMMANDS, PUBLISHED]
"""Topics that are read without a group, or to tell publishers."""


@pytest.fixture
async def producer(stack: Stack) -> AsyncIterator[Producer]:
    async with Producer(stack.settings.kafka, "test") as made:
        yield made


async def letters_of(stack: Stack, topic: Topic, partition: int, offset: int) -> list[Letter]:
    """The letters of one message: one for each role that reads the topic and cannot read this."""
    found = [letter async for letter in letters.read(stack.settings, topic=topic.name)]
    return [letter for letter in found if (letter.about.partition, letter.about.offset) == (partition, offset)]


def envelope(request_id: str, raw: bytes) -> Envelope:
    return Envelope(
        request_id=request_id, source="/test", time_ms=0, tenant="default", key_id="k", reply_partition=0,
        digest="0" * 64, deadline_s=30.0,
    )  # fmt: skip


@pytest.mark.parametrize("topic", CONSUMED, ids=lambda topic: topic.name)
async def test_garbage_is_kept_as_it_was_and_the_stream_goes_on(
    stack: Stack, api: Api, producer: Producer, topic: Topic
) -> None:
    headers = [("x-odd", b"\xff\x00"), ("x-odd", b"twice")]
    key = fresh("garbage")
    at = await producer.send(topic.name, GARBAGE, key=key, headers=headers)
    found = await until(lambda: letters_of(stack, topic, at.partition, at.offset), "its letter", 20)
    for letter in found:
        assert letter.value == GARBAGE
        assert letter.key == key.encode()
        assert letter.headers == headers
        assert letter.about.reason
    assert len({letter.about.role for letter in found}) == len(found), "each role buries it once"
    seen = await api.stream(body(Spec(tokens=3, interval_ms=1)))
    assert seen.done and seen.tokens == [0, 1, 2]
    empty = await producer.send(topic.name, None, key=key)
    seen = await api.stream(body(Spec(tokens=3, interval_ms=1)))
    assert seen.done
    if topic is not CONTROL_COMMANDS:
        await until(lambda: letters_of(stack, topic, empty.partition, empty.offset), "a letter without a value", 20)


@pytest.mark.parametrize("topic", FOLLOWED, ids=lambda topic: topic.name)
async def test_garbage_that_somebody_follows_is_kept_too(
    stack: Stack, api: Api, producer: Producer, topic: Topic
) -> None:
    at = await producer.send(topic.name, GARBAGE, key=fresh("garbage"))
    [letter] = await until(lambda: letters_of(stack, topic, at.partition, at.offset), "its letter", 20)
    assert (letter.value, letter.about.role) == (GARBAGE, "answers" if topic is PUBLISHED else "scheduler")
    seen = await api.stream(body(Spec(tokens=3, interval_ms=1)))
    assert seen.done and seen.tokens == [0, 1, 2]


async def test_garbage_between_frames_harms_no_stream(stack: Stack, api: Api, producer: Producer) -> None:
    async with api.open(body(Spec(tokens=40, interval_ms=20))) as reader:
        await reader.until_tokens(5)
        sent = [
            await producer.send(REPLIES.name, GARBAGE, partition=partition) for partition in range(REPLIES.partitions)
        ]
        seen = await reader.rest()
    assert seen.done and seen.tokens == list(range(40))
    public = PublicId.parse(seen.completion_id)
    assert public is not None
    at = next(one for one in sent if one.partition == public.reply_partition)
    letters_there = await until(lambda: letters_of(stack, REPLIES, at.partition, at.offset), "its letter", 20)
    assert {letter.about.role for letter in letters_there} == {"ingress"}


async def test_a_request_whose_body_is_garbage_ends_as_rejected(stack: Stack, api: Api, producer: Producer) -> None:
    request_id = new_request_id()
    sent = envelope(request_id, GARBAGE)
    at = await producer.send(
        REQUESTS.name, GARBAGE, key=request_id, headers=sealed(sent, GARBAGE, stack.settings.seals)
    )
    [letter] = await until(lambda: letters_of(stack, REQUESTS, at.partition, at.offset), "its letter", 20)
    assert letter.about.role == "router"

    async def life() -> dict[str, object] | None:
        answer = await api.get(f"/v1/requests/{request_id}")
        return answer.json() if answer.status_code == 200 and answer.json()["status"] != "in_flight" else None

    assert (await until(life, "its end", 20))["status"] == "rejected"
    assert stack.ledger()["in_flight"] == 0


async def test_the_commands_list_show_and_replay(stack: Stack, api: Api, producer: Producer) -> None:
    """A request that could not be read is replayed under a new id, and ends again; the ledger holds both."""
    request_id, name = new_request_id(), uuid.uuid4().hex
    raw = json.dumps({"model": "bench", "messages": "not a list " + name, "n": []}).encode()[:-1]
    sent = envelope(request_id, raw)
    at = await producer.send(REQUESTS.name, raw, key=request_id, headers=sealed(sent, raw, stack.settings.seals))
    [letter] = await until(lambda: letters_of(stack, REQUESTS, at.partition, at.offset), "its letter", 20)

    listed = json.loads(stack.run("dead-letters", "list", "--topic", REQUESTS.name, "--json").stdout)
    [shown] = [entry for entry in listed if entry["number"] == letter.number]
    assert (shown["partition"], shown["offset"], shown["times_seen"]) == (at.partition, at.offset, 1)
    detail = stack.run("dead-letters", "show", str(letter.number))
    assert name not in detail.stdout, "prompts are shown only when asked for"
    assert name in stack.run("dead-letters", "show", str(letter.number), "--body").stdout

    replayed = stack.run("dead-letters", "replay", str(letter.number))
    assert replayed.returncode == 0, replayed.stderr
    new_id = re.search(r"[0-9a-f]{32}", replayed.stdout)
    assert new_id is not None and new_id[0] != request_id

    async def again() -> Letter | None:
        found = [one async for one in letters.read(stack.settings, first=letter.number + 1)]
        return next((one for one in found if one.value == raw), None)

    assert (await until(again, "the letter of the replayed request", 20)).about.times_seen == 2

    await settled(stack)
    for one in (request_id, new_id[0]):
        assert (await api.get(f"/v1/requests/{one}")).json()["status"] == "rejected"
