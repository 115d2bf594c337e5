"""Kafka records to ClickHouse rows. Pure; a row is a function of its record alone, so that a replay gives it again.

No prompt and no output goes into a row: of a terminal's answer only its token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import NamedTuple

import msgspec

from clickhouse.tables import ATTEMPTS, AUDIT_EVENTS, EVENTS, LEASE_EVENTS, REQUESTS, USAGE, Table
from schemas.audit import AuditEvent
from schemas.events import (
    STAGE_RANK,
    AttemptOpened,
    ErrorInfo,
    LeaseEvent,
    LifecycleEvent,
    PricedBefore,
    Terminal,
    UsageEvent,
)
from topics import catalogue, request_log
from topics.record import Record

Row = tuple[object, ...]

FIRST_WINS = 2**63
"""A row's `precedence` is this minus its offset, so that of rows with one key the lowest offset is kept."""
REVISION = 2**48
"""… plus its revision times this: the highest revision is kept, and of that the lowest offset."""
MAX_REVISION = 2**15 - 1
COST_PLACES = Decimal(1).scaleb(-18)
COST_BOUND = Decimal(10) ** 20
AUDIO_PLACES = Decimal(1).scaleb(-3)
AUDIO_BOUND = Decimal(10) ** 12
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
MAX_ID_CHARS = 64
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST_MS = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp() * 1000)
_LATEST_MS = int(datetime(2106, 1, 1, tzinfo=UTC).timestamp() * 1000)
"""A DateTime, which TTL expressions use, ends in 2106."""
_U16, _U32, _U64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
_I64 = 2**63 - 1


class Unreadable(ValueError):
    """A record that can never become a row; the message says why, without its content."""


class Item(NamedTuple):
    """One row, its table, and the record it came from."""

    table: Table
    row: Row
    source: Record


def _time(ms: int, name: str) -> datetime:
    if not _EARLIEST_MS <= ms < _LATEST_MS:
        raise Unreadable(f"{name} is {ms}, which is no time in ms between 2020 and 2106")
    return _EPOCH + timedelta(milliseconds=ms)


def _maybe_time(ms: int, name: str) -> datetime | None:
    return _time(ms, name) if ms else None


def _count(value: int, name: str, highest: int = _U64, lowest: int = 0) -> int:
    if not lowest <= value <= highest:
        raise Unreadable(f"{name} is {value}, expected {lowest} to {highest}")
    return value


def _id(value: str, name: str) -> str:
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise Unreadable(f"{name} has {len(value)} characters, expected 1 to {MAX_ID_CHARS}")
    return value


def _span(start_ms: int, end_ms: int) -> int | None:
    """Milliseconds between two steps, None where one did not happen; hosts' clocks differ, so never below 0."""
    return max(0, end_ms - start_ms) if start_ms and end_ms else None


def _source(record: Record) -> tuple[int, int, int]:
    return record.partition, record.offset, FIRST_WINS - record.offset


def attempt_row(event: AttemptOpened, record: Record) -> Row:
    """Row of `request_attempts_raw`. Raises `Unreadable`."""
    return (
        _id(event.request_id, "request_id"),
        event.tenant,
        _count(event.attempt, "attempt", _U32, 1),
        _count(event.epoch, "epoch", _I64, -1),
        event.worker,
        event.reason,
        _time(event.at_ms or record.timestamp, "at_ms"),
        *_source(record),
    )


