"""A provider's circuit breaker: what opens it, what it lets through, what closes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import (
    ContextLengthExceeded,
    HeadraceError,
    ProviderDeclined,
    ProviderError,
    ProviderRefused,
)
from processors.generation.breaker import (
    CONSECUTIVE,
    MAX_PAUSE_S,
    MIN_OUTCOMES,
    PAUSE_S,
    WINDOW_S,
    Breaker,
    State,
)
from processors.generation.breakers import Breakers
from processors.generation.providers.base import BackendModel, LoadedModel, Piece, Provider
from processors.generation.providers.refusals import from_answer
from schemas.control import Model


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(CONSECUTIVE):
        breaker.failed(now, "refused")
    assert breaker.state is State.OPEN
    return breaker


def test_failures_in_a_row_open_it_and_say_why() -> None:
    breaker = Breaker()
    for number in range(CONSECUTIVE - 1):
        breaker.failed(number, "refused")
    breaker.succeeded(5)
    for number in range(CONSECUTIVE):
        assert (breaker.state, breaker.reason) == (State.CLOSED, "")
        breaker.failed(6 + number, f"refused {number}")
    assert (breaker.state, breaker.reason) == (State.OPEN, f"refused {CONSECUTIVE - 1}")
    assert breaker.probe_at == 6 + CONSECUTIVE - 1 + PAUSE_S


def test_a_part_of_enough_outcomes_opens_it_within_the_window_only() -> None:
    quick, slow = Breaker(), Breaker()
    for number in range(MIN_OUTCOMES):
        for breaker, pace in ((quick, 0.1), (slow, WINDOW_S / MIN_OUTCOMES * 1.1)):
            if number % 2:
                breaker.failed(number * pace, "refused")
            else:
                breaker.succeeded(number * pace)
    assert (quick.state, slow.state) == (State.OPEN, State.CLOSED)
    fewer = Breaker()
    for number in range(10 * MIN_OUTCOMES):
        fewer.failed(number * 0.1, "refused") if number % 3 == 0 else fewer.succeeded(number * 0.1)
    assert fewer.state is State.CLOSED


def test_a_probe_lets_work_through_and_the_first_outcome_decides() -> None:
    breaker = opened()
    breaker.probed(1, "still away")
    assert (breaker.state, breaker.reason, breaker.probe_at) == (State.OPEN, "still away", 1 + 2 * PAUSE_S)
    breaker.probed(2, None)
    assert breaker.state is State.HALF_OPEN
    breaker.failed(3, "away again")
    assert (breaker.state, breaker.probe_at) == (State.OPEN, 3 + 4 * PAUSE_S)
    breaker.probed(4, None)
    breaker.succeeded(5)
    assert (breaker.state, breaker.reason) == (State.CLOSED, "")
    assert opened(9).probe_at == 9 + PAUSE_S


def test_what_began_before_it_opened_changes_nothing() -> None:
    breaker = opened()
    due = breaker.probe_at
    breaker.succeeded(1)
    breaker.failed(1, "late")
    assert (breaker.state, breaker.reason, breaker.probe_at) == (State.OPEN, "refused", due)


def test_after_it_closed_it_begins_anew() -> None:
    breaker = opened()
    breaker.probed(1, None)
    breaker.succeeded(2)
    for _ in range(CONSECUTIVE - 1):
        breaker.failed(3, "refused")
    assert breaker.state is State.CLOSED
    breaker.failed(3, "refused")
    assert (breaker.state, breaker.probe_at) == (State.OPEN, 3 + PAUSE_S)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ok", "fail", "probe", "no"]), st.floats(0, 10)), max_size=200))
def test_it_always_comes_back_within_its_longest_pause(steps: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for what, wait in steps:
        now += wait
        match what:
            case "ok":
                breaker.succeeded(now)
            case "fail":
                breaker.failed(now, "x")
            case "probe":
                breaker.probed(now, None)
            case _:
                breaker.probed(now, "x")
        assert bool(breaker.reason) == (breaker.state is not State.CLOSED)
        if breaker.state is State.OPEN:
            assert breaker.probe_at - now <= MAX_PAUSE_S
    breaker.probed(now, None)
    breaker.succeeded(now)
    assert breaker.state is State.CLOSED


# --- a worker's breakers ------------------------------------------------------------------------------------------


class Switchable(Provider):
    """A provider whose health is a switch."""

    def __init__(self, name: str = "p") -> None:
        self.name = name
        self.up = asyncio.Event()
        self.probes = 0

    async def health(self) -> None:
        self.probes += 1
        if not self.up.is_set():
            raise ProviderError("away")

    async def list(self) -> list[BackendModel]:
        raise NotImplementedError

    async def load(self, model: Model) -> LoadedModel:
        raise NotImplementedError

    async def unload(self, model: Model) -> None:
        raise NotImplementedError

    async def resident(self) -> list[LoadedModel]:  # type: ignore[valid-type]
        raise NotImplementedError

    async def count_prompt(self, model: Model, body: Mapping[str, object]) -> int | None:
        raise NotImplementedError

    def generate(self, model: Model, body: Mapping[str, object]) -> AsyncGenerator[list[Piece], None]:  # type: ignore[valid-type]
        raise NotImplementedError

    async def embed(self, model: Model, texts: list[str]) -> list[list[float]]:  # type: ignore[valid-type]
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class HurriedClock:
    """Seconds that pass by themselves each time somebody looks: pauses are over at once."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += MAX_PAUSE_S
        return self.now


