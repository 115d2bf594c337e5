"""The breakers of a worker's providers: fed by its generations, probed by the providers' own health checks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from headrace import metrics
from headrace.errors import HeadraceError, ProviderDeclined, ProviderError
from processors.generation.breaker import Breaker, State
from processors.generation.providers.base import Provider

log = structlog.get_logger(__name__)

PROBE_TIMEOUT_S = 5.0


class Breakers:
    """One breaker for each provider that is watched. `changed` is set when one moves."""

    def __init__(self, changed: asyncio.Event, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._changed = changed
        self._clock = clock
        self._held: dict[str, tuple[Provider, Breaker]] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    def watch(self, provider: Provider) -> None:
        """A provider was made. What was learnt of its predecessor of the same name says nothing of it."""
        if (probe := self._probes.pop(provider.name, None)) is not None:
            probe.cancel()
        self._held[provider.name] = provider, Breaker()
        metrics.BREAKER_OPEN.labels(provider=provider.name).set(0)
        self._changed.set()

    def outcome(self, provider: Provider, error: HeadraceError | None) -> None:
        """A generation ended by itself, with an answer (None) or an error; one that was cancelled says nothing."""
        if error is not None and (not isinstance(error, ProviderError) or isinstance(error, ProviderDeclined)):
            return
        watched, breaker = self._held[provider.name]
        if watched is not provider:
            return
        before = breaker.state
        if error is None:
            breaker.succeeded(self._clock())
        else:
            breaker.failed(self._clock(), error.message)
        self._moved(provider, breaker, before)

    def broken(self) -> dict[str, str]:
        """Provider -> why, for those that take no work."""
        return {name: breaker.reason for name, (_, breaker) in self._held.items() if breaker.state is State.OPEN}

    async def stop(self) -> None:
        """Probe no more."""
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _moved(self, provider: Provider, breaker: Breaker, before: State) -> None:
        if breaker.state is before:
            return
        metrics.BREAKER_OPEN.labels(provider=provider.name).set(breaker.state is State.OPEN)
        log.warning("breaker_moved", provider=provider.name, state=breaker.state.value, reason=breaker.reason)
        self._changed.set()
        if breaker.state is State.OPEN:
            self._probes[provider.name] = asyncio.create_task(self._probe(provider, breaker))

    async def _probe(self, provider: Provider, breaker: Breaker) -> None:
        """Ask whether the provider lives, after each pause, until it does."""
        while breaker.state is State.OPEN:
            await asyncio.sleep(breaker.probe_at - self._clock())
            failure = None
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await provider.health()
            except TimeoutError:
                failure = f"its health check got no answer within {PROBE_TIMEOUT_S:g} s"
            except HeadraceError as error:
                failure = error.message
            except Exception as error:  # a health check is someone's code too, and must not end the worker
                failure = f"its health check failed: {error!r}"
            breaker.probed(self._clock(), failure)
        self._moved(provider, breaker, State.OPEN)
