"""Questions about usage: a validated query becomes SQL over the rollups, with every value a bound parameter. Pure.

A range is covered by the coarsest windows that fit: whole days, the hours around them, the minutes around those, and
the rows themselves at the edges. No text of a caller's reaches the SQL: names come from the tables below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum

DIMENSIONS: dict[str, str] = {
    "tenant": "tenant",
    "app": "tenant",
    "key": "key_id",
    "user": "user_id",
    "model": "model",
    "alias": "alias",
    "provider": "provider",
    "worker": "worker",
    "status": "status",
    "error": "error_code",
}
"""By what usage may be grouped and filtered -> the column. The currency is always a group: money of two is no sum."""
MEASURES = (
    "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "images", "audio_seconds",
    "estimated_requests", "cost", "queue_ms", "load_ms", "ttft_ms", "generation_ms", "total_ms",
)  # fmt: skip
_MEANS = {"queue_ms": "requests", "load_ms": "requests", "ttft_ms": "answered", "generation_ms": "requests",
          "total_ms": "requests"}  # fmt: skip
_SUMMED = (*MEASURES, "answered")
MAX_ROWS = 10_000
MAX_BUCKETS = 5_000
MAX_VALUES = 100
"""Of one filter."""


class BadUsageQuery(ValueError):
    """The question cannot be answered; the message says what would be right."""


class Bucket(StrEnum):
    """Length of the steps of time; `none` makes one row of the whole range, months are the calendar's, in UTC."""

    NONE = "none"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