def request_row(event: Terminal, record: Record) -> Row:
    """Row of `requests_raw`. Raises `Unreadable`."""
    times, usage = event.timings, event.usage
    error = event.error or ErrorInfo(status=0, code="", message="", type="")
    accepted_ms = times.accepted_ms or record.timestamp
    finished_ms = times.finished_ms or record.timestamp
    return (
        _id(event.request_id, "request_id"),
        event.tenant,
        event.key_id,
        event.model,
        event.alias,
        event.pool,
        event.provider,
        event.worker,
        event.status.value,
        event.stream,
        _count(event.attempt, "attempt", _U32, 1),
        _count(event.epoch, "epoch", _I64, -1),
        _count(error.status, "error.status", _U16),
        error.code,
        error.type,
        error.message,
        _count(usage.prompt_tokens, "prompt_tokens"),
        _count(usage.cached_tokens, "cached_tokens"),
        _count(usage.completion_tokens, "completion_tokens"),
        _count(usage.reasoning_tokens, "reasoning_tokens"),
        usage.estimated,
        _count(event.price.version, "price.version", _I64, -1) if event.price is not None else -1,
        _time(accepted_ms, "accepted_ms"),
        _maybe_time(times.routed_ms, "routed_ms"),
        _maybe_time(times.assigned_ms, "assigned_ms"),
        _maybe_time(times.started_ms, "started_ms"),
        _maybe_time(times.first_token_ms, "first_token_ms"),
        _time(finished_ms, "finished_ms"),
        _span(times.routed_ms, times.assigned_ms),
        _span(times.accepted_ms, times.first_token_ms),
        _span(times.started_ms, finished_ms),
        max(0, finished_ms - accepted_ms),
        *_source(record),
    )


def event_row(event: LifecycleEvent, record: Record) -> Row:
    """Row of `request_events_raw`. Raises `Unreadable`."""
    return (
        _id(event.request_id, "request_id"),
        event.tenant,
        _count(event.attempt, "attempt", _U32),
        STAGE_RANK.get(event.stage, 255),
        str(event.stage),
        event.role,
        event.instance,
        _count(event.epoch, "epoch", _I64, -1),
        _time(event.at_ms or record.timestamp, "at_ms"),
        {name: _text(value) for name, value in event.detail.items()},
        *_source(record),
    )


def _text(value: str | int | float | bool) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


_USAGE_COUNTS = (
    ("attempts", _U32), ("prompt_tokens", _U64), ("cached_tokens", _U64), ("completion_tokens", _U64),
    ("reasoning_tokens", _U64), ("images", _U64), ("revision", MAX_REVISION),
)  # fmt: skip
_NO_AUDIO = Decimal("0.000")


def usage_row(event: UsageEvent, record: Record) -> Row:
    """Row of `usage_lines_raw`, times in Unix ms; a cost of more than 18 places is rounded half to even.

    Written for speed, since a backlog of years goes through here. Raises `Unreadable`.
    """
    attempts, prompt, cached = event.attempts, event.prompt_tokens, event.cached_tokens
    completion, reasoning, images, revision = (
        event.completion_tokens, event.reasoning_tokens, event.images, event.revision,
    )  # fmt: skip
    counts = (attempts, prompt, cached, completion, reasoning, images, revision)
    if min(counts) < 0 or max(counts) > MAX_REVISION:  # nearly none is above the least of the bounds
        for (name, highest), value in zip(_USAGE_COUNTS, counts, strict=True):
            _count(value, name, highest)
    offset = record.offset
    return (
        _id(event.usage_id, "usage_id"),
        _id(event.request_id, "request_id"),
        event.tenant,
        event.key_id,
        event.user_id,
        event.model,
        event.alias,
        event.provider,
        event.worker,
        event.status.value,
        event.error_code,
        attempts,
        prompt,
        cached,
        completion,
        reasoning,
        event.estimated,
        _audio(event.audio_seconds) if event.audio_seconds else _NO_AUDIO,
        images,
        revision,
        _count(event.price_version, "price_version", _I64, -1),
        event.currency,
        _cost(event.cost),
        [_before(before) for before in event.repriced_of] if event.repriced_of else [],
        event.stream,
        _ms(event.accepted_ms or record.timestamp, "accepted_ms"),
        _ms(event.finished_ms or record.timestamp, "finished_ms"),
        _duration(event.queue_ms, "queue_ms"),
        _duration(event.load_ms, "load_ms"),
        _duration(event.ttft_ms, "ttft_ms"),
        _duration(event.generation_ms, "generation_ms"),
        record.partition,
        offset,
        FIRST_WINS - offset + revision * REVISION,
    )


def _ms(ms: int, name: str) -> int:
    if not _EARLIEST_MS <= ms < _LATEST_MS:
        _time(ms, name)
    return ms


def _duration(ms: int, name: str) -> int:
    return ms if 0 <= ms <= _I64 else max(0, _count(ms, name, _I64, -_I64))


