"""Writes to the answers of apps, `replies.<app>`, whose topics are there or are made before the first record."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from aiokafka.structs import RecordMetadata

from headrace.settings import Settings
from topics.apply import ensure
from topics.catalogue import answers_of
from topics.clients import Producer

log = structlog.get_logger(__name__)


class AnswerWriter:
    """One producer's way to any app's answers."""

    def __init__(self, settings: Settings, producer: Producer) -> None:
        self._settings = settings
        self._producer = producer
        self._there: set[str] = set()

    async def post(
        self, app: str, key: str, value: bytes, headers: Sequence[tuple[str, bytes]]
    ) -> asyncio.Future[RecordMetadata]:
        """Put a record into the send buffer; the future resolves when it is durable.

        Raises `ApplyError` where the topic is not there and cannot be made.
        """
        topic = answers_of(app)
        if app not in self._there:
            if await ensure(self._settings, topic):
                log.warning("answers_topic_made", topic=topic.name)
            self._there.add(app)
        return await self._producer.post(topic.name, value, key=key, headers=headers)
