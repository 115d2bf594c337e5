"""Two workers hold the same model: what the one that is lost had not begun to answer, the other one answers.

What it had begun is in `test_continuation.py`.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import msgspec
import pytest

from bench.gateway.spec import Spec
from processors.scheduler.runner import read_leases
from processors.scheduler.tenure import newest_terms
from schemas.events import GenerateCommand, Routed
from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, Seen, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics.catalogue import ROUTED, worker_commands
from topics.clients import LogReader, Producer
from topics.outcomes import now_ms

CROWD = 10
TOKENS = 5
LOST, LEFT = "w1", "w2"


async def usage(stack: Stack, seen: list[Seen]) -> dict[str, tuple[str, int, int]]:
    """Worker, attempt and completion tokens of each request, by id."""
    rows = await usage_rows(stack, [one.request_id for one in seen])
    return {
        request_id: (str(row["worker"]), int(str(row["attempts"])), int(str(row["completion_tokens"])))
        for request_id, row in rows.items()
    }


async def both_hold_the_model(stack: Stack, api: Api) -> None:
    async def spread() -> bool:
        seen = await asyncio.gather(*(api.stream(body(Spec(tokens=1, ttft_ms=100))) for _ in range(4)))
        return {worker for worker, _, _ in (await usage(stack, list(seen))).values()} == {LOST, LEFT}

    await until(spread, "requests are spread over two workers", 40)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
async def test_the_other_worker_takes_over(pair: Stack, how: signal.Signals, note: Note) -> None:
    await pair.ready()
    # Nothing is answered yet when the worker is lost; the silent one is missed 3 s after its last heartbeat.
    specs = [
        Spec(tokens=TOKENS, interval_ms=1, ttft_ms=12_000 if how == signal.SIGSTOP else 3_000, id=fresh("pair"))
        for _ in range(CROWD)
    ]
    async with Api(pair) as api:
        await both_hold_the_model(pair, api)
        asked = [asyncio.create_task(api.stream(body(spec))) for spec in specs]

        async def all_begun() -> bool:
            seen = await pair.all_seen()
            return all(seen[spec.id].requests == 1 if spec.id in seen else False for spec in specs)

        await until(all_begun, "the upstream has all requests", 10)
        pair.signal("worker-1", how)
        try:
            await until(lambda: again(pair, specs), "lost requests are asked of the upstream again", 20)
        finally:
            if how == signal.SIGSTOP:
                pair.signal("worker-1", signal.SIGCONT)  # what the zombie says from now on must be void
        seen = await asyncio.gather(*asked)
    for one in seen:
        assert one.done and one.tokens == list(range(TOKENS)), (one.error, one.tokens)
    rows = await usage(pair, list(seen))
    assert {tokens for _, _, tokens in rows.values()} == {TOKENS}, "each is billed once"
    counts = Counter((worker, attempt) for worker, attempt, _ in rows.values())
    # A killed one is started again at once, and may take some of its own.
    assert counts[LEFT, 1] == counts[LEFT, 2] + counts[LOST, 2] == CROWD // 2, counts
    assert counts[LOST, 2] == 0 or how == signal.SIGKILL
    note(part=f"one of two workers {how.name}", taken_over=counts[LEFT, 2], callers=CROWD)
    await settled(pair)


async def again(stack: Stack, specs: list[Spec]) -> bool:
    """Whether half of the requests came to the upstream a second time."""
    seen = await stack.all_seen()
    return sum(seen[spec.id].requests == 2 for spec in specs) == CROWD // 2


@pytest.mark.timeout(200)
async def test_what_a_silent_worker_was_just_given_is_fenced_before_the_other_one_gets_it(
    pair: Stack, note: Note
) -> None:
    """Its scheduler was killed before it wrote down that it had given it, and nobody else knows."""
    await pair.ready()
    spec = Spec(tokens=TOKENS, interval_ms=1, ttft_ms=8_000, id=fresh("hidden"))
    async with Api(pair) as api:
        await both_hold_the_model(pair, api)
        await settled(pair)
        await pair.pause("worker-1")
        try:
            await pair.pause("scheduler-1")
            asked = asyncio.create_task(api.stream(body(spec)))
            command = await given(pair, await until(lambda: routed(pair, spec.id), "it is routed", 10))
            async with Producer(pair.settings.kafka, "hidden") as producer:
                await producer.send(worker_commands(LOST).name, msgspec.json.encode(command), partition=0)
            await pair.killed("scheduler-1")

            async def tries(wanted: int) -> bool:
                return (await pair.seen(spec.id)).requests == wanted

            await until(lambda: tries(1), "the other worker begins", 30)
        finally:
            pair.signal("worker-1", signal.SIGCONT)
        await until(lambda: tries(2), "the silent one does what it was told", 8)
        seen = await asked
    assert seen.done and seen.tokens == list(range(TOKENS)), (seen.error, seen.tokens)
    assert await usage(pair, [seen]) == {seen.request_id: (LEFT, 2, TOKENS)}
    await settled(pair)
    note(part="given, and not written down")


async def routed(stack: Stack, name: str) -> Routed | None:
    """The routed record of the request to the upstream that has this name."""
    async with LogReader(stack.settings.kafka, "test") as reader:
        assignment = reader.assign([ROUTED])
        await reader.consumer.seek_to_beginning(*assignment)
        found = [
            msgspec.json.decode(record.value or b"", type=Routed)
            async for record in reader.read_to_end(assignment)
            if name.encode() in (record.value or b"")
        ]
    return found[0] if found else None


async def given(stack: Stack, request: Routed) -> GenerateCommand:
    """What a scheduler says when it gives a request to the first worker."""
    terms = await newest_terms(stack.settings.kafka)
    async with LogReader(stack.settings.kafka, "test") as reader:
        held = [one for one in (await read_leases(reader)).held() if (one.worker, one.model) == (LOST, request.model)]
    [lease] = held
    return GenerateCommand(terms[request.pool], lease.boot, 1, lease.epoch, now_ms(), request)