def _audio(seconds: Decimal) -> Decimal:
    if not seconds.is_finite() or not 0 <= seconds < AUDIO_BOUND:
        raise Unreadable("audio_seconds is not a finite number from 0 to 10^12")
    return seconds.quantize(AUDIO_PLACES, context=_EXACT)


def _before(before: PricedBefore) -> tuple[int, int, str, Decimal]:
    return (
        _count(before.revision, "repriced_of.revision", MAX_REVISION),
        _count(before.price_version, "repriced_of.price_version", _I64, -1),
        before.currency,
        _cost(before.cost),
    )


def _cost(cost: Decimal) -> Decimal:
    if not cost.is_finite() or abs(cost) >= COST_BOUND:
        raise Unreadable("cost is not a finite number below 10^20")
    return cost.quantize(COST_PLACES, context=_EXACT)


def lease_row(event: LeaseEvent, record: Record) -> Row:
    """Row of `lease_events_raw`; a granted record's own offset is the lease's epoch. Raises `Unreadable`."""
    epoch = record.offset if event.state == "granted" else event.epoch
    return (
        event.pool,
        event.worker,
        event.model,
        _count(epoch, "epoch", _I64),
        event.device,
        event.boot,
        _count(event.term, "term", _I64),
        event.state,
        _count(event.bytes, "bytes", _I64),
        event.reason,
        _time(event.at_ms or record.timestamp, "at_ms"),
        *_source(record),
    )


def audit_row(event: AuditEvent, record: Record) -> Row:
    """Row of `audit_events_raw`. Raises `Unreadable`."""
    return (
        _count(event.seq, "seq"),
        _id(event.hash, "hash"),
        event.previous,
        _time(event.at_ms or record.timestamp, "at_ms"),
        event.command,
        event.actor,
        event.action,
        event.kind,
        event.key,
        event.outcome,
        event.reason,
        event.refusal,
        {name: (change.before, change.after) for name, change in event.changes.items()},
        event.detail,
        *_source(record),
    )


_usage_decoder = msgspec.json.Decoder(UsageEvent)
_event_decoder = msgspec.json.Decoder(LifecycleEvent)
_lease_decoder = msgspec.json.Decoder(LeaseEvent)
_audit_decoder = msgspec.json.Decoder(AuditEvent)


def _log(value: bytes, record: Record) -> tuple[Table, Row]:
    decoded = request_log.decode(value)
    if isinstance(decoded, AttemptOpened):
        return ATTEMPTS, attempt_row(decoded, record)
    return REQUESTS, request_row(decoded, record)


def _event(value: bytes, record: Record) -> tuple[Table, Row]:
    return EVENTS, event_row(_event_decoder.decode(value), record)


def _usage(value: bytes, record: Record) -> tuple[Table, Row]:
    return USAGE, usage_row(_usage_decoder.decode(value), record)


def _lease(value: bytes, record: Record) -> tuple[Table, Row]:
    return LEASE_EVENTS, lease_row(_lease_decoder.decode(value), record)


def _audit(value: bytes, record: Record) -> tuple[Table, Row]:
    return AUDIT_EVENTS, audit_row(_audit_decoder.decode(value), record)


_READERS: dict[str, Callable[[bytes, Record], tuple[Table, Row]]] = {
    catalogue.LOG.name: _log,
    catalogue.EVENTS.name: _event,
    catalogue.USAGE.name: _usage,
    catalogue.LEASES.name: _lease,
    catalogue.AUDIT_EVENTS.name: _audit,
}
TOPICS: Sequence[catalogue.Topic] = (
    catalogue.LOG,
    catalogue.EVENTS,
    catalogue.USAGE,
    catalogue.LEASES,
    catalogue.AUDIT_EVENTS,
)
"""The topics that become rows. The last is written in transactions: what one took back must not be read."""


def read(record: Record) -> Item:
    """The row of a record of one of `TOPICS`. Raises `Unreadable`."""
    if record.value is None:
        raise Unreadable("the record has no value")
    try:
        table, row = _READERS[record.topic](record.value, record)
    except Unreadable:
        raise
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None
    return Item(table, row, record)
