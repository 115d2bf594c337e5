"""Questions about usage: a validated query becomes SQL over the rollups, with every value a bound parameter. Pure.

A range is covered by the coarsest windows that fit and whose sums are right: whole days, the hours around and between
them, and the rows themselves at the edges and where rows came since the sums. What there is, is asked first
(`windows_sql`): views that look for themselves (`usage_by_day`) are planned for longer than all else takes. No text of
a caller's reaches the SQL: names come from the tables below.
"""
# ruff: noqa: S608  (names of the tables below, and numbers that the engine gave, stand in the statements)

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

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
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2106, 1, 1, tzinfo=UTC)
"""What the engine's times of whole seconds can tell."""
OTHER_YEARS = "times must be of the years 1970 to 2105"


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
class Place:
    """A row's place in the order of an answer: after it, the next page begins."""

    start: int
    """Of its step, in Unix seconds; 0 where there are no steps."""
    cost: Decimal
    requests: int
    labels: tuple[str, ...]
    """Of its group, the currency last."""

    def fits(self, query: UsageQuery) -> bool:
        """Whether a row of this question can be there: its values are numbers that the engine has."""
        digits = self.cost.as_tuple()
        return (
            len(self.labels) == len(query.by) + 1
            and 0 <= self.start < 2**32
            and 0 <= self.requests < 2**64
            and isinstance(digits.exponent, int)
            and -18 <= digits.exponent <= 0
            and abs(self.cost) < 10**20
        )


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
    after: Place | None = None
    """The last row of the page before."""

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
        if not _FIRST <= self.begin <= _LAST or not _FIRST <= self.end <= _LAST:
            raise BadUsageQuery(OTHER_YEARS)
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
        if self.after is not None and not self.after.fits(self):
            raise BadUsageQuery("`after` names no place in this answer")

    @property
    def rolled(self) -> bool:
        """Whether sums can answer it. Nobody adds up by worker, as there would be a sum for nearly every request."""
        return "worker" not in (*self.by, *self.where)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the answer's columns."""
        start = () if self.bucket is Bucket.NONE else ("start",)
        return (*start, *self.by, "currency", *MEASURES)


HOUR_S, DAY_S = 3_600, 86_400
MAX_RANGES = 64
"""Of rows, in one statement; where usage is in more pieces than that, all of it is read as rows."""


@dataclass(slots=True)
class Windows:
    """The hours and days of a range in which there is usage: their starts, in Unix seconds.

    Each has the number of the sums that are right, or None where rows came since they were made.
    """

    days: dict[int, int | None] = field(default_factory=dict)
    hours: dict[int, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]]) -> Windows:
        """From what `windows_sql` gives."""
        made = cls()
        for grain, start, computation, clean in rows:
            (made.days if grain == "day" else made.hours)[start] = computation if clean else None
        return made


@dataclass(slots=True)
class Cover:
    """A range in parts that hold each of its moments once."""

    days: dict[int, int] = field(default_factory=dict)
    hours: dict[int, int] = field(default_factory=dict)
    """Start of a window -> number of its sums."""
    rows: list[tuple[datetime, datetime]] = field(default_factory=list)
    """Begin and end of what is read row by row, in order."""


def cover(begin: datetime, end: datetime, *, finest: Bucket, windows: Windows) -> Cover:
    """Parts of a range: windows no longer than the steps, the coarsest that fit; nothing where there is no usage."""
    first, last = _ceil(begin, HOUR_S), _floor(end, HOUR_S)
    if finest is Bucket.MINUTE or first >= last:
        return Cover(rows=[(begin, end)])
    made = Cover(rows=[(begin, _at(first))])
    if finest is not Bucket.HOUR:
        whole = range(_ceil(begin, DAY_S), _floor(end, DAY_S))
        made.days = {day: number for day, number in windows.days.items() if number is not None and day in whole}
    for hour, number in sorted(windows.hours.items()):
        if not first <= hour < last or hour // DAY_S * DAY_S in made.days:
            continue
        if number is not None:
            made.hours[hour] = number
        elif made.rows[-1][1] == _at(hour):
            made.rows[-1] = (made.rows[-1][0], _at(hour + HOUR_S))
        else:
            made.rows.append((_at(hour), _at(hour + HOUR_S)))
    made.rows = [(one, other) for one, other in [*made.rows, (_at(last), end)] if one < other]
    return made if len(made.rows) <= MAX_RANGES else Cover(rows=[(begin, end)])


