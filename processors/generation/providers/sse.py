"""Server-sent events as OpenAI-compatible servers write them: bytes in, data payloads out. Pure."""

from __future__ import annotations

LINE_LIMIT_BYTES = 4 * 1024 * 1024
"""Largest event that is believed; a longer one is garbage, not an answer."""

_FIELDS = (b"event", b"id", b"retry")


class GarbageError(Exception):
    """The bytes are not such a stream; the text says what was wrong."""


class EventStream:
    """Cuts a byte stream, in whatever chunks it arrives, into the data of its events.

    Lines end with LF or CRLF. Several `data` lines of one event are joined by LF, as the standard says; an event that
    the stream does not end with a blank line is never given out.
    """

    __slots__ = ("_data", "_held", "_parts", "limit")

    def __init__(self, limit: int = LINE_LIMIT_BYTES) -> None:
        self.limit = limit
        self._parts: list[bytes] = []
        self._held = 0
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that `chunk` completes. Raises `GarbageError`."""
        if not self._parts and not self._data and chunk.startswith(b"data: ") and chunk.endswith(b"\n\n"):
            # By far the commonest chunk holds one or more whole events of one line each.
            lines = chunk.count(b"\n")
            if lines == 2:
                return [chunk[6:-2]]
            events = chunk[6:-2].split(b"\n\ndata: ")
            if lines == 2 * len(events):
                return events
        end = chunk.rfind(b"\n") + 1
        if end == 0:
            self._hold(chunk)
            return []
        whole = b"".join((*self._parts, chunk[:end]))
        self._parts.clear()
        self._held = 0
        if end < len(chunk):
            self._hold(chunk[end:])
        found: list[bytes] = []
        for line in whole[:-1].split(b"\n"):
            self._line(line.removesuffix(b"\r"), found)
        return found

    @property
    def pending(self) -> bool:
        """Whether the stream stands in the middle of a line or an event."""
        return bool(self._parts or self._data)

    def _hold(self, part: bytes) -> None:
        self._held += len(part)
        if self._held > self.limit:
            raise GarbageError(f"a line is longer than {self.limit} bytes")
        self._parts.append(part)

    def _line(self, line: bytes, found: list[bytes]) -> None:
        if not line:
            if self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        elif line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            if len(self._data) > 1 and sum(map(len, self._data)) > self.limit:
                raise GarbageError(f"an event is longer than {self.limit} bytes")
        elif not line.startswith(b":") and line.partition(b":")[0] not in _FIELDS:
            raise GarbageError(f"not a line of an event stream: {line[:80]!r}")
