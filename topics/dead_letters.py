"""Dead letters: a message that cannot be handled is kept as it was, with the reason beside it; the stream goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from headrace import metrics
from schemas.events import DeadLetter
from topics.catalogue import DEAD_LETTERS
from topics.clients import Producer
from topics.record import Record

log = structlog.get_logger(__name__)

PREFIX = "hr-dl-"
"""Our headers on a dead letter begin with this; the message's own headers stand beside them unchanged."""
MAX_REASON_CHARS = 2000
NOT_ACCEPTED = "not accepted: "
"""Reasons begin with this where the message counts as no request: it gets no terminal, whatever it says of itself."""


async def bury(producer: Producer, record: Record, *, reason: str, role: str) -> None:
    """Write `record` to `dead.letters` and wait until it is durable. Raises `KafkaError` when it could not be."""
    headers = [(_written(name), value) for name, value in record.headers if not name.startswith(PREFIX)]
    ours = {
        "topic": record.topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
        "reason": reason[:MAX_REASON_CHARS],
        "role": role,
        "at-ms": str(time.time_ns() // 1_000_000),
        "times-seen": str(_times_seen(record) + 1),
    }
    if record.key is not None:
        ours["key"] = record.key.decode("latin-1")
    headers += [(PREFIX + name, value.encode()) for name, value in ours.items()]
    await producer.send(DEAD_LETTERS.name, record.value, key=record.topic, headers=headers)
    metrics.DEAD_LETTERS.labels(role=role, topic=record.topic).inc()
    log.error(
        "dead_letter", topic=record.topic, partition=record.partition, offset=record.offset, reason=reason, role=role
    )


def _written(name: str) -> str:
    """A header's name as it can be written: bytes in it that are not UTF-8 are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _times_seen(record: Record) -> int:
    for name, value in record.headers:
        if name == PREFIX + "times-seen" and value.isdigit():
            return int(value)
    return 0


def describe(headers: Sequence[tuple[str, bytes]]) -> tuple[DeadLetter, bytes | None, list[tuple[str, bytes]]]:
    """The reason, the original key and the original headers of a dead letter. Raises `ValueError` when it is none."""
    ours = {name.removeprefix(PREFIX): value for name, value in headers if name.startswith(PREFIX)}
    try:
        letter = DeadLetter(
            source_topic=ours["topic"].decode(),
            partition=int(ours["partition"]),
            offset=int(ours["offset"]),
            reason=ours["reason"].decode(errors="replace"),
            role=ours["role"].decode(),
            at_ms=int(ours["at-ms"]),
            times_seen=int(ours["times-seen"]),
        )
    except KeyError as missing:
        raise ValueError(f"not a dead letter: header {PREFIX}{missing.args[0]} is missing") from None
    key = ours["key"].decode().encode("latin-1") if "key" in ours else None
    return letter, key, [(name, value) for name, value in headers if not name.startswith(PREFIX)]
