"""Kafka as a front door, on the whole stack: publishers are answered, streamed to and refused as callers over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.gateway.spec import Spec
from headrace import letters
from headrace.published_answers import RESULT_TYPE
from headrace.publisher import Chunk, PublishedError, Publisher, Result
from headrace.publisher.messages import Identity, cancel_headers, signed_headers
from schemas.ids import new_published_id, new_request_id
from tests.support.accounts import usage_rows
from tests.support.chat import Api, body, fresh, numbers
from tests.support.kafka import records
from tests.support.publishing import LANGUAGES, publisher_headers, run_example, signed
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics.catalogue import CANCELLATIONS, MAX_BODY_BYTES, REQUESTS, answers_of
from topics.clients import Producer
from topics.outcomes import now_ms
from topics.record import Record

QUICK = Spec(tokens=5, interval_ms=1, ttft_ms=1)


class Shop:
    """An app of its own, with one publisher."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.stack = stack
        self.app = fresh(name)
        self.key = Ed25519PrivateKey.generate()
        public = base64.b64encode(self.key.public_key().public_bytes_raw()).decode()
        for command in (("apps", "create", self.app), ("apps", "update", self.app, "--publisher", f"p1={public}")):
            ran = stack.run(*command)
            assert ran.returncode == 0, ran.stderr
        self.identity = Identity(self.app, "p1", self.key)

    def publisher(self, **options: str) -> Publisher:
        return Publisher(self.stack.settings.kafka, app=self.app, key_id="p1", private_key=self.key, **options)

    async def results(self, request_id: str) -> list[Record]:
        """The results that its topic holds of a request."""
        found = await records(self.stack.settings, answers_of(self.app))
        mine = [record for record in found if record.key == request_id.encode()]
        return [record for record in mine if dict(record.headers)["ce_type"] == RESULT_TYPE.encode()]

    async def result(self, request_id: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The first of them, once it is there: its object and its headers."""
        [first, *_] = await until(lambda: self.results(request_id), "its result", 20)
        return json.loads(first.value or b""), dict(first.headers)


@pytest.fixture(scope="module")
def shop(stack: Stack) -> Shop:
    return Shop(stack, "shop")


@pytest.fixture(scope="module")
def rival(stack: Stack) -> Shop:
    return Shop(stack, "rival")


@pytest.fixture
async def publisher(shop: Shop) -> AsyncIterator[Publisher]:
    async with shop.publisher() as made:
        yield made


@pytest.fixture
async def producer(stack: Stack) -> AsyncIterator[Producer]:
    async with Producer(stack.settings.kafka, "test") as made:
        yield made


async def settled(stack: Stack) -> None:
    await until(lambda: asyncio.to_thread(lambda: stack.ledger()["in_flight"] == 0), "all has ended", 30)


async def buried(stack: Stack, partition: int, offset: int) -> str:
    """Why a message is in the dead letters, once it is."""

    async def reason() -> str | None:
        found = [letter async for letter in letters.read(stack.settings, topic=REQUESTS.name)]
        mine = [one for one in found if (one.about.partition, one.about.offset) == (partition, offset)]
        return mine[0].about.reason if mine else None

    return await until(reason, "its letter", 20)


async def test_many_are_answered_and_streamed_to_and_each_is_metered_once(
    stack: Stack, shop: Shop, publisher: Publisher
) -> None:
    async def ask() -> Result:
        return await publisher.chat(body(QUICK))

    async def listen() -> tuple[list[Chunk], Result]:
        got = [step async for step in publisher.stream(body(Spec(tokens=20, interval_ms=5)))]
        assert isinstance(got[-1], Result)
        return [step for step in got[:-1] if isinstance(step, Chunk)], got[-1]

    *whole, (chunks, last) = await asyncio.gather(*(ask() for _ in range(8)), listen())
    for result in whole:
        assert numbers(result.text) == list(range(5))
        assert result.body["object"] == "chat.completion" and result.body["usage"]["completion_tokens"] == 5
        assert result.body["model"] == "bench" and result.body["choices"][0]["finish_reason"] == "stop"
    assert numbers("".join(chunk.text for chunk in chunks)) == list(range(20)) == numbers(last.text)
    assert [chunk.seq for chunk in chunks] == sorted({chunk.seq for chunk in chunks})
    assert chunks[0].body["choices"][0]["delta"]["role"] == "assistant"
    assert "role" not in chunks[1].body["choices"][0]["delta"]
    assert {chunk.body["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].body["choices"][0]["finish_reason"] == "stop" and last.body["id"] == chunks[0].body["id"]
    await settled(stack)
    usage = "SELECT key_id, status, sum(completion_tokens) AS tokens, count() AS n FROM usage"
    usage += " WHERE tenant = '{}' GROUP BY key_id, status"
    rows = await until(
        lambda: asyncio.to_thread(
            lambda: [row for row in stack.rows(usage.format(shop.app)) if int(str(row["n"])) >= 9] or None
        ),
        "usage of all",
        30,
    )
    assert [(row["key_id"], row["status"], int(str(row["tokens"])), row["n"]) for row in rows] == [
        ("publisher:p1", "completed", 60, 9)
    ]


async def test_what_http_refuses_is_refused_with_the_same_error(
    stack: Stack, api: Api, shop: Shop, publisher: Publisher
) -> None:
    wrong: list[tuple[dict[str, Any], int, str]] = [
        (body(QUICK, model="nobody"), 404, "model_not_found"),
        (body(QUICK, temperature=9), 400, "invalid_request"),
        (body(QUICK, colour="red"), 400, "unsupported_parameter"),
        (body("x" * (17 * 1024 * 1024 // 32), model="smollm2"), 400, "context_length_exceeded"),
        (body(Spec(status=400)), 400, "provider_refused"),
    ]
    for asked, status, code in wrong:
        over_http = await api.ask(asked)
        with pytest.raises(PublishedError) as refused:
            await publisher.chat(asked)
        assert (refused.value.status, refused.value.code) == (status, code) == (over_http.status_code, code)
        assert refused.value.message == over_http.json()["error"]["message"]
    raw = json.dumps(body("x" * (MAX_BODY_BYTES - 50))).encode()
    request_id = new_published_id(shop.app)
    async with Producer(stack.settings.kafka, "test") as producer:
        headers = signed_headers(shop.identity, request_id, raw, now_ms=now_ms())
        assert len(raw) > MAX_BODY_BYTES
        await producer.send(REQUESTS.name, raw, key=request_id, headers=headers)
    said, told = await shop.result(request_id)
    assert (said["error"]["code"], told["hr-http-status"], told["hr-status"]) == (
        "request_too_large", b"413", b"rejected",
    )  # fmt: skip


async def test_what_a_publisher_may_not_write_is_refused_with_an_answer(
    stack: Stack, shop: Shop, rival: Shop, producer: Producer
) -> None:
    raw = json.dumps(body(QUICK)).encode()
    old = f"{now_ms() - 600_000:012x}"
    mine, its = new_published_id(shop.app), new_published_id(rival.app)
    cases = [
        ({"hr_reply_partition": "0"}, "hr-reply-partition", True),
        ({"hr_idempotency_key": "k"}, "hr-idempotency-key", True),
        ({"hr_deadline": "nan"}, "hr-deadline", True),
        ({"hr_api_key_id": "key-of-nobody"}, "hr-api-key-id", True),
        ({"ce_id": its}, "ce_id", False),
        ({"ce_id": new_request_id()}, "ce_id", False),
        ({"ce_id": old + mine[12:]}, "ce_id", False),
    ]
    for changes, names, accepted in cases:
        headers = publisher_headers(shop.app, **changes)
        at = await producer.send(REQUESTS.name, raw, key=headers["ce_id"], headers=signed(headers, raw, shop.key))
        said, told = await shop.result(headers["ce_id"])
        assert names in said["error"]["message"] and told["hr-status"] == b"rejected", said
        if not accepted:
            assert (await buried(stack, at.partition, at.offset)).startswith("not accepted")
    assert not await rival.results(its)
    await settled(stack)


async def test_a_publisher_has_no_rights_of_another_apps_key(stack: Stack, shop: Shop, rival: Shop) -> None:
    made = stack.run("keys", "create", "--name", "others", "--app", rival.app, "--json")
    assert made.returncode == 0, made.stderr
    key_id = json.loads(made.stdout)["id"]
    name = fresh("borrowed")
    asked = body(Spec(tokens=2, interval_ms=1, id=name))
    async with rival.publisher(api_key_id=key_id) as owner:
        assert numbers((await owner.chat(body(QUICK))).text) == list(range(5)), "the key is in force"
    refusals = []
    for id_ in (key_id, "key-of-nobody"):
        async with shop.publisher(api_key_id=id_) as publisher:
            with pytest.raises(PublishedError) as refused:
                await publisher.chat(asked)
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
        refusals.append(refused.value)
    assert refusals[0].message == refusals[1].message, "not even that there is one"
    assert "hr-api-key-id" in refusals[0].message
    assert (await stack.seen(name)).tries == []
    rows = await usage_rows(stack, [refusal.request_id for refusal in refusals])
    assert {(row["tenant"], row["key_id"]) for row in rows.values()} == {(shop.app, "publisher:p1")}
    await settled(stack)


async def test_what_nobody_proved_to_have_written_goes_to_the_dead_letters_and_is_answered_to_nobody(
    stack: Stack, api: Api, shop: Shop, rival: Shop, producer: Producer
) -> None:
    name = fresh("forged")
    raw = json.dumps(body(Spec(tokens=1, id=name))).encode()
    stolen = publisher_headers(rival.app)
    true = signed(publisher_headers(shop.app), raw, shop.key)
    twice = [*true, ("hr-tenant", rival.app.encode())]
    as_ingress = [
        *((n, v.encode()) for n, v in publisher_headers("default", hr_reply_partition="0", hr_digest="0").items()),
        ("hr-deadline", b"60"),
    ]
    for headers, value in (
        (signed(stolen, raw, shop.key), raw),
        (true, raw + b" "),
        ([(n, v) for n, v in true if n != "hr-signature"], raw),
        (twice, raw),
        (as_ingress, raw),
        ([*as_ingress, ("hr-seal", base64.b64encode(bytes(32)))], raw),
        ([*true, ("hr-seal", base64.b64encode(bytes(32)))], raw),
        ([(n, b"\xff" if n == "ce_source" else v) for n, v in true], raw),
    ):
        key = dict(headers)["ce_id"].decode()
        at = await producer.send(REQUESTS.name, value, key=key, headers=headers)
        assert (await buried(stack, at.partition, at.offset)).startswith("not accepted"), headers
        assert (await api.get(f"/v1/requests/{key}")).status_code == 404
        assert not await shop.results(key) and not await rival.results(key)
    assert (await stack.seen(name)).tries == []
    await settled(stack)


async def test_a_recorded_message_runs_once_and_tells_nobody_more(stack: Stack, shop: Shop, producer: Producer) -> None:
    name = fresh("replayed")
    raw = json.dumps(body(Spec(tokens=3, interval_ms=1, id=name))).encode()
    request_id = new_published_id(shop.app)
    headers = signed_headers(shop.identity, request_id, raw, now_ms=now_ms())
    for _ in range(3):
        await producer.send(REQUESTS.name, raw, key=request_id, headers=headers)
    said, _ = await shop.result(request_id)
    assert numbers(said["choices"][0]["message"]["content"]) == [0, 1, 2]
    await producer.send(REQUESTS.name, raw, partition=0, key=request_id, headers=headers)
    other = json.dumps(body(Spec(tokens=4, id=name))).encode()
    again = signed_headers(shop.identity, request_id, other, now_ms=now_ms())
    await producer.send(REQUESTS.name, other, key=request_id, headers=again)
    await settled(stack)
    assert len((await stack.seen(name)).tries) == 1
    assert len({record.value for record in await shop.results(request_id)}) == 1


async def test_who_writes_the_answers_is_killed_in_the_middle_and_nothing_is_lost_or_told_twice(
    stack: Stack, publisher: Publisher
) -> None:
    async def listen(count: int) -> list[int]:
        tokens: list[int] = []
        async with aclosing(publisher.stream(body(Spec(tokens=count, interval_ms=20)))) as steps:
            async for step in steps:
                if isinstance(step, Result):
                    assert numbers(step.text) == tokens
                else:
                    tokens += numbers(step.text)
                    heard.set()
        return tokens

    heard = asyncio.Event()
    listening = [asyncio.create_task(listen(count)) for count in (40, 150, 400)]
    async with asyncio.timeout(60):
        await heard.wait()
        await stack.killed("answers-1")
        assert [await task for task in listening] == [list(range(count)) for count in (40, 150, 400)]
        assert numbers((await publisher.chat(body(QUICK))).text) == list(range(5))


async def test_one_that_was_read_after_its_deadline_is_answered_as_expired(
    stack: Stack, shop: Shop, producer: Producer
) -> None:
    raw = json.dumps(body(QUICK)).encode()
    headers = publisher_headers(shop.app, hr_deadline="1")
    await stack.pause("router-1")
    try:
        await producer.send(REQUESTS.name, raw, key=headers["ce_id"], headers=signed(headers, raw, shop.key))
        await asyncio.sleep(1.5)
    finally:
        stack.signal("router-1", signal.SIGCONT)
    said, told = await shop.result(headers["ce_id"])
    assert told["hr-status"] == b"expired", said
    assert (said["error"]["code"], told["hr-http-status"]) == ("deadline_exceeded", b"504")
    await settled(stack)


async def test_a_publisher_cancels_its_own_requests_and_nobody_elses(
    stack: Stack, api: Api, shop: Shop, rival: Shop, publisher: Publisher, producer: Producer
) -> None:
    slow = body(Spec(tokens=1000, interval_ms=20))
    request_id = publisher.new_id()
    async with aclosing(publisher.stream(slow, request_id=request_id)) as steps, api.open(slow) as reader:
        await anext(steps)
        await reader.until_tokens(3)
        for victim in (request_id, reader.seen.request_id):
            await producer.send(
                REQUESTS.name, b"", key=victim, headers=cancel_headers(rival.identity, victim, now_ms=now_ms())
            )
        asked = [shop.identity, rival.identity]
        forged = cancel_headers(Identity(shop.app, "p1", asked[1].private_key), request_id, now_ms=now_ms())
        at = await producer.send(REQUESTS.name, b"", key=request_id, headers=forged)
        await buried(stack, at.partition, at.offset)

        async def wishes() -> bool:
            found = await records(stack.settings, CANCELLATIONS)
            return {request_id.encode(), reader.seen.request_id.encode()} <= {one.key for one in found}

        await until(wishes, "the rival's wishes have passed the router", 20)
        for _ in range(5):
            await anext(steps)
        await reader.until_tokens(len(reader.seen.tokens) + 5)
        await publisher.cancel(request_id)
        with pytest.raises(PublishedError) as ended:
            async for _ in steps:
                pass
    assert ended.value.code == "cancelled"
    await settled(stack)


async def test_a_publisher_keeps_to_the_limits_of_its_app(stack: Stack) -> None:
    shop = Shop(stack, "limited")
    assert stack.run("apps", "update", shop.app, "--rpm", "2", "--concurrency", "1").returncode == 0
    async with shop.publisher() as publisher:
        slow = publisher.new_id()
        async with aclosing(publisher.stream(body(Spec(tokens=1000, interval_ms=20)), request_id=slow)) as steps:
            await anext(steps)
            with pytest.raises(PublishedError, match="at once") as refused:
                await publisher.chat(body(QUICK))
            assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
            await publisher.cancel(slow)
        await settled(stack)

        async def answered() -> Result | None:  # the place is given back some milliseconds after the terminal
            try:
                return await publisher.chat(body(QUICK))
            except PublishedError as error:
                assert "at once" in error.message
                return None

        await until(answered, "a free place", 20)
        with pytest.raises(PublishedError, match="requests a minute") as refused:
            await publisher.chat(body(QUICK))
        assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
        assert refused.value.retry_after_s is not None and 0 < refused.value.retry_after_s <= 60


async def test_a_publisher_that_names_an_api_key_has_its_rights_and_is_metered_under_it(stack: Stack) -> None:
    shop = Shop(stack, "keyed")
    made = stack.run("keys", "create", "--name", "batch", "--app", shop.app, "--model", "bench", "--json")
    assert made.returncode == 0, made.stderr
    key_id = json.loads(made.stdout)["id"]
    async with shop.publisher(api_key_id=key_id) as publisher:
        assert numbers((await publisher.chat(body(QUICK))).text) == list(range(5))
        with pytest.raises(PublishedError) as refused:
            await publisher.chat(body("Hello", model="smollm2"))
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        usage = "SELECT DISTINCT key_id FROM usage WHERE tenant = '{}'".format
        rows = await until(lambda: asyncio.to_thread(lambda: stack.rows(usage(shop.app)) or None), "its usage", 30)
        assert rows == [{"key_id": key_id}]
        async with aclosing(publisher.stream(body(Spec(tokens=1000, interval_ms=20)))) as steps:
            await anext(steps)
            assert stack.run("keys", "revoke", key_id).returncode == 0
            with pytest.raises(PublishedError) as ended:
                async for _ in steps:
                    pass
        assert ended.value.code == "cancelled"
        with pytest.raises(PublishedError, match="hr-api-key-id"):
            await publisher.chat(body(QUICK))
    await settled(stack)


@pytest.mark.parametrize("how", [("--disabled",), ("--without-publisher", "p1")], ids=["app", "publisher"])
async def test_what_runs_ends_when_its_app_or_its_publisher_is_revoked(stack: Stack, how: tuple[str, ...]) -> None:
    shop = Shop(stack, "gone")
    async with shop.publisher() as publisher:
        async with aclosing(publisher.stream(body(Spec(tokens=1000, interval_ms=20)))) as steps:
            await anext(steps)
            assert stack.run("apps", "update", shop.app, *how).returncode == 0
            async with asyncio.timeout(15):
                with pytest.raises(PublishedError) as ended:
                    async for _ in steps:
                        pass
        assert ended.value.code == "cancelled"
    await settled(stack)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_the_examples_publish_and_read_their_answer(stack: Stack, shop: Shop, language: str) -> None:
    prompt = f"count\n{Spec(tokens=12, interval_ms=10).line()}"
    ran = await run_example(
        language, "bench", prompt, KAFKA_BOOTSTRAP=stack.settings.kafka_bootstrap, HEADRACE_APP=shop.app,
        HEADRACE_PUBLISHER="p1", HEADRACE_PRIVATE_KEY=base64.b64encode(shop.key.private_bytes_raw()).decode(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    *chunks, last = [line for line in ran.stdout.splitlines() if line.strip()]
    assert numbers("".join(chunks)) == list(range(12)), ran.stdout
    assert '"completion_tokens":12' in last.replace(" ", "")
