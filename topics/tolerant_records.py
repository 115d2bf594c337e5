"""Keeps aiokafka reading where a record has a header whose name is not UTF-8.

Kafka takes any bytes for a name, and aiokafka 0.14 raises in the middle of a batch: one record of one publisher would
stop each reader of a topic, for ever. Here such a batch is read again with the bytes that are wrong escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords

_LENGTH_AT, _LENGTH_BYTES = 8, 4
"""Where a record batch says how many bytes follow, big-endian."""


class _Lenient(bytes):
    """Bytes whose pieces decode whatever they hold."""

    def __getitem__(self, at: Any) -> Any:
        piece = bytes.__getitem__(self, at)
        return _Lenient(piece) if isinstance(piece, bytes) else piece

    def decode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> str:
        return bytes.decode(self, encoding, errors)


class _Batch:
    """A batch as aiokafka reads it, but for those that it cannot."""

    def __init__(self, batch: Any, raw: bytes) -> None:
        self._batch = batch
        self._raw = raw
        self._records: Iterator[Any] | None = None
        """Begun with the first record: aiokafka checks the sum of a batch only before."""
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._records is None:
            self._records = iter(self._batch)
        try:
            record = next(self._records)
        except UnicodeDecodeError:
            again = _DefaultRecordBatchPy(self._raw)
            again._maybe_uncompress()
            again._buffer = _Lenient(again._buffer)
            self._records = islice(again, self._done, None)
            record = next(self._records)
        self._done += 1
        return record


class TolerantRecords:
    """Stands for aiokafka's `MemoryRecords` in its fetcher."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._inner = MemoryRecords(data)
        self._at = 0

    def size_in_bytes(self) -> int:
        """As aiokafka's."""
        return int(self._inner.size_in_bytes())

    def has_next(self) -> bool:
        """As aiokafka's."""
        return bool(self._inner.has_next())

    def next_batch(self) -> Any:
        """As aiokafka's."""
        batch = self._inner.next_batch()
        begin = self._at
        length = int.from_bytes(self._data[begin + _LENGTH_AT : begin + _LENGTH_AT + _LENGTH_BYTES], "big")
        self._at = begin + _LENGTH_AT + _LENGTH_BYTES + length
        return _Batch(batch, self._data[begin : self._at]) if batch is not None else None


def install() -> None:
    """Let every consumer of this process read so."""
    fetcher.MemoryRecords = TolerantRecords