def watching(*providers: Provider, **options: Any) -> Breakers:
    breakers = Breakers(**{"changed": asyncio.Event(), **options})
    for provider in providers:
        breakers.watch(provider)
    return breakers


async def test_a_broken_provider_is_told_probed_and_comes_back() -> None:
    changed, provider = asyncio.Event(), Switchable()
    breakers = watching(provider, changed=changed, clock=HurriedClock())
    changed.clear()
    for _ in range(CONSECUTIVE):
        assert not changed.is_set() and breakers.broken() == {}
        breakers.outcome(provider, ProviderError("connection refused"))
    assert changed.is_set() and breakers.broken() == {"p": "connection refused"}
    while provider.probes < 3:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert breakers.broken() == {"p": "away"}
    changed.clear()
    provider.up.set()
    async with asyncio.timeout(5):
        await changed.wait()
    assert breakers.broken() == {}
    breakers.outcome(provider, ProviderError("once more"))
    assert breakers.broken() == {"p": "once more"}, "half open, one failure is enough"
    await breakers.stop()


async def test_a_provider_that_replaces_another_of_its_name_begins_anew() -> None:
    first = Switchable()
    breakers = watching(first)
    for _ in range(CONSECUTIVE):
        breakers.outcome(first, ProviderError("refused"))
    assert breakers.broken() == {"p": "refused"}
    second = Switchable()
    breakers.watch(second)
    assert breakers.broken() == {}
    breakers.outcome(second, ProviderError("refused"))
    for _ in range(CONSECUTIVE):
        breakers.outcome(first, ProviderError("it is closing"))
    assert breakers.broken() == {}, "what is left of the first one counts for the second"
    await breakers.stop()


@pytest.mark.parametrize(
    "error",
    [
        ProviderRefused("your fault"),
        ContextLengthExceeded("too long"),
        ProviderDeclined("no such model"),
        from_answer("p", 404, {}, b"no model"),
        from_answer("p", 429, {}, b"slow down"),
        from_answer("p", 400, {}, b"bad"),
    ],
)
async def test_what_is_not_the_providers_own_failure_does_not_count(error: HeadraceError) -> None:
    provider = Switchable()
    breakers = watching(provider)
    for _ in range(10 * CONSECUTIVE):
        breakers.outcome(provider, error)
    assert breakers.broken() == {}


@pytest.mark.parametrize("status", [500, 502, 503, 401, 302])
async def test_what_is_the_providers_own_failure_counts(status: int) -> None:
    provider = Switchable()
    breakers = watching(provider)
    for _ in range(CONSECUTIVE):
        breakers.outcome(provider, from_answer("p", status, {}, b"no"))
    assert list(breakers.broken()) == ["p"]
    await breakers.stop()


async def test_one_provider_is_not_broken_by_another() -> None:
    good, bad = Switchable("good"), Switchable("bad")
    breakers = watching(good, bad)
    for _ in range(CONSECUTIVE):
        breakers.outcome(bad, ProviderError("refused"))
        breakers.outcome(good, None)
    assert list(breakers.broken()) == ["bad"]
    await breakers.stop()
