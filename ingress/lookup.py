"""Looking a request up: in Kafka for what is recent, so that nothing lags, and in ClickHouse for what is older."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import msgspec
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from headrace.errors import Unavailable
from headrace.senders import sender
from headrace.settings import Settings
from schemas.control import App
from schemas.events import LifecycleEvent, Terminal
from topics import request_log
from topics.catalogue import EVENTS, LOG, REQUESTS, Topic
from topics.clients import LogReader
from topics.envelope import Envelope, EnvelopeError
from topics.record import Record
from topics.request_log import LogView
from topics.signing import Seals

log = structlog.get_logger(__name__)

CLOCK_SLACK_MS = 5_000
"""Ids are made by our clock, records are stamped by the brokers': look this much earlier."""
MAX_SCAN_RECORDS = 200_000
"""Older requests are found in ClickHouse; a scan of Kafka ends here."""
MAX_READERS = 8
TIMEOUT_S = 10.0
"""A look-up that takes longer is given up: the brokers are away, or too busy."""

_event = msgspec.json.Decoder(LifecycleEvent)


class Asked(NamedTuple):
    """A record of `inference.requests`."""

    envelope: Envelope
    accepted_ms: int
    """Unix ms at which the brokers took it."""
    body: bytes


class Lookup:
    """Reads a request's records. Readers are kept and lent, at most `MAX_READERS` at once."""

    def __init__(self, settings: Settings, seals: Seals) -> None:
        self._settings = settings
        self._seals = seals
        self._idle: list[LogReader] = []
        self._slots = asyncio.Semaphore(MAX_READERS)

    async def stop(self) -> None:
        """Close the readers."""
        for reader in self._idle:
            await reader.stop()
        self._idle.clear()

    @contextlib.asynccontextmanager
    async def _reader(self) -> AsyncIterator[LogReader]:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._slots:
                known = self._idle.pop() if self._idle else None
                reader = known or LogReader(self._settings.kafka, "ingress-lookup")
                try:
                    if known is None:
                        await reader.start()
                    yield reader
                except BaseException:
                    await reader.stop()
                    raise
                reader.release()
                self._idle.append(reader)
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("The request cannot be looked up now (Kafka does not answer in time).") from error

    async def _records(self, reader: LogReader, topic: Topic, request_id: str, since_ms: int) -> AsyncIterator[Record]:
        partition = topic.partition_of(request_id)
        tp = TopicPartition(topic.name, partition)
        reader.assign([topic], [partition])
        await reader.seek_to_time([tp], since_ms - CLOCK_SLACK_MS)
        key = request_id.encode()
        seen = 0
        async for record in reader.read_to_end([tp]):
            seen += 1
            if record.key == key:
                yield record
            if seen >= MAX_SCAN_RECORDS:
                return

    async def request(self, request_id: str, since_ms: int, apps: Mapping[str, App]) -> Asked | None:
        """A request as it was published; None when Kafka does not hold it (any more).

        Others may write to the topic, under any id and in any name: what its sender did not write is passed over.
        """
        async with self._reader() as reader:
            async for record in self._records(reader, REQUESTS, request_id, since_ms):
                with contextlib.suppress(EnvelopeError):
                    sent = sender(record, self._seals, apps)
                    if sent.published is None or (not sent.published.cancels and not sent.refusal):
                        return Asked(sent.envelope, record.timestamp, record.value or b"")
        return None

    async def terminal(self, request_id: str, since_ms: int) -> Terminal | None:
        """The deciding terminal of a request accepted at or after `since_ms`; None when there is none yet."""
        view = LogView()
        async with self._reader() as reader:
            async for record in self._records(reader, LOG, request_id, since_ms):
                with contextlib.suppress(msgspec.MsgspecError):
                    terminal = view.apply(request_log.decode(record.value or b""))
                    if terminal is not None:
                        return terminal
        return None

    async def events(self, request_id: str, since_ms: int) -> list[LifecycleEvent]:
        """The lifecycle of a request accepted at or after `since_ms`, as Kafka holds it."""
        found: list[LifecycleEvent] = []
        async with self._reader() as reader:
            async for record in self._records(reader, EVENTS, request_id, since_ms):
                with contextlib.suppress(msgspec.MsgspecError):
                    found.append(_event.decode(record.value or b""))
        return found


def age_ms(created_ms: int) -> int:
    """How long ago that was."""
    return time.time_ns() // 1_000_000 - created_ms
