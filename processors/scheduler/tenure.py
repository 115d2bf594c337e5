"""Whether this scheduler may still decide: one that was away for a while looks first whether its pools were taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from topics.catalogue import POOL_TERMS
from topics.clients import LogReader
from topics.cluster import Cluster

UNSURE_MS = 3_000
"""Nobody can have taken our pools unseen before the group has missed us for its session timeout, which is longer."""


class Deposed(RuntimeError):
    """Another scheduler has taken a pool; this one must not decide anything any more."""

    def __init__(self, pool: str, term: int) -> None:
        super().__init__(f"pool {pool} was taken by another scheduler under term {term}")


class Tenure:
    """Stands before everything that a scheduler decides.

    A process that was stopped, or cut off from the brokers, goes on where it was, as if no time had passed. What it had
    handed to its socket by then cannot be taken back: workers refuse it for its term, and openings and terminals of it
    are in the log before what its successor writes, or count for nothing.
    """

    def __init__(
        self,
        newest: Callable[[], Awaitable[Mapping[str, int]]],
        terms: Callable[[], Mapping[str, int]],
        clock_ms: Callable[[], int],
    ) -> None:
        """`newest` reads the newest term of every pool, `terms` gives the pools that are owned, with their terms.

        `clock_ms` (Unix ms) must go on while the process is stopped.
        """
        self._newest = newest
        self._terms = terms
        self._clock_ms = clock_ms
        self._sure_ms = clock_ms()
        self._lock = asyncio.Lock()

    def sure(self, since_ms: int) -> None:
        """The brokers have answered what was asked at `since_ms`: we were neither stopped nor cut off."""
        self._sure_ms = max(self._sure_ms, since_ms)

    async def hold(self) -> None:
        """Return at once while we are sure, else look. Raises `Deposed`, and `KafkaError` when no broker answers."""
        if self._is_sure():
            return
        async with self._lock:
            if self._is_sure():
                return
            now_ms = self._clock_ms()
            for pool, term in (await self._newest()).items():
                if term > self._terms().get(pool, term):
                    raise Deposed(pool, term)
            self._sure_ms = now_ms

    def _is_sure(self) -> bool:
        return 0 <= self._clock_ms() - self._sure_ms < UNSURE_MS


async def newest_terms(cluster: Cluster) -> dict[str, int]:
    """The newest term of every pool, as Kafka has it now. Raises `KafkaError` when no broker answers."""
    newest: dict[str, int] = {}
    async with LogReader(cluster, "scheduler-tenure") as reader:
        assignment = reader.assign([POOL_TERMS])
        await reader.consumer.seek_to_beginning(*assignment)
        async for record in reader.read_to_end(assignment):
            newest[(record.key or b"").decode()] = record.offset
    return newest
