"""What `inference.log` said shortly before a point: whoever starts there judges as its predecessor would."""

from __future__ import annotations

import contextlib
from collections import deque

import msgspec
from aiokafka import TopicPartition

from headrace.settings import Settings
from topics import request_log
from topics.catalogue import LOG
from topics.clients import LogReader
from topics.request_log import LogView

LONGEST_REQUEST_MS = 30 * 60_000
"""What the log said of a request longer ago than this cannot concern a terminal that comes now."""


async def warm(settings: Settings, partition: int, upto: int, since_ms: int) -> LogView:
    """The view of one partition at offset `upto`, made of its records of `since_ms` (Unix ms) or later."""
    view = LogView()
    tp = TopicPartition(LOG.name, partition)
    async with LogReader(settings.kafka, "metering-warm-up") as reader:
        reader.assign([LOG], [partition])
        await reader.seek_to_time([tp], since_ms)
        if await reader.consumer.position(tp) < upto:
            async for record in reader.read_to_end([tp]):
                if record.offset >= upto:
                    break
                with contextlib.suppress(msgspec.MsgspecError):  # buried when it was met first
                    view.apply(request_log.decode(record.value or b""))
    return view


class Forgetful:
    """A view that forgets requests once nothing can come of them any more."""

    def __init__(self, view: LogView, position: int) -> None:
        self.view = view
        self.position = position
        """Offset up to which it has taken the log in."""
        self._ended: deque[tuple[int, str]] = deque()

    def ended(self, request_id: str, at_ms: int) -> None:
        """A request has had its terminal at `at_ms` by the log's clock."""
        self._ended.append((at_ms, request_id))
        while self._ended and self._ended[0][0] < at_ms - LONGEST_REQUEST_MS:
            self.view.forget(self._ended.popleft()[1])
