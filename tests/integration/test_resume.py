"""Resume and retry: the same request, seen again, from anywhere, is still one generation and one usage."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid

import httpx
import msgspec
import pytest
from redis import asyncio as redis

from bench.gateway.spec import Spec
from headrace.control_client import command, control_client
from ingress.idempotency import PENDING_S, PREFIX, Reservation
from ingress.lookup import CLOCK_SLACK_MS
from schemas.control import App, Key
from schemas.ids import idempotent_request_id
from tests.support.accounts import usage_rows
from tests.support.chat import Api, body, numbers
from tests.support.kafka import end_offsets, records
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics.catalogue import REQUESTS
from topics.clients import Producer


@pytest.fixture(scope="module")
async def strangers_key(stack: Stack) -> str:
    """A key of another tenant."""
    text = "hr-stranger"
    app = App("stranger", "stranger")
    key = Key("k-stranger", hashlib.sha256(text.encode()).hexdigest(), "stranger", "stranger")
    async with control_client(stack.settings) as control:
        await control.submit([command(app, actor="test"), command(key, actor="test")])
    return text


def named(tokens: int = 60, interval_ms: float = 40) -> tuple[str, Spec]:
    name = uuid.uuid4().hex
    return name, Spec(tokens=tokens, interval_ms=interval_ms, id=name)


async def one_usage(stack: Stack, request_id: str) -> dict[str, object]:
    """The one usage row of a request."""
    return (await usage_rows(stack, [request_id]))[request_id]


@pytest.mark.parametrize("by_query", [False, True])
async def test_a_stream_goes_on_at_another_ingress_after_the_last_event(
    stack: Stack, api: Api, other: Api, by_query: bool
) -> None:
    name, spec = named()
    async with api.open(body(spec), {"x-hr-resume": "20"}) as reader:
        first = await reader.until_tokens(10)
    second = await other.resume(first.completion_id, first.last_id, by_query=by_query)
    assert second.done
    assert first.tokens + second.tokens == list(range(60))
    assert [chunk for chunk in second.chunks if chunk["choices"][0]["delta"].get("role")] == []
    assert {chunk["id"] for chunk in first.chunks + second.chunks} == {first.completion_id}
    assert (await stack.seen(name)).requests == 1
    assert (await one_usage(stack, first.request_id))["completion_tokens"] == 60


async def test_after_the_end_the_whole_and_every_rest_can_be_read_again(api: Api, other: Api) -> None:
    _, spec = named(tokens=8, interval_ms=60)
    seen = await api.stream(body(spec, stream_options={"include_usage": True}))
    whole = await other.resume(seen.completion_id)
    assert whole.done and whole.tokens == list(range(8))
    assert whole.chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert whole.chunks[-1]["usage"]["completion_tokens"] == 8
    rest = await other.resume(seen.completion_id, seen.last_id)
    assert rest.done and rest.tokens == []


async def test_while_it_runs_two_may_watch_from_the_beginning(api: Api, other: Api) -> None:
    _, spec = named(tokens=40, interval_ms=30)
    async with api.open(body(spec)) as reader:
        first = await reader.until_tokens(5)
        watched, seen = await asyncio.gather(other.resume(first.completion_id), reader.rest())
    assert watched.tokens == seen.tokens == list(range(40))
    assert watched.done and seen.done


async def test_who_may_not_resume(stack: Stack, api: Api, strangers_key: str) -> None:
    _, spec = named(tokens=3, interval_ms=1)
    seen = await api.stream(body(spec))
    async with Api(stack, key=strangers_key) as stranger:
        refused = await stranger.resume(seen.completion_id)
        assert (refused.status, (refused.error or {})["code"]) == (404, "not_found")
        assert (await stranger.get(f"/v1/requests/{seen.request_id}")).status_code == 404
        assert (await stranger.get(f"/v1/requests/{seen.completion_id}")).status_code == 404
    for unknown in ("nonsense", "chatcmpl-" + "0" * 48, "chatcmpl-" + "f" * 48, seen.completion_id[:-1]):
        assert (await api.resume(unknown)).status == 404
    for position in ("x", "1", "1:2:3", "-1:5", "1:" + "9" * 20):
        wrong = await api.resume(seen.completion_id, position)
        assert (wrong.status, (wrong.error or {})["code"]) == (400, "invalid_request")


async def test_callers_with_one_key_at_once_share_one_generation(stack: Stack, api: Api, other: Api) -> None:
    name, spec = named(tokens=30, interval_ms=40)
    headers = {"idempotency-key": name}
    seen = await asyncio.gather(*((api, other)[number % 2].stream(body(spec), headers) for number in range(8)))
    for one in seen:
        assert one.done, one.error
        assert one.tokens == list(range(30))
    assert len({one.request_id for one in seen}) == 1
    entry = await stack.seen(name)
    assert (entry.requests, entry.tokens) == (1, 30)
    assert (await one_usage(stack, seen[0].request_id))["completion_tokens"] == 30


@pytest.mark.parametrize("stream", [False, True])
async def test_a_later_repeat_gets_the_same_answer(stack: Stack, api: Api, other: Api, stream: bool) -> None:
    name, spec = named(tokens=6, interval_ms=5)
    headers, asked = {"idempotency-key": name}, body(spec, stream=stream)
    first, again = await api.ask(asked, headers), await other.ask(asked, headers)
    assert first.status_code == again.status_code == 200
    assert numbers(first.text) == numbers(again.text) == list(range(6))
    assert first.headers["x-request-id"] == again.headers["x-request-id"]
    if not stream:
        assert first.json() == again.json()
    assert (await stack.seen(name)).requests == 1
    await one_usage(stack, first.headers["x-request-id"])


async def test_one_key_with_another_body_is_a_conflict(api: Api) -> None:
    name, spec = named(tokens=2, interval_ms=1)
    assert (await api.ask(body(spec), {"idempotency-key": name})).status_code == 200
    other_body = await api.ask(body(spec, temperature=1), {"idempotency-key": name})
    assert other_body.status_code == 409
    assert other_body.json()["error"]["code"] == "idempotency_key_reused"


async def test_one_key_of_two_tenants_is_two_requests(stack: Stack, api: Api, strangers_key: str) -> None:
    name, spec = named(tokens=2, interval_ms=1)
    async with Api(stack, key=strangers_key) as stranger:
        answers = [await one.ask(body(spec), {"idempotency-key": name}) for one in (api, stranger)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert (await stack.seen(name)).requests == 2


@pytest.mark.parametrize("finished", [True, False])
async def test_when_redis_forgot_everything_a_repeat_is_still_one_generation(
    stack: Stack, api: Api, other: Api, finished: bool
) -> None:
    name, spec = named(tokens=120 if not finished else 5, interval_ms=50)
    headers = {"idempotency-key": name}
    running = asyncio.create_task(api.stream(body(spec), headers))
    if finished:
        await running
    else:
        await until(lambda: _begun(stack, name), "the generation runs")
    async with redis.from_url(stack.settings.redis_url) as client:
        await client.flushall()
    again = await _patiently(other, spec, headers)
    first = await running
    assert first.done and again.done, (first.error, again.error)
    assert first.tokens == again.tokens == list(range(spec.tokens))
    assert first.request_id == again.request_id
    assert (await stack.seen(name)).requests == 1
    await one_usage(stack, first.request_id)


async def test_a_key_whose_ingress_died_before_it_published_is_taken_over(stack: Stack, api: Api) -> None:
    name, spec = named(tokens=3, interval_ms=1)
    asked = body(spec)
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    request_id = idempotent_request_id("default", name)
    died = Reservation(digest, 0, time.time_ns() // 1_000_000 - int(PENDING_S * 1000) + 2_000)
    async with redis.from_url(stack.settings.redis_url) as client:
        await client.set(f"{PREFIX}default:{request_id}", msgspec.json.encode(died))
    began = time.monotonic()
    answer = await api.ask(asked, {"idempotency-key": name})
    assert answer.status_code == 200, answer.text
    assert numbers(answer.text) == [0, 1, 2]
    assert 1.5 < time.monotonic() - began < 8
    assert (await stack.seen(name)).requests == 1


async def test_a_key_whose_ingress_died_when_it_had_published_gets_the_answer_of_then(
    stack: Stack, api: Api, other: Api
) -> None:
    """Its ingress could not say that it had: the request is published once more when it has long ended."""
    name, spec = named(tokens=3, interval_ms=1)
    first = await api.ask(body(spec), {"idempotency-key": name})
    request_id = first.headers["x-request-id"]
    await asyncio.sleep(CLOCK_SLACK_MS / 1000 + 1)  # Else a look around the second time would find it by luck.
    async with redis.from_url(stack.settings.redis_url) as client:
        assert await client.delete(f"{PREFIX}default:{request_id}") == 1
    again = await other.ask(body(spec), {"idempotency-key": name})
    assert again.status_code == 200 and again.headers["x-request-id"] == request_id
    assert numbers(again.text) == [0, 1, 2]
    assert (await stack.seen(name)).requests == 1
    await one_usage(stack, request_id)


async def test_a_record_that_is_published_twice_is_one_generation(stack: Stack, api: Api) -> None:
    name, spec = named(tokens=20, interval_ms=50)
    since = await end_offsets(stack.settings, REQUESTS)
    before = stack.ledger()["duplicates"]
    async with api.open(body(spec)) as reader, Producer(stack.settings.kafka, "test") as producer:
        await reader.until_tokens(3)
        [record] = await records(stack.settings, REQUESTS, since)
        key = (record.key or b"").decode()
        await producer.send(REQUESTS.name, record.value, key=key, headers=record.headers)
        seen = await reader.rest()
    await told_as_duplicate(stack, key)
    assert seen.done and seen.tokens == list(range(20))
    assert (await stack.seen(name)).requests == 1
    assert (await one_usage(stack, key))["completion_tokens"] == 20
    assert stack.ledger()["duplicates"] == before + 1  # type: ignore[operator]


async def told_as_duplicate(stack: Stack, request_id: str) -> None:
    """Wait until the scheduler has told the duplicate."""
    query = f"SELECT stage FROM request_events WHERE request_id = '{request_id}' AND stage = 'duplicate'"  # noqa: S608
    await until(lambda: asyncio.to_thread(stack.rows, query), "the duplicate is told", 15)


async def _begun(stack: Stack, name: str) -> bool:
    return (await stack.seen(name)).requests == 1


async def _patiently(api: Api, spec: Spec, headers: dict[str, str]):  # type: ignore[no-untyped-def]
    """Ask until the control plane is whole again; while it is not, the answer is 503, never 401."""

    async def answered():  # type: ignore[no-untyped-def]
        try:
            seen = await api.stream(body(spec), headers)
        except httpx.TransportError as error:
            raise AssertionError("the ingress went away") from error
        assert seen.status in (200, 503), seen.error
        return seen if seen.status == 200 else None

    return await until(answered, "an answer after Redis forgot", 30)
