"""When a batch is due, and which offsets it allows to be committed. Pure: time is passed in, in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aiokafka import TopicPartition

from clickhouse.rows import Item, Unreadable, read
from topics.record import Record


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a batch. Rows and bytes bound memory; time bounds how late a row becomes visible."""

    rows: int = 50_000
    bytes: int = 8 * 1024 * 1024
    """Of record values, keys and headers aside."""
    linger_s: float = 0.1
    """A batch waits this long for company after an idle time …"""
    interval_s: float = 1.0
    """… and under load batches start this far apart, so that ClickHouse gets few, large parts."""


class Batch:
    """Records on their way into ClickHouse, as rows; those that can be none are kept apart with the reason."""

    def __init__(self, limits: Limits, *, last_flush_s: float = float("-inf")) -> None:
        self.limits = limits
        self.items: list[Item] = []
        self.unreadable: list[tuple[Record, str]] = []
        self.bytes = 0
        self.first_s: float | None = None
        self._last_flush_s = last_flush_s
        self._next: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        return len(self.items) + len(self.unreadable)

    @property
    def room(self) -> int:
        """Records that may still be added."""
        return max(0, self.limits.rows - len(self))

    def add(self, records: Iterable[Record], now: float) -> None:
        """Take records, in the order of their offsets."""
        for record in records:
            if self.first_s is None:
                self.first_s = now
            try:
                self.items.append(read(record))
            except Unreadable as error:
                self.unreadable.append((record, str(error)))
            self.bytes += len(record.value or b"")
            self._next[record.topic, record.partition] = record.offset + 1

    def due_in(self, now: float) -> float | None:
        """Seconds until the batch is to be written, 0 when it is due, None while it is empty."""
        if self.first_s is None:
            return None
        if self.bytes >= self.limits.bytes or not self.room:
            return 0.0
        due = max(self.first_s + self.limits.linger_s, self._last_flush_s + self.limits.interval_s)
        return max(0.0, due - now)

    def offsets(self) -> dict[TopicPartition, int]:
        """The next offset of each partition, to be committed once all rows are durable."""
        return {TopicPartition(*place): offset for place, offset in self._next.items()}

    def oldest_ms(self) -> int | None:
        """Unix ms of the oldest record."""
        records: Sequence[Record] = [item.source for item in self.items]
        return min((record.timestamp for record in records), default=None)
