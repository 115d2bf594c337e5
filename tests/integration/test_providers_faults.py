"""Providers that fail: never a hang, an error that the caller sees, a `failed` terminal, and retries only when safe."""

from __future__ import annotations

import time

import pytest

from bench.gateway.spec import Spec
from tests.support.chat import Api, Seen, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until

TRIES = 3
"""How often the pool asks before it gives up."""


@pytest.fixture(autouse=True)
async def most_go_well(api: Api) -> None:
    """The faults here are those of single requests: enough others go well that no circuit breaker opens."""
    for _ in range(3):
        assert (await api.ask(body(Spec(tokens=1)))).status_code == 200


async def failed(api: Api, seen: Seen, *, tokens: int) -> None:
    """The request's terminal says `failed`, and how much was generated."""

    async def life() -> dict[str, object] | None:
        found = (await api.get(f"/v1/requests/{seen.request_id}")).json()
        return found if found.get("status") != "in_flight" else None

    found = await until(life, "the terminal", 10)
    assert found["status"] == "failed"
    assert found["error"]["code"] == "provider_error"  # type: ignore[index]
    assert found["usage"]["completion_tokens"] == tokens  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_is_down_is_a_503_soon(api: Api, stream: bool) -> None:
    began = time.monotonic()
    answer = await api.ask(body("hi", model="down", stream=stream))
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "provider_error"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("fault", ["die_after", "garbage_after"])
@pytest.mark.parametrize("at", [1, 4])
async def test_a_stream_that_breaks_ends_in_an_error_event_after_its_tokens(
    api: Api, stack: Stack, fault: str, at: int
) -> None:
    name = fresh(fault)
    spec = Spec(tokens=9, interval_ms=20, id=name, **{fault: at})  # type: ignore[arg-type]
    seen = await api.stream(body(spec))
    assert seen.status == 200 and not seen.done and not seen.broken
    assert seen.tokens == list(range(at))
    assert seen.error is not None and seen.error["code"] == "provider_error"
    await failed(api, seen, tokens=at)
    assert (await stack.seen(name)).requests == 1, "what was begun must not be generated again"


@pytest.mark.parametrize("fault", ["die_after", "garbage_after"])
async def test_an_answer_that_breaks_is_a_502_when_it_is_not_streamed(api: Api, fault: str) -> None:
    spec = Spec(tokens=9, interval_ms=5, **{fault: 3})  # type: ignore[arg-type]
    answer = await api.ask(body(spec))
    assert answer.status_code == 502, answer.text
    assert answer.json()["error"]["code"] == "provider_error"
    assert answer.headers["x-request-id"]


async def test_a_provider_that_hangs_in_the_middle_ends_in_an_error_event(api: Api, stack: Stack) -> None:
    name = fresh("hangs")
    spec = Spec(tokens=9, interval_ms=5, hang_after=3, id=name)
    began = time.monotonic()
    seen = await api.stream(body(spec, model="impatient"))
    assert time.monotonic() - began < 8
    assert seen.tokens == [0, 1, 2] and not seen.done
    assert seen.error is not None and seen.error["code"] == "provider_error"
    await failed(api, seen, tokens=3)

    async def let_go() -> bool:
        return (await stack.seen(name)).disconnects == 1

    await until(let_go, "the connection to the hanging provider is closed", 5)


async def test_a_provider_that_never_answers_fails_before_a_status_is_sent(api: Api) -> None:
    spec = Spec(tokens=3, slow_headers_ms=60_000)
    answer = await api.ask(body(spec, model="impatient", stream=True))
    assert answer.status_code == 502, answer.text
    assert answer.json()["error"]["code"] == "provider_error"


async def test_slow_headers_are_waited_for(api: Api) -> None:
    seen = await api.stream(body(Spec(tokens=3, interval_ms=5, slow_headers_ms=2_500)))
    assert seen.done and seen.tokens == [0, 1, 2]


async def test_before_the_first_byte_it_is_tried_again(api: Api, stack: Stack) -> None:
    for spec in (
        Spec(tokens=4, interval_ms=5, error_first=2, id=fresh("busy")),
        Spec(tokens=4, interval_ms=5, refuse=True, first=2, id=fresh("closed")),
    ):
        seen = await api.stream(body(spec))
        assert seen.done and seen.tokens == [0, 1, 2, 3]
        entry = await stack.seen(spec.id)
        assert (entry.requests, entry.tokens) == (TRIES, 4)


@pytest.mark.parametrize(
    ("status", "ours", "code", "retry_after"),
    [
        (500, 502, "provider_error", None),
        (503, 503, "provider_unavailable", "5"),
        (429, 429, "provider_rate_limited", "10"),
    ],
)
async def test_a_provider_that_goes_on_failing_is_given_up(
    api: Api, stack: Stack, status: int, ours: int, code: str, retry_after: str | None
) -> None:
    name = fresh("status")
    answer = await api.ask(body(Spec(status=status, id=name), stream=True))
    assert answer.status_code == ours, answer.text
    assert answer.headers.get("retry-after") == retry_after
    assert answer.json()["error"]["code"] == code
    assert f"HTTP {status}" in answer.json()["error"]["message"]
    assert (await stack.seen(name)).requests == TRIES


async def test_what_a_provider_refuses_is_the_callers_400_and_not_tried_again(api: Api, stack: Stack) -> None:
    name = fresh("refuses")
    answer = await api.ask(body(Spec(status=400, id=name)))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "provider_refused"
    assert (await stack.seen(name)).requests == 1
    life = (await api.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
    assert life["status"] == "rejected"


async def test_a_deadline_ends_what_is_too_slow(api: Api, stack: Stack) -> None:
    spec = Spec(tokens=200, interval_ms=50, id=fresh("late"))
    began = time.monotonic()
    seen = await api.stream(body(spec), {"x-request-timeout": "1.5"})
    assert 1.0 < time.monotonic() - began < 6
    assert seen.error is not None and seen.error["code"] == "deadline_exceeded"
    assert seen.tokens == list(range(len(seen.tokens))) and seen.tokens
    life = (await api.get(f"/v1/requests/{seen.request_id}")).json()
    assert life["status"] == "expired"
    assert life["usage"]["completion_tokens"] == len(seen.tokens)
    # The last token may be on its way from the upstream when the connection is closed.
    assert 0 <= (await stack.seen(spec.id)).tokens - len(seen.tokens) <= 2
