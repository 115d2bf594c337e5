"""Kafka, Valkey, ClickHouse or a worker go away and come back: 503 meanwhile, nothing lost, none restarted by hand."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import httpx
import msgspec
import psutil
import pytest

from bench.gateway.spec import Spec
from schemas.events import Status, Terminal
from schemas.ids import PublicId
from tests.faults.conftest import Note
from tests.faults.test_kills import accounted, told_exactly
from tests.support.accounts import settled, usage_rows
from tests.support.callers import Crowd
from tests.support.chat import Api, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics import frames
from topics.catalogue import LOG, REPLIES
from topics.clients import Producer

CROWD = 20
OUTAGE_S = 40.0
"""Producers wait 15 s for an acknowledgement."""


async def recovered(stack: Stack, within_s: float = 60) -> float:
    """Wait until both ingresses answer again; returns after how many seconds."""
    began = time.monotonic()
    await stack.ready(within_s)
    for index in range(len(stack.ingress_urls)):
        async with Api(stack, ingress=index) as api:
            await until(api.answers, f"ingress {index} answers", within_s)
    return round(time.monotonic() - began, 1)


@pytest.mark.timeout(300)
async def test_the_broker_is_away_for_a_while_and_comes_back(victim: Stack, seed: int, note: Note) -> None:
    await victim.ready()
    # Paused, not killed: the supervisor would start it again at once. Then killed, with streams on their way.
    broker = await victim.pause("kafka")
    try:
        async with Api(victim) as api:
            began = time.monotonic()
            answer = await api.ask(body(Spec(tokens=3)))
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "service_unavailable"
            assert time.monotonic() - began < 12
            assert (await api.get("/v1/models")).status_code == 200
    finally:
        victim.signal("kafka", signal.SIGCONT)
    note(part="kafka paused", recovered_after_s=await recovered(victim), pid=broker)

    async with Crowd(victim, CROWD, random.Random(f"{seed}-kafka")) as crowd:
        await asyncio.sleep(1.5)
        await victim.killed("kafka")
        recovered_s = await recovered(victim)
        found = await crowd.outcomes()
    for one in found:
        told_exactly(one)
    await accounted(victim, found, again=True)
    note(part="kafka killed", recovered_after_s=recovered_s, exact=sum(one.done for one in found), callers=CROWD)


@pytest.mark.timeout(300)
async def test_the_broker_is_away_for_longer_than_writes_wait(victim: Stack, seed: int, note: Note) -> None:
    """Roles end themselves, since they do not know what of their writes is durable, and are started again."""
    await victim.ready()
    async with Crowd(victim, CROWD, random.Random(f"{seed}-outage"), patience_s=OUTAGE_S + 90) as crowd:
        await asyncio.sleep(1.5)
        await victim.pause("kafka")
        try:
            async with Api(victim) as api:
                away = time.monotonic()
                while time.monotonic() - away < OUTAGE_S:
                    try:
                        answer = await api.ask(body(Spec(tokens=1, interval_ms=1)))
                    except httpx.TransportError:
                        await asyncio.sleep(0.5)  # the ingress is being started again
                        continue
                    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, answer.text
        finally:
            victim.signal("kafka", signal.SIGCONT)
        recovered_s = await recovered(victim)
        found = await crowd.outcomes()
    for one in found:
        told_exactly(one)
    again = await accounted(victim, found, again=True)
    note(
        part=f"kafka paused for {OUTAGE_S:g} s", recovered_after_s=recovered_s, exact=sum(one.done for one in found),
        callers=CROWD, continued=again,
    )  # fmt: skip


@pytest.mark.timeout(200)
async def test_valkey_is_away_for_a_while_and_comes_back(victim: Stack, seed: int, note: Note) -> None:
    await victim.ready()
    async with Crowd(victim, CROWD, random.Random(f"{seed}-valkey")) as crowd, Api(victim) as api:
        await asyncio.sleep(1.2)
        await victim.pause("valkey")
        try:

            async def refused() -> bool:
                answer = await api.ask(body(Spec(tokens=1, interval_ms=1)))
                assert answer.status_code in (200, 503), answer.text
                return answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1

            await until(refused, "503 while Valkey is away", 20)
            assert (await api.client.get(api.url("/health/ready"))).status_code == 503
        finally:
            victim.signal("valkey", signal.SIGCONT)
        await victim.killed("valkey")
        recovered_s = await recovered(victim)
        found = await crowd.outcomes()
    for one in found:
        told_exactly(one)
    await accounted(victim, found)
    note(part="valkey", recovered_after_s=recovered_s, exact=len(found), callers=CROWD)


@pytest.mark.timeout(200)
async def test_clickhouse_is_away_for_a_while_and_nothing_is_missing(victim: Stack, seed: int, note: Note) -> None:
    await victim.ready()
    await victim.pause("clickhouse")
    try:
        async with Crowd(victim, CROWD, random.Random(f"{seed}-clickhouse")) as crowd:
            found = await crowd.outcomes()
        assert all(one.done for one in found), "callers do not notice"
    finally:
        victim.signal("clickhouse", signal.SIGCONT)
    await victim.killed("clickhouse")
    for one in found:
        told_exactly(one)
    await accounted(victim, found)
    note(part="clickhouse", exact=len(found), callers=CROWD)


def attempts_lost(stack: Stack) -> int:
    """Attempts whose worker was lost, so far."""
    [row] = stack.rows("SELECT count() AS lost FROM request_events WHERE stage = 'attempt_lost'")
    return int(str(row["lost"]))


@pytest.mark.timeout(200)
async def test_a_worker_that_wakes_up_from_the_dead_says_nothing_more(victim: Stack, seed: int, note: Note) -> None:
    """Stopped for longer than its heartbeats are waited for, then continued: its frames and terminals are void.

    It is the only worker, so that it goes on itself with what it was thought to have lost.
    """
    await victim.ready()
    before = await asyncio.to_thread(attempts_lost, victim)
    # Long enough that none has ended when the worker stands, however slow the machine is.
    async with Crowd(victim, CROWD, random.Random(f"{seed}-zombie"), tokens=200) as crowd:
        await asyncio.sleep(1.2)
        await until(lambda: victim.have_begun(crowd.names), "every answer has begun, and can be gone on with", 10)
        await victim.pause("worker-1")
        try:

            async def all_lost() -> bool:
                return await asyncio.to_thread(attempts_lost, victim) == before + CROWD

            await until(all_lost, "every attempt is taken for lost", 30)
        finally:
            victim.signal("worker-1", signal.SIGCONT)
        found = await crowd.outcomes()
    for one in found:
        told_exactly(one)
    await recovered(victim)
    assert await accounted(victim, found, again=True) > CROWD // 2
    note(part="zombie worker", exact=sum(one.done for one in found), callers=CROWD)


@pytest.mark.timeout(200)
async def test_an_answer_that_waits_in_vain_to_go_on_is_billed_as_far_as_it_came(victim: Stack, note: Note) -> None:
    """Its worker is lost in the middle of it, and no other comes before its deadline."""
    await victim.ready()
    spec = Spec(tokens=400, interval_ms=50, id=fresh("vain"))
    async with Api(victim) as api:
        asked = asyncio.create_task(api.stream(body(spec), {"x-request-timeout": "14"}))

        async def begun() -> bool:
            return any(one.tokens > 10 for one in (await victim.seen(spec.id)).tries)

        await until(begun, "the answer has begun")
        await victim.pause("worker-1")
        try:
            seen = await asyncio.wait_for(asked, 40)
        finally:
            victim.signal("worker-1", signal.SIGCONT)
    assert (seen.error or {})["code"] == "deadline_exceeded"
    assert len(seen.tokens) > 5 and seen.tokens == list(range(len(seen.tokens)))
    row = (await usage_rows(victim, [seen.request_id]))[seen.request_id]
    assert (row["status"], int(str(row["attempts"]))) == ("expired", 2)
    assert int(str(row["completion_tokens"])) == len(seen.tokens)
    assert int(str(row["prompt_tokens"])) > 0
    await recovered(victim)
    await settled(victim)
    note(part="no worker to go on", tokens=len(seen.tokens))


@pytest.mark.timeout(200)
async def test_a_key_that_was_refused_is_free_again(victim: Stack) -> None:
    """A scheduler is silent for 5 s: requests are refused before they are published, and nothing holds their key."""
    await victim.ready()
    spec = Spec(tokens=3, interval_ms=1, id=fresh("refused"))
    headers = {"idempotency-key": spec.id}
    async with Api(victim) as api:
        await victim.pause("scheduler-1")
        try:

            async def stale() -> bool:
                return (await api.client.get(api.url("/health/ready"))).status_code == 503

            await until(stale, "the pool is stale", 15)
            refused = await api.ask(body(spec), headers)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1, refused.text
        finally:
            victim.signal("scheduler-1", signal.SIGCONT)
        await recovered(victim)
        began = time.monotonic()
        seen = await api.stream(body(spec), headers)
        assert seen.done and seen.tokens == [0, 1, 2]
        assert time.monotonic() - began < 5
    assert (await victim.seen(spec.id)).requests == 1


@pytest.mark.timeout(300)
async def test_the_whole_stack_is_killed_and_started_again(victim: Stack, seed: int, note: Note) -> None:
    await victim.ready()
    before = await asyncio.to_thread(victim.ledger)
    name = fresh("kept")
    async with Api(victim) as api:
        kept = await api.stream(body(Spec(tokens=5, interval_ms=1, id=name)), {"idempotency-key": name})
    async with Crowd(victim, CROWD, random.Random(f"{seed}-stack")) as crowd:
        await asyncio.sleep(1.5)
        victim.process.kill()
        begun = await crowd.begun()
    victim.start()  # in this thread: the kernel ends a stack with the thread that started it
    recovered_s = await recovered(victim)
    async with Api(victim) as api:
        again = await api.stream(body(Spec(tokens=5, interval_ms=1, id=name)), {"idempotency-key": name})
        assert again.tokens == kept.tokens == list(range(5))
        assert (await victim.seen(name)).requests == 1
        for request_id in begun:

            async def ended(request_id: str = request_id) -> bool:
                found = (await api.get(f"/v1/requests/{request_id}")).json()
                return found.get("status") in ("completed", "failed", "cancelled", "expired")

            await until(ended, f"{request_id} has its end", 60)

    after = await settled(victim, 60)
    assert after["accepted"] >= before["accepted"] + len(begun)  # type: ignore[operator]
    note(part="whole stack", recovered_after_s=recovered_s, begun=len(begun))


@pytest.mark.timeout(200)
async def test_roles_stop_in_order_while_the_broker_is_away(victim: Stack, note: Note) -> None:
    """They would wait for acknowledgements that never come, and be killed."""
    await victim.ready()
    names = [name for name in victim.endpoints().children if name not in ("kafka", "valkey", "clickhouse")]
    assert len(names) == 9
    await victim.pause("kafka")
    try:
        async with Api(victim) as api:
            assert (await api.ask(body(Spec(tokens=1)))).status_code == 503, "records wait for the broker"
        stopping = {name: psutil.Process(victim.signal(name, signal.SIGTERM)) for name in names}
        began = time.monotonic()
        for name, process in stopping.items():
            await until(lambda process=process: not process.is_running(), f"{name} has stopped", 9)
        note(part="roles stopped without kafka", seconds=round(time.monotonic() - began, 1))
    finally:
        victim.signal("kafka", signal.SIGCONT)
    for name in names:
        assert f"{name} ended with 0 " in victim.role_logs(), f"{name} did not stop in order"
    await recovered(victim)


@pytest.mark.timeout(200)
async def test_a_result_that_overtakes_its_frames_does_not_cut_the_stream(victim: Stack, note: Note) -> None:
    """The log has the end, and the ingress, which asks it on silence, has not seen all frames yet."""
    await victim.ready()
    spec = Spec(tokens=40, interval_ms=100, id=fresh("overtaken"))
    async with Api(victim) as api, api.open(body(spec)) as reader:
        seen = await reader.until_tokens(5)
        await victim.pause("worker-1")
        try:
            await asyncio.sleep(0.5)  # what it had written comes
            public = PublicId.parse(seen.completion_id)
            assert public is not None
            rest = asyncio.create_task(reader.rest())
            await asyncio.sleep(0.5)
            attempt, seq = map(int, (seen.last_id or "").split(":"))
            late = [
                frames.Delta(
                    bytes.fromhex(public.request_id), attempt, seq + 1 + at, frames.Kind.TEXT, 0, f"t{number}@0 "
                )
                for at, number in enumerate(range(len(seen.tokens), len(seen.tokens) + 5))
            ]
            end = Terminal(
                public.request_id, "default", attempt, 0, Status.COMPLETED,
                model="bench", reply_partition=public.reply_partition, last_seq=late[-1].seq,
            )  # fmt: skip
            async with Producer(victim.settings.kafka, "overtaking") as producer:
                await producer.send(LOG.name, msgspec.json.encode(end), key=public.request_id)
                await asyncio.sleep(7)
                assert not rest.done(), "what is not complete is not ended"
                await producer.send(REPLIES.name, frames.encode(late), partition=public.reply_partition)
            found = await asyncio.wait_for(rest, 15)
        finally:
            victim.signal("worker-1", signal.SIGCONT)
    assert found.done and found.tokens == list(range(len(found.tokens)))
    assert len(found.tokens) >= 10 and found.tokens[-1] == int(late[-1].data[1:-3])
    note(part="a result before its frames", tokens=len(found.tokens))
