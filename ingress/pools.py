"""What the ingress knows of the pools: fresh enough to refuse at once what nobody would answer."""

from __future__ import annotations

import time

import msgspec
import structlog

from headrace.errors import Unavailable
from schemas.control import Model
from schemas.events import PoolStatus
from topics.catalogue import POOL_STATUS
from topics.clients import LogReader
from topics.cluster import Cluster

log = structlog.get_logger(__name__)

STALE_S = 5.0
_status = msgspec.json.Decoder(PoolStatus)


class Pools:
    """Follows `pool.status`."""

    def __init__(self, cluster: Cluster, instance: str) -> None:
        self._reader = LogReader(cluster, f"{instance}-pools", max_wait_ms=1000)
        self._known: dict[str, tuple[float, PoolStatus]] = {}

    async def run(self) -> None:
        """Read for ever."""
        await self._reader.start()
        try:
            assignment = self._reader.assign([POOL_STATUS])
            ends = await self._reader.consumer.end_offsets(assignment)
            for tp, end in ends.items():
                # What is older than this ingress says nothing of now: staleness is judged by our own clock.
                self._reader.consumer.seek(tp, end)
            while True:
                batches = await self._reader.consumer.getmany(timeout_ms=5000)
                for records in batches.values():
                    for record in records:
                        self._take(record.value or b"")
        finally:
            await self._reader.stop()

    def _take(self, value: bytes) -> None:
        try:
            status = _status.decode(value)
        except msgspec.MsgspecError as error:
            log.error("unreadable", topic=POOL_STATUS.name, error=str(error))
            return
        known = self._known.get(status.pool)
        if known is None or status.term >= known[1].term:
            self._known[status.pool] = (time.monotonic(), status)

    def status(self, pool: str) -> PoolStatus | None:
        """A pool's status, None when none came within `STALE_S`."""
        known = self._known.get(pool)
        return known[1] if known is not None and time.monotonic() - known[0] <= STALE_S else None

    def check(self, model: Model, deadline_s: float) -> None:
        """Raise `Unavailable` when the pool is stale, nobody serves the model, or the wait would be too long."""
        status = self.status(model.pool)
        if status is None:
            raise Unavailable(f"The pool {model.pool!r} does not answer; try again shortly.")
        if model.id not in status.servable_models:
            raise Unavailable(f"No worker serves the model {model.id!r} now; try again shortly.", retry_after_s=5)
        if status.estimated_wait_ms > deadline_s * 1000:
            wait = max(1, status.estimated_wait_ms // 1000)
            raise Unavailable(
                f"The wait for {model.id!r} is about {wait} s, longer than the request's deadline.", retry_after_s=wait
            )
