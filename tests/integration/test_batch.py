"""Batch work on a model with one slot gives way to who does not wait, and its answer is whole all the same."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.gateway.spec import Spec
from tests.support.chat import Api, body, fresh, numbers
from tests.support.stacks import Stack
from tests.support.waiting import until

LONG = Spec(tokens=100, interval_ms=60)
SHORT = Spec(tokens=5, interval_ms=10)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stream", [False, True])
async def test_batch_work_gives_way_and_goes_on(stack: Stack, stream: bool) -> None:
    name = fresh("batch")
    spec = Spec(tokens=LONG.tokens, interval_ms=LONG.interval_ms, id=name)
    async with Api(stack) as api:
        began = time.monotonic()
        asked = body(spec, model="narrow", stream=stream)
        batch = asyncio.create_task(
            api.stream(asked, {"x-hr-priority": "batch"}) if stream else api.ask(asked, {"x-hr-priority": "batch"})
        )

        async def generating() -> bool:
            return (await stack.seen(name)).requests == 1

        await until(generating, "the batch request is being generated", 20)
        await asyncio.sleep(1.5)  # heartbeats tell that it could go on elsewhere
        waits = []
        for _ in range(3):
            at = time.monotonic()
            answer = await api.ask(body(SHORT, model="narrow"))
            assert answer.status_code == 200, answer.text
            waits.append(time.monotonic() - at)
        done = await batch
    took = time.monotonic() - began
    assert max(waits) < 0.6 * took, f"nobody waited for the batch request to end: {waits} of {took}"
    if stream:
        assert done.done and done.tokens == list(range(spec.tokens))
        request_id = done.request_id
    else:
        whole = done.json()
        assert numbers(whole["choices"][0]["message"]["content"]) == list(range(spec.tokens))
        assert whole["usage"]["completion_tokens"] == spec.tokens
        request_id = done.headers["x-request-id"]

    async def billed() -> list[dict[str, object]]:
        query = f"SELECT attempts, completion_tokens FROM usage WHERE request_id = '{request_id}'"  # noqa: S608
        return await asyncio.to_thread(stack.rows, query)

    [row] = await until(billed, "its usage row", 20)
    assert int(str(row["attempts"])) > 1 and row["completion_tokens"] == spec.tokens
