"""A stack that is told to stop in the middle of answers: short ones end, long ones go on after the next start."""

from __future__ import annotations

import asyncio
from functools import partial

import httpx
import pytest

from bench.gateway.spec import Spec
from tests.conftest import MakeStack
from tests.support.accounts import settled, usage_rows
from tests.support.callers import Caller
from tests.support.chat import Api, Seen, body, fresh, numbers
from tests.support.waiting import until

DRAIN_S = 5
"""As `Stack` sets it."""
SHORT = Spec(tokens=60, interval_ms=50)
LONG = Spec(tokens=600, interval_ms=50)


async def turned_away(api: Api) -> bool:
    """Whether a request that comes now is refused; it must never be taken and left."""
    try:
        answer = await api.ask(body(Spec(tokens=1, interval_ms=1)))
    except httpx.TransportError:
        return True
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 503


@pytest.mark.timeout(240)
async def test_a_stop_in_order_ends_what_is_short_and_keeps_what_is_long(make_stack: MakeStack) -> None:
    stack = make_stack()
    await stack.ready()
    short = [Spec(tokens=SHORT.tokens, interval_ms=SHORT.interval_ms, id=fresh("short")) for _ in range(4)]
    long = [Spec(tokens=LONG.tokens, interval_ms=LONG.interval_ms, id=fresh("long")) for _ in range(3)]
    async with Api(stack) as api:
        whole = asyncio.create_task(api.ask(body(short[0])))
        streams = [asyncio.create_task(api.stream(body(spec))) for spec in short[1:]]
        patient = [asyncio.create_task(Caller([api], 0, spec, patience_s=150).run()) for spec in long]
        names = [spec.id for spec in (*short, *long)]
        await until(lambda: stack.have_begun(names, tokens=3), "all have begun")
        watching = asyncio.create_task(api.get("/admin/models/bench/events"))
        await asyncio.sleep(0.5)
        stopping = asyncio.create_task(asyncio.to_thread(stack.stop))
        await until(partial(turned_away, api), "new requests are turned away", DRAIN_S)

        watched = await asyncio.wait_for(watching, 3)
        assert watched.text.startswith("event: model"), "who only watches is let go at once"
        answer = await whole
        assert answer.status_code == 200, answer.text
        assert numbers(answer.json()["choices"][0]["message"]["content"]) == list(range(SHORT.tokens))
        seen: list[Seen] = await asyncio.gather(*streams)
        for one in seen:
            assert one.done and one.tokens == list(range(SHORT.tokens)), one
        assert not any(task.done() for task in patient), patient
        assert await stopping == 0
        assert "killed" not in stack.process.log.read_text(), "every child stopped by itself"

        stack.start()
        outcomes = await asyncio.gather(*patient)
    for outcome in outcomes:
        assert outcome.done and outcome.tokens == outcome.expected, outcome
    ids = [answer.headers["x-request-id"], *(one.request_id for one in (*seen, *outcomes))]
    rows = await usage_rows(stack, ids)
    assert set(rows) == set(ids)
    assert all(int(str(rows[one.request_id]["attempts"])) >= 2 for one in outcomes), "they went on after the next start"
    after = await settled(stack, 60)
    assert after["adds_up"] is True, after["problems"]
