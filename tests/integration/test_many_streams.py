"""500 streams at once, of 20 tokens a second each: every token comes once and in order, and usage says so."""

from __future__ import annotations

import pytest

from bench.gateway.client import Plan, Target
from bench.gateway.figures import exact
from bench.gateway.measure import Subject
from tests.support.accounts import settled
from tests.support.stacks import Stack

STREAMS, TOKENS = 500, 100


@pytest.mark.timeout(200)
async def test_500_streams_lose_no_token(stack: Stack) -> None:
    target = Target(base_url=f"{stack.base_url}/v1", api_key=stack.key)
    # The callers are a process of their own, so that they read as fast as they are sent to.
    load = Subject(name="headrace", target=target).run(
        Plan(callers=STREAMS, tokens=TOKENS, interval_ms=50, ramp_seconds=5)
    )
    assert not load.errors
    assert (load.requests, load.tokens) == (STREAMS, STREAMS * TOKENS)
    assert exact(load.order), load.order
    assert load.wrong_usage == 0
    await settled(stack)
