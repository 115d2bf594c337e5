"""Reading `dead.letters`, and sending letters again once the cause is mended. A letter's number is its offset."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from headrace.settings import Settings
from schemas.events import DeadLetter
from schemas.ids import new_request_id
from topics.catalogue import DEAD_LETTERS, REQUESTS
from topics.clients import LogReader, Producer
from topics.dead_letters import PREFIX, describe
from topics.envelope import EnvelopeError, parse
from topics.record import Record

_REPLACED = ("ce_id", "ce_time", "hr-replay-of", "hr-idempotency-key")
"""Headers of a request that a replay writes anew. The Idempotency-Key goes: the new id is not derived from it."""


class CannotReplay(ValueError):
    """A letter that must not be sent again as it is; the message says why."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: why it is one, and the message as it was."""

    number: int
    about: DeadLetter
    key: bytes | None
    headers: list[tuple[str, bytes]]
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Resend:
    """A message to send. `partition` None lets the key decide."""

    topic: str
    key: str | None
    partition: int | None
    headers: list[tuple[str, bytes]]
    value: bytes | None


def resend(letter: Letter, *, new_id: str, now_ms: int) -> Resend:
    """The message that replays a letter: a request under a new id that names the old one, any other as it was.

    Raises `CannotReplay` for what would only come back: a request whose envelope cannot be read, a key that is not
    UTF-8, and a record of `dead.letters` that is no letter.
    """
    if letter.about.source_topic == DEAD_LETTERS.name:
        raise CannotReplay(f"letter {letter.number} cannot be replayed: {letter.about.reason}")
    seen = (PREFIX + "times-seen", str(letter.about.times_seen).encode())
    if letter.about.source_topic != REQUESTS.name:
        try:
            key = letter.key.decode() if letter.key is not None else None
        except UnicodeDecodeError:
            raise CannotReplay(f"letter {letter.number} cannot be replayed: its key is not UTF-8") from None
        return Resend(letter.about.source_topic, key, letter.about.partition, [*letter.headers, seen], letter.value)
    try:
        old = parse(letter.headers)
    except EnvelopeError as error:
        raise CannotReplay(f"letter {letter.number} cannot be replayed: {error}") from None
    stamp = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    ours = [("ce_id", new_id), ("ce_time", stamp), ("hr-replay-of", old.request_id)]
    kept = [(name, value) for name, value in letter.headers if name not in _REPLACED]
    headers = [*kept, *((name, value.encode()) for name, value in ours), seen]
    return Resend(REQUESTS.name, new_id, None, headers, letter.value)


async def read(conf: Settings, *, topic: str | None = None, first: int = 0) -> AsyncGenerator[Letter, None]:
    """The letters from number `first` on, oldest first; only those from `topic` if it is given."""
    async with LogReader(conf.kafka, "dead-letters", max_wait_ms=100) as reader:
        assignment = reader.assign([DEAD_LETTERS])
        begins = await reader.consumer.beginning_offsets(assignment)
        for partition, begin in begins.items():
            reader.consumer.seek(partition, max(begin, first))
        async for record in reader.read_to_end(assignment):
            letter = letter_of(record)
            if topic is None or letter.about.source_topic == topic:
                yield letter


def letter_of(record: Record) -> Letter:
    """A record of `dead.letters`; one without our headers is its own source, and says so."""
    try:
        about, key, headers = describe(record.headers)
    except ValueError as error:
        about = DeadLetter(record.topic, record.partition, record.offset, str(error), "unknown", record.timestamp)
        return Letter(record.offset, about, record.key, list(record.headers), record.value)
    return Letter(record.offset, about, key, headers, record.value)


async def find(conf: Settings, number: int) -> Letter | None:
    """The letter of that number, or None when there is none (any more)."""
    letters = read(conf, first=number)
    try:
        async for letter in letters:
            return letter if letter.number == number else None
        return None
    finally:
        await letters.aclose()


async def replay(conf: Settings, letters: Sequence[Letter]) -> list[tuple[Letter, Resend]]:
    """Send letters again, in order, each durable before the next. Raises `CannotReplay` before anything is sent."""
    now_ms = time.time_ns() // 1_000_000
    messages = [(letter, resend(letter, new_id=new_request_id(), now_ms=now_ms)) for letter in letters]
    async with Producer(conf.kafka, "dead-letters") as producer:
        for _, message in messages:
            await producer.send(
                message.topic, message.value, key=message.key, partition=message.partition, headers=message.headers
            )
    return messages
