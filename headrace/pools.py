"""How the pools stand, as their schedulers publish it: fresh enough to choose by, and to refuse what is hopeless."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import msgspec
import structlog

from headrace.choice import Standing, standing
from schemas.control import Model
from schemas.events import PoolStatus
from topics.catalogue import POOL_STATUS
from topics.clients import LogReader
from topics.cluster import Cluster

log = structlog.get_logger(__name__)

STALE_S = 5.0
_status = msgspec.json.Decoder(PoolStatus)


class Pools:
    """Follows `pool.status`. `clock` gives monotonic seconds."""

    def __init__(self, cluster: Cluster, instance: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._reader = LogReader(cluster, f"{instance}-pools", max_wait_ms=1000)
        self._clock = clock
        self._known: dict[str, tuple[float, PoolStatus]] = {}
        self._listening_since: float | None = None
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Read for ever."""
        await self._reader.start()
        try:
            assignment = self._reader.assign([POOL_STATUS])
            ends = await self._reader.consumer.end_offsets(assignment)
            for tp, end in ends.items():
                # What is older than this process says nothing of now: staleness is judged by our own clock.
                self._reader.consumer.seek(tp, end)
            self._listening_since = self._clock()
            while True:
                batches = await self._reader.consumer.getmany(timeout_ms=5000)
                for records in batches.values():
                    for record in records:
                        self.take(record.value or b"")
        finally:
            await self._reader.stop()

    def take(self, value: bytes) -> None:
        """Take in a record of `pool.status`."""
        try:
            status = _status.decode(value)
        except msgspec.MsgspecError as error:
            log.error("unreadable", topic=POOL_STATUS.name, error=str(error))
            return
        known = self._known.get(status.pool)
        if known is None or status.term >= known[1].term:
            self._known[status.pool] = (self._clock(), status)
            self._moved.set()

    def status(self, pool: str) -> PoolStatus | None:
        """A pool's status, None when none came within `STALE_S`."""
        known = self._known.get(pool)
        return known[1] if known is not None and self._clock() - known[0] <= STALE_S else None

    async def heard(self, pools: Iterable[str]) -> None:
        """Return when each pool was heard, or we have listened for so long that its silence tells something."""
        wanted = set(pools)
        while not wanted <= self._known.keys():
            left = STALE_S if self._listening_since is None else self._listening_since + STALE_S - self._clock()
            if left <= 0:
                return
            self._moved.clear()
            try:
                await asyncio.wait_for(self._moved.wait(), min(left, 0.25))
            except TimeoutError:
                continue

    def standing(self, patience_s: float, priority: str) -> Callable[[Model], Standing]:
        """How each model stands for a request of this priority that waits for at most `patience_s`."""
        return lambda model: standing(model, self.status(model.pool), patience_s * 1000, priority)
