"""A producer for tests of one worker: it keeps what it is given, in place of the brokers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiokafka.structs import RecordMetadata, TopicPartition

from schemas.events import Terminal
from topics import frames, request_log
from topics.catalogue import LOG, REPLIES
from topics.clients import Producer


class Recorder(Producer):
    """Takes records in place of the brokers, and acknowledges them."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes]] = []

    async def post(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[RecordMetadata]:
        self.records.append((topic, value or b""))
        sent: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        sent.set_result(RecordMetadata(topic, 0, TopicPartition(topic, 0), len(self.records), 0, 0, 0))
        return sent

    def post_later(
        self, topic: str, value: bytes | None, *, key: str | None = None, partition: int | None = None
    ) -> None:
        self.records.append((topic, value or b""))

    def told(self) -> list[frames.Delta]:
        """All frames, in their order."""
        return [delta for topic, value in self.records if topic == REPLIES.name for delta in frames.decode(value)]

    def terminals(self) -> list[Terminal]:
        """What was written to the log."""
        found = [request_log.decode(value) for topic, value in self.records if topic == LOG.name]
        return [one for one in found if isinstance(one, Terminal)]

    def terminal(self) -> Terminal:
        """The only terminal."""
        [found] = self.terminals()
        return found