def _floor(at: datetime, length_s: int) -> int:
    return int(at.timestamp() // length_s) * length_s


def _ceil(at: datetime, length_s: int) -> int:
    return -int(-at.timestamp() // length_s) * length_s


def _at(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def windows_sql(query: UsageQuery) -> tuple[str, dict[str, object]] | None:
    """What gives the windows of a question's range, and its parameters; None where none of them could be used."""
    if not query.rolled or query.bucket is Bucket.MINUTE or _ceil(query.begin, HOUR_S) >= _floor(query.end, HOUR_S):
        return None
    values: dict[str, object] = {"b": _text(_at(_floor(query.begin, DAY_S))), "e": _text(query.end)}
    return (
        "SELECT toString(grain), toUnixTimestamp(window), computation, toBool(clean) FROM usage_windows "
        "WHERE window >= {b:DateTime64(3, 'UTC')} AND window < {e:DateTime64(3, 'UTC')}",
        values,
    )


def build(query: UsageQuery, windows: Windows) -> tuple[str, dict[str, object]]:
    """The SQL of a question and the values of its parameters (`{name:Type}`).

    It asks for a row more than `query.limit`, which tells whether there are more.
    """
    values: dict[str, object] = {"limit": query.limit + 1}
    labels = list(dict.fromkeys([*(DIMENSIONS[name] for name in query.by), "currency"]))
    filters = []
    for number, (name, wanted) in enumerate(query.where.items()):
        values[f"f{number}"] = list(wanted)
        filters.append(f"{DIMENSIONS[name]} IN {{f{number}:Array(String)}}")
    if query.rolled:
        parts = cover(query.begin, query.end, finest=query.bucket, windows=windows)
    else:
        parts = Cover(rows=[(query.begin, query.end)])
    selects = [
        _select(time, labels, _SUMMED, f"usage_{time}s_raw", [_of_windows(time, summed), *filters])
        for time, summed in (("day", parts.days), ("hour", parts.hours))
        if summed
    ]
    if parts.rows or not selects:
        ranges = []
        for number, (begin, end) in enumerate(parts.rows or [(query.begin, query.begin)]):
            values[f"b{number}"], values[f"e{number}"] = _text(begin), _text(end)
            bounds = f"{{b{number}:DateTime64(3, 'UTC')}}", f"{{e{number}:DateTime64(3, 'UTC')}}"
            ranges.append(f"accepted_at >= {bounds[0]} AND accepted_at < {bounds[1]}")
        where = [f"({' OR '.join(ranges)})", *filters]
        sums = [_of_row(name) for name in _SUMMED]
        selects.append(_select("toStartOfMinute(accepted_at)", labels, sums, "usage", where))
    start = _START.get(query.bucket)
    named = [f"{DIMENSIONS[name]} AS `{name}`" if name != DIMENSIONS[name] else name for name in query.by]
    shown = [*([f"{start} AS start"] if start else []), *named, "currency", *map(_measure, MEASURES)]
    groups = [*(["start"] if start else []), *labels]
    order = ["start"] if start else []
    page = ""
    if query.after is not None:
        page = f"HAVING {_behind(query, values, query.after)} "
    sql = (
        f"SELECT {', '.join(shown)} FROM ({' UNION ALL '.join(selects)}) AS part "
        f"GROUP BY {', '.join(groups)} {page}"
        f"ORDER BY {', '.join([*order, 'cost DESC', 'requests DESC', *labels])} LIMIT {{limit:UInt32}}"
    )
    return sql, values


def _behind(query: UsageQuery, values: dict[str, object], after: Place) -> str:
    """What is true of the rows that come after a place, whose values become parameters."""
    values |= {"cost": f"{after.cost:f}", "requests": after.requests}
    labels = [*(DIMENSIONS[name] for name in query.by), "currency"]
    values |= {f"l{number}": label for number, label in enumerate(after.labels)}
    places = ", ".join(f"{{l{number}:String}}" for number in range(len(labels)))
    cost, requests = "{cost:Decimal(38, 18)}", "{requests:UInt64}"
    behind = (
        f"(cost < {cost} OR cost = {cost} AND (requests < {requests} OR requests = {requests} "
        f"AND ({', '.join(labels)}) > ({places})))"
    )
    if query.bucket is Bucket.NONE:
        return behind
    values["start"] = after.start
    # As a number: the engine would take a time that is compared for a filter on rows, and miss it in groups.
    start, there = "toUnixTimestamp(start)", "{start:UInt32}"
    return f"({start} > {there} OR {start} = {there} AND {behind})"


def _measure(name: str) -> str:
    """A sum, or of durations the mean over the requests that have one."""
    if name in _MEANS:
        return f"round(sum(part.{name}) / greatest(sum(part.{_MEANS[name]}), 1), 1) AS {name}"
    return f"sum(part.{name}) AS {name}"


def _select(at: str, labels: Sequence[str], sums: Sequence[str], source: str, where: Sequence[str]) -> str:
    return f"SELECT {at} AS at, {', '.join(labels)}, {', '.join(sums)} FROM {source} WHERE {' AND '.join(where)}"


def _of_windows(time: str, summed: Mapping[int, int]) -> str:
    """Rows of these sums: numbers of ours, so many that they stand in the text."""
    starts = sorted(summed)
    numbers = ",".join(str(summed[start]) for start in starts)
    return (
        f"{time} >= toDateTime({starts[0]}, 'UTC') AND {time} <= toDateTime({starts[-1]}, 'UTC') AND computation = "
        f"transform(toUInt32({time}), [{','.join(map(str, starts))}], [{numbers}], 0)"
    )


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
