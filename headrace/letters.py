"""Reading `dead.letters`, and sending letters again once the cause is mended. A letter's number is its offset."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from aiokafka import TopicPartition

from headrace.control_client import ControlClient, command
from headrace.senders import sender
from headrace.settings import Settings
from schemas import control
from schemas.events import DeadLetter
from schemas.ids import new_request_id
from topics.catalogue import DEAD_LETTERS, MAX_BODY_BYTES, MAX_RESULT_BYTES, REQUESTS
from topics.clients import LogReader, Producer
from topics.dead_letters import PREFIX, describe
from topics.envelope import EnvelopeError, envelope_of
from topics.record import Record
from topics.signing import SEAL, Seals

WINDOW = 200
"""Letters that are read at a time, from the newest back; each may be as large as a message may be."""
MAX_SCAN = 20_000
"""Letters that one page may look through."""
_REPLACED = ("ce_id", "ce_time", "hr-digest", "hr-replay-of", "hr-idempotency-key", SEAL)
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


def resend(letter: Letter, *, new_id: str, now_ms: int, seals: Seals, body: bytes | None = None) -> Resend:
    """The message that replays a letter: a request under a new id that names the old one, any other as it was.

    `body` is sent in place of the letter's. A replay is sealed as an ingress's request, so it must have been one.
    Raises `CannotReplay` for what was not, and for what would only come back: a key that is not UTF-8, a body that is
    too large, a record that is no letter.
    """
    value = letter.value if body is None else body
    most = MAX_BODY_BYTES if letter.about.source_topic == REQUESTS.name else MAX_RESULT_BYTES
    if len(value or b"") > most:
        raise CannotReplay(f"letter {letter.number} cannot be replayed: its body is over {most} bytes")
    if letter.about.source_topic == DEAD_LETTERS.name:
        raise CannotReplay(f"letter {letter.number} cannot be replayed: {letter.about.reason}")
    seen = (PREFIX + "times-seen", str(letter.about.times_seen).encode())
    if letter.about.source_topic != REQUESTS.name:
        try:
            key = letter.key.decode() if letter.key is not None else None
        except UnicodeDecodeError:
            raise CannotReplay(f"letter {letter.number} cannot be replayed: its key is not UTF-8") from None
        return Resend(letter.about.source_topic, key, letter.about.partition, [*letter.headers, seen], value)
    try:
        old = sender(letter, seals, {}).envelope
    except EnvelopeError as error:
        raise CannotReplay(f"letter {letter.number} cannot be replayed: {error}") from None
    stamp = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    digest = old.digest if body is None else hashlib.sha256(body).hexdigest()
    ours = [("ce_id", new_id), ("ce_time", stamp), ("hr-digest", digest), ("hr-replay-of", old.request_id)]
    kept = [(name, held) for name, held in letter.headers if name not in _REPLACED]
    headers = [*kept, *((name, text.encode()) for name, text in ours)]
    return Resend(REQUESTS.name, new_id, None, [*seals.sealed(REQUESTS.name, headers, digest), seen], value)


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


class About(NamedTuple):
    """Whose a letter is, as far as it can be told; empty where not."""

    tenant: str
    request_id: str
    key_id: str
    accepted_ms: int

    @property
    def known(self) -> bool:
        """Whether anybody is named."""
        return bool(self.tenant or self.request_id)


class _Named(msgspec.Struct):
    """The fields by which our own records say whose they are."""

    tenant: str = ""
    request_id: str = ""
    key_id: str = ""
    accepted_ms: int = 0


def whose(letter: Letter) -> About:
    """Whose a letter is: by the envelope of a request, or by the fields of our other records."""
    with contextlib.suppress(EnvelopeError):
        found = envelope_of(letter.headers)
        return About(found.tenant, found.request_id, found.key_id, found.time_ms)
    with contextlib.suppress(msgspec.MsgspecError):
        said = msgspec.json.decode(letter.value or b"", type=_Named)
        return About(said.tenant, said.request_id, said.key_id, said.accepted_ms or letter.about.at_ms)
    return About("", "", "", letter.about.at_ms)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters are wanted; what is empty does not matter."""

    topic: str = ""
    role: str = ""
    reason: str = ""
    """Part of the reason, in any case."""

    def takes(self, letter: Letter) -> bool:
        """Whether a letter is wanted."""
        about = letter.about
        return (
            self.topic in ("", about.source_topic)
            and self.role in ("", about.role)
            and self.reason.lower() in about.reason.lower()
        )


async def page(
    conf: Settings, wanted: Wanted, *, limit: int, before: int | None = None
) -> tuple[list[Letter], int | None]:
    """Up to `limit` letters that match, from number `before` back, and where the next page goes on.

    It may be shorter though there are more: one page looks through `MAX_SCAN` letters at most.
    """
    found: list[Letter] = []
    async with LogReader(conf.kafka, "dead-letters", max_wait_ms=100) as reader:
        [partition] = reader.assign([DEAD_LETTERS])
        begin = (await reader.consumer.beginning_offsets([partition]))[partition]
        end = (await reader.consumer.end_offsets([partition]))[partition]
        end = end if before is None else min(end, before)
        lowest = max(begin, end - MAX_SCAN)
        while end > lowest:
            start = max(lowest, end - WINDOW)
            for letter in reversed(await _between(reader, partition, start, end)):
                if wanted.takes(letter):
                    found.append(letter)
                    if len(found) == limit:
                        return found, letter.number if letter.number > begin else None
            end = start
    return found, end if end > begin else None


async def _between(reader: LogReader, partition: TopicPartition, start: int, end: int) -> list[Letter]:
    reader.consumer.seek(partition, start)
    return [letter_of(record) async for record in reader.read_to_end([partition], {partition: end})]


async def replay(
    client: ControlClient,
    producer: Producer,
    letter: Letter,
    *,
    seals: Seals,
    actor: str,
    reason: str = "",
    body: bytes | None = None,
    again: bool = False,
) -> Resend:
    """Send a letter again, with another body if one is given; once, unless `again`.

    It is claimed at the control processor before it is sent, and said to be sent afterwards; the audit trail has both.
    Whoever dies between leaves a claim; asked once more, the same message goes out under the same id, and who
    reads it tells a duplicate. Raises `CannotReplay`, `CommandsRefused` when it was replayed before, `Unavailable`,
    or `KafkaError`.
    """
    now_ms = time.time_ns() // 1_000_000
    resend(letter, new_id="", now_ms=now_ms, seals=seals, body=body)
    value = letter.value if body is None else body
    claim = control.Replay(
        letter=key_of(letter),
        new_id=new_request_id(),
        digest=hashlib.sha256(value or b"").hexdigest(),
        edited=body is not None,
        again=again,
    )
    await client.submit([command(claim, actor=actor, reason=reason)])
    [raw] = await client.some("replays", [claim.letter])
    held = msgspec.json.decode(raw, type=control.Replay)
    message = resend(letter, new_id=held.new_id, now_ms=now_ms, seals=seals, body=body)
    await producer.send(
        message.topic, message.value, key=message.key, partition=message.partition, headers=message.headers
    )
    await client.submit([command(msgspec.structs.replace(held, sent=True), actor=actor, reason=reason)])
    return message


def key_of(letter: Letter) -> str:
    """The natural key of a letter's replay: a number may come again in a topic that was made anew."""
    return f"{letter.number}/{letter.about.at_ms}"
