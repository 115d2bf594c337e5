"""The request log's one rule: which terminal of a request decides. Every reader of `inference.log` uses this.

The terminal of a request is the first terminal record, by offset, that no higher attempt precedes.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from schemas.events import AttemptOpened, LogRecord, Terminal

KIND_HEADER = "hr-kind"
"""Header of log records, `attempt_opened` or `terminal`, so that readers can skip bodies that they do not need."""

_decoder: msgspec.json.Decoder[LogRecord] = msgspec.json.Decoder(LogRecord)


def decode(value: bytes) -> LogRecord:
    """A record of `inference.log`. Raises `msgspec.DecodeError` or `msgspec.ValidationError` on garbage."""
    return _decoder.decode(value)


class LogView:
    """Folds log records, in offset order, into decisions. One view serves the requests of many partitions."""

    __slots__ = ("_decided", "_highest")

    def __init__(self) -> None:
        self._highest: dict[str, int] = {}
        self._decided: set[str] = set()

    def apply(self, record: LogRecord) -> Terminal | None:
        """The deciding terminal, if `record` is it; None for openings, later terminals and those of fenced attempts."""
        if isinstance(record, AttemptOpened):
            self.opened(record.request_id, record.attempt)
            return None
        return record if self.ended(record.request_id, record.attempt) else None

    def opened(self, request_id: str, attempt: int) -> None:
        """Take note of an opening."""
        if attempt > self.attempts(request_id):
            self._highest[request_id] = attempt

    def ended(self, request_id: str, attempt: int) -> bool:
        """Take note of a terminal; True when it is the one that decides."""
        if request_id in self._decided or attempt < self.attempts(request_id):
            return False
        self._decided.add(request_id)
        return True

    def attempts(self, request_id: str) -> int:
        """The highest attempt opened so far."""
        return self._highest.get(request_id, 1)

    def decided(self, request_id: str) -> bool:
        """Whether the request has its terminal."""
        return request_id in self._decided

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request, once its records are older than anything that may still come."""
        self._highest.pop(request_id, None)
        self._decided.discard(request_id)


def deciding_terminal(records: Iterable[LogRecord]) -> Terminal | None:
    """The terminal that decides among one request's records, given in offset order."""
    view = LogView()
    for record in records:
        terminal = view.apply(record)
        if terminal is not None:
            return terminal
    return None
