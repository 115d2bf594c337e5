"""What `inference.log` said shortly before a point: whoever starts there judges as its predecessor would."""

from __future__ import annotations

from collections import deque

from headrace.settings import Settings
from topics import log_memory
from topics.log_memory import LONGEST_REQUEST_MS
from topics.request_log import LogView

__all__ = ["LONGEST_REQUEST_MS", "Forgetful", "warm"]


async def warm(settings: Settings, partition: int, upto: int, since_ms: int) -> LogView:
    """The view of one partition at offset `upto`, made of its records of `since_ms` (Unix ms) or later."""
    return await log_memory.warm(settings.kafka, "metering-warm-up", partition, upto, since_ms)


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