_STEP = {
    Bucket.MINUTE: timedelta(minutes=1),
    Bucket.HOUR: timedelta(hours=1),
    Bucket.DAY: timedelta(days=1),
    Bucket.MONTH: timedelta(days=28),
}
_START = {
    Bucket.MINUTE: "toStartOfMinute(at)",
    Bucket.HOUR: "toStartOfHour(at)",
    Bucket.DAY: "toStartOfDay(at)",
    Bucket.MONTH: "toDateTime(toStartOfMonth(at), 'UTC')",
}


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What is asked. Times are aware; the range holds its begin and not its end."""

    begin: datetime
    end: datetime
    bucket: Bucket = Bucket.NONE
    by: tuple[str, ...] = ()
    """Names of `DIMENSIONS`."""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dimension -> the values that count."""
    limit: int = 1000

    def __post_init__(self) -> None:
        """Raises `BadUsageQuery`."""
        known = ", ".join(DIMENSIONS)
        for name in (*self.by, *self.where):
            if name not in DIMENSIONS:
                raise BadUsageQuery(f"there is no dimension {name!r}; there are: {known}")
        columns = [DIMENSIONS[name] for name in self.by]
        if len(set(columns)) != len(columns):
            raise BadUsageQuery("a dimension is named twice in `by`")
        if self.begin.tzinfo is None or self.end.tzinfo is None:
            raise BadUsageQuery("times need an offset, such as 2026-11-01T00:00:00Z")
        if self.begin >= self.end:
            raise BadUsageQuery("`from` must be before `to`")
        if not 1 <= self.limit <= MAX_ROWS:
            raise BadUsageQuery(f"`limit` must be 1 to {MAX_ROWS}")
        step = _STEP.get(self.bucket)
        if step is not None and (self.end - self.begin) / step > MAX_BUCKETS:
            raise BadUsageQuery(f"that is more than {MAX_BUCKETS} steps; ask for a shorter range or longer steps")
        for name, values in self.where.items():
            if not 1 <= len(values) <= MAX_VALUES:
                raise BadUsageQuery(f"give 1 to {MAX_VALUES} values for {name!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the answer's columns."""
        start = () if self.bucket is Bucket.NONE else ("start",)
        return (*start, *self.by, "currency", *MEASURES)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a range, and the windows that cover it."""

    grain: str
    begin: datetime
    end: datetime


_FLOORS: tuple[tuple[str, int], ...] = (("day", 86_400), ("hour", 3_600))
_SOURCES = {"day": ("usage_by_day", "day"), "hour": ("usage_by_hour", "hour")}


def cover(begin: datetime, end: datetime, *, finest: Bucket) -> Iterator[Piece]:
    """Pieces that hold each moment of the range once: windows no longer than the steps, the coarsest that fit."""
    usable = [
        (grain, length)
        for grain, length in _FLOORS
        if not (finest is Bucket.MINUTE or (finest is Bucket.HOUR and grain == "day"))
    ]
    yield from _cover(begin, end, usable)


def _cover(begin: datetime, end: datetime, grains: list[tuple[str, int]]) -> Iterator[Piece]:
    if begin >= end:
        return
    if not grains:
        yield Piece("row", begin, end)
        return
    (grain, length), finer = grains[0], grains[1:]
    first, last = _ceil(begin, length), _floor(end, length)
    if first >= last:
        yield from _cover(begin, end, finer)
        return
    yield from _cover(begin, first, finer)
    yield Piece(grain, first, last)
    yield from _cover(last, end, finer)


def _floor(at: datetime, length_s: int) -> datetime:
    return datetime.fromtimestamp(at.timestamp() // length_s * length_s, UTC)


def _ceil(at: datetime, length_s: int) -> datetime:
    return datetime.fromtimestamp(-(-at.timestamp() // length_s) * length_s, UTC)


def build(query: UsageQuery) -> tuple[str, dict[str, object]]:
    """The SQL of a question and the values of its parameters (`{name:Type}`)."""
    values: dict[str, object] = {"limit": query.limit}
    labels = list(dict.fromkeys([*(DIMENSIONS[name] for name in query.by), "currency"]))
    filters = []
    for number, (name, wanted) in enumerate(query.where.items()):
        values[f"f{number}"] = list(wanted)
        filters.append(f"{DIMENSIONS[name]} IN {{f{number}:Array(String)}}")
    parts = []
    # Nobody adds up by worker, as there would be a sum for nearly every request: rows tell.
    rolled = "worker" not in (*query.by, *query.where)
    pieces = cover(query.begin, query.end, finest=query.bucket) if rolled else [Piece("row", query.begin, query.end)]
    for number, piece in enumerate(pieces):
        values[f"b{number}"], values[f"e{number}"] = _text(piece.begin), _text(piece.end)
        parts.append(_part(piece, number, labels, filters))
    start = _START.get(query.bucket)
    named = [f"{DIMENSIONS[name]} AS `{name}`" if name != DIMENSIONS[name] else name for name in query.by]
    shown = [*([f"{start} AS start"] if start else []), *named, "currency", *map(_measure, MEASURES)]
    groups = [*(["start"] if start else []), *labels]
    order = ["start"] if start else []
    sql = (
        f"SELECT {', '.join(shown)} FROM ({' UNION ALL '.join(parts)}) AS part "  # noqa: S608
        f"GROUP BY {', '.join(groups)} "
        f"ORDER BY {', '.join([*order, 'cost DESC', 'requests DESC', *labels])} LIMIT {{limit:UInt32}}"
    )
    return sql, values


def _measure(name: str) -> str:
    """A sum, or of durations the mean over the requests that have one."""
    if name in _MEANS:
        return f"round(sum(part.{name}) / greatest(sum(part.{_MEANS[name]}), 1), 1) AS {name}"
    return f"sum(part.{name}) AS {name}"


def _part(piece: Piece, number: int, labels: list[str], filters: list[str]) -> str:
    begin, end = f"{{b{number}:DateTime64(3, 'UTC')}}", f"{{e{number}:DateTime64(3, 'UTC')}}"
    if piece.grain == "row":
        at, source = "toStartOfMinute(accepted_at)", "usage"
        time, sums = "accepted_at", [_of_row(name) for name in _SUMMED]
    else:
        source, time = _SOURCES[piece.grain]
        at, sums = time, list(_SUMMED)
    where = " AND ".join([f"{time} >= {begin}", f"{time} < {end}", *filters])
    return f"SELECT {at} AS at, {', '.join(labels)}, {', '.join(sums)} FROM {source} WHERE {where}"  # noqa: S608


def _of_row(name: str) -> str:
    special = {"requests": "1", "answered": "ttft_ms > 0", "estimated_requests": "estimated"}
    if name in special:
        return f"toUInt64({special[name]}) AS {name}"
    if name == "audio_seconds":
        return "CAST(audio_seconds AS Decimal(38, 3)) AS audio_seconds"
    return name


def _text(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def plain(value: object) -> object:
    """A value of an answer as JSON has it: money as a string, so that it stays exact; times in ISO 8601."""
    if isinstance(value, Decimal):
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return value
