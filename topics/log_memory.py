"""What a follower of the request log remembers of each partition, so that a restart judges as its predecessor would."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable

import msgspec
from aiokafka import TopicPartition

from schemas.events import LogRecord, Terminal
from topics import request_log
from topics.catalogue import LOG
from topics.clients import LogReader
from topics.cluster import Cluster
from topics.request_log import LogView

LONGEST_REQUEST_MS = 30 * 60_000
"""What the log said of a request longer ago than this cannot concern a terminal that comes now."""


async def warm(cluster: Cluster, client_id: str, partition: int, upto: int, since_ms: int) -> LogView:
    """The view of one partition at offset `upto`, made of its records of `since_ms` (Unix ms) or later."""
    view = LogView()
    tp = TopicPartition(LOG.name, partition)
    async with LogReader(cluster, client_id) as reader:
        reader.assign([LOG], [partition])
        await reader.seek_to_time([tp], since_ms)
        if await reader.position(tp) < upto:
            async for record in reader.read_to_end([tp]):
                if record.offset >= upto:
                    break
                with contextlib.suppress(msgspec.MsgspecError):  # buried when it was met first
                    view.apply(request_log.decode(record.value or b""))
    return view


class LogMemory:
    """A `LogView` a partition; what it must know of the past is in the log itself, shortly before."""

    def __init__(self, cluster: Cluster, client_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._client_id = client_id
        self._clock = clock
        self._views: dict[int, LogView] = {}
        self._recent: deque[tuple[float, int, str]] = deque()

    async def view(self, partition: int, upto: int, at_ms: int) -> LogView:
        """The view of a partition whose next record is `upto`: kept, or made of what stands before it.

        `at_ms` is that record's time by the brokers (Unix ms), or now: whoever is far behind must look back from there.
        """
        found = self._views.get(partition)
        if found is None:
            since_ms = at_ms - LONGEST_REQUEST_MS
            found = self._views[partition] = await warm(self._cluster, self._client_id, partition, upto, since_ms)
        return found

    async def apply(self, record: LogRecord, partition: int, offset: int, at_ms: int) -> Terminal | None:
        """The deciding terminal, if `record` is it; see `LogView.apply` and `view`."""
        terminal = (await self.view(partition, offset, at_ms)).apply(record)
        if terminal is not None:
            self._recent.append((self._clock(), partition, terminal.request_id))
            self._forget()
        return terminal

    def drop(self, partitions: frozenset[int]) -> None:
        """Another member may move these on; look back again when they return."""
        for partition in partitions:
            self._views.pop(partition, None)

    def _forget(self) -> None:
        horizon = self._clock() - LONGEST_REQUEST_MS / 1000
        while self._recent and self._recent[0][0] < horizon:
            _, partition, request_id = self._recent.popleft()
            if (view := self._views.get(partition)) is not None:
                view.forget(request_id)
