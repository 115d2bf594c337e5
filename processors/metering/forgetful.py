"""What a follower of `inference.log` knows of requests, for as long as anything can come of them."""

from __future__ import annotations

from collections import deque

from topics.log_memory import LONGEST_REQUEST_MS
from topics.request_log import LogView


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
