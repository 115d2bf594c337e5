"""Questions about usage: ranges are covered once, and nothing of a caller's stands in the SQL."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clickhouse import usage_pages
from clickhouse.usage_query import (
    DAY_S,
    DIMENSIONS,
    HOUR_S,
    MAX_RANGES,
    MEASURES,
    BadUsageQuery,
    Bucket,
    Cover,
    UsageQuery,
    Windows,
    build,
    cover,
)

BEGAN = datetime(2026, 9, 29, tzinfo=UTC)
MOMENTS = st.integers(0, 400 * 86_400_000).map(lambda ms: BEGAN + timedelta(milliseconds=ms))

KNOWN = st.lists(st.tuples(st.integers(0, 400 * 24 - 1), st.booleans(), st.booleans()), max_size=60)
"""(hour, whether its sums are right, whether those of its day are) of the hours in which there is usage."""


@given(one=MOMENTS, other=MOMENTS, bucket=st.sampled_from(Bucket), known=KNOWN)
def test_a_cover_holds_all_usage_once_in_no_longer_steps_and_only_in_sums_that_are_right(
    one: datetime, other: datetime, bucket: Bucket, known: list[tuple[int, bool, bool]]
) -> None:
    begin, end = sorted((one, other))
    assume(begin < end)
    origin = int(BEGAN.timestamp())
    windows = Windows()
    for hour, clean, day_clean in known:
        start = origin + hour * HOUR_S
        windows.hours[start] = 7 if clean else None
        windows.days[start // DAY_S * DAY_S] = 9 if day_clean else None
    made = cover(begin, end, finest=bucket, windows=windows)
    for start in windows.hours:
        for at in (start, start + HOUR_S - 0.001, begin.timestamp(), end.timestamp() - 0.001):
            if not (start <= at < start + HOUR_S and begin.timestamp() <= at < end.timestamp()):
                continue
            holding = (
                [day for day in made.days if day <= at < day + DAY_S]
                + [hour for hour in made.hours if hour <= at < hour + HOUR_S]
                + [first for first, last in made.rows if first.timestamp() <= at < last.timestamp()]
            )
            assert len(holding) == 1, "each moment with usage is read once"
    for sums, held, length in ((made.days, windows.days, DAY_S), (made.hours, windows.hours, HOUR_S)):
        for start, number in sums.items():
            assert held[start] == number, "sums that are not right are not used"
            assert begin.timestamp() <= start and start + length <= end.timestamp(), "and none that reaches beyond"
    assert all(begin <= first < last <= end for first, last in made.rows)
    assert len(made.rows) <= MAX_RANGES
    assert not made.days or bucket not in (Bucket.HOUR, Bucket.MINUTE)
    assert not made.hours or bucket is not Bucket.MINUTE


def test_where_sums_lie_in_too_many_pieces_all_is_read_as_rows() -> None:
    origin = int(BEGAN.timestamp())
    windows = Windows(hours={origin + 2 * n * HOUR_S: None for n in range(MAX_RANGES + 1)})
    end = BEGAN + timedelta(days=30)
    assert cover(BEGAN, end, finest=Bucket.DAY, windows=windows) == Cover(rows=[(BEGAN, end)])
    del windows.hours[origin]
    assert len(cover(BEGAN, end, finest=Bucket.DAY, windows=windows).rows) == MAX_RANGES


HOSTILE = st.text(st.characters(codec="utf-8"), min_size=1) | st.sampled_from(["'; DROP TABLE usage --", "{b0:String}"])


@given(value=HOSTILE, name=st.sampled_from(sorted(DIMENSIONS)))
def test_what_a_caller_says_is_a_bound_value(value: str, name: str) -> None:
    end = BEGAN + timedelta(days=40, minutes=3)
    marked = f"\u2603{value}"
    windows = Windows(days={int(BEGAN.timestamp()): 3}, hours={int(BEGAN.timestamp()) + 40 * DAY_S: 4})
    sql, values = build(UsageQuery(BEGAN, end, Bucket.DAY, (name,), {name: (marked,)}), windows)
    assert "\u2603" not in sql
    assert [marked] in values.values()
    assert sql == build(UsageQuery(BEGAN, end, Bucket.DAY, (name,), {name: ("x",)}), windows)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": ("tenant; DROP",)}, "no dimension"),
        ({"by": ("tenant", "app")}, "named twice"),
        ({"where": {"cost": ("1",)}}, "no dimension"),
        ({"where": {"tenant": ()}}, "1 to 100 values"),
        ({"end": BEGAN}, "before"),
        ({"begin": BEGAN.replace(tzinfo=None)}, "offset"),
        ({"limit": 0}, "limit"),
        ({"bucket": Bucket.MINUTE}, "5000 steps"),
        ({"begin": datetime(963, 4, 20, tzinfo=UTC)}, "1970 to 2105"),
        ({"end": datetime(2106, 2, 8, tzinfo=UTC)}, "1970 to 2105"),
    ],
)
def test_what_cannot_be_asked_is_told(changes: dict[str, object], message: str) -> None:
    asked: dict[str, object] = {"begin": BEGAN, "end": BEGAN + timedelta(days=30)} | changes
    with pytest.raises(BadUsageQuery, match=message):
        UsageQuery(**asked)  # type: ignore[arg-type]


END = BEGAN + timedelta(days=30)


def question(after: str | None = None, **changes: Any) -> UsageQuery:
    said: dict[str, Any] = {"by": ("tenant", "model"), "where": {"key": ("k1", "k2")}, "limit": 2, **changes}
    begin, end = said.pop("begin", None if after else BEGAN), said.pop("end", None if after else END)
    return usage_pages.asked(begin, end, said.pop("bucket", Bucket.DAY), after=after, now=END, **said)


def row(tenant: str) -> list[object]:
    """As ClickHouse's client gives it."""
    return [BEGAN.replace(tzinfo=None), tenant, "m", "USD", *(Decimal("0.5") if n == "cost" else 7 for n in MEASURES)]


@given(tenant=HOSTILE)
def test_the_next_page_is_of_the_same_range_and_what_it_begins_after_are_bound_values(tenant: str) -> None:
    after = usage_pages.last_id(question(), row(f"\u2603{tenant}"))
    next_one = question(after)
    assert (next_one.begin, next_one.end) == (BEGAN, END)
    assert question(after, begin=BEGAN, end=END, limit=500).after == next_one.after
    sql, values = build(next_one, Windows())
    assert "\u2603" not in sql and f"\u2603{tenant}" in values.values()
    assert sql == build(question(usage_pages.last_id(question(), row("x"))), Windows())[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"by": ("model", "tenant")},
        {"by": ("tenant", "model", "status")},
        {"where": {"key": ("k1",)}},
        {"where": {}},
        {"bucket": Bucket.NONE},
        {"begin": BEGAN - timedelta(days=1)},
        {"end": END + timedelta(seconds=1)},
    ],
)
def test_a_page_of_another_question_is_refused(changes: dict[str, object]) -> None:
    after = usage_pages.last_id(question(), row("a"))
    with pytest.raises(BadUsageQuery, match="of the same question"):
        question(after, **changes)


def forged(**changes: object) -> str:
    text = usage_pages.last_id(question(), row("a"))
    names = ("digest", "begin", "end", "start", "cost", "requests", "labels")
    kept = dict(zip(names, json.loads(base64.urlsafe_b64decode(text + "==")), strict=True)) | changes
    return base64.urlsafe_b64encode(json.dumps(list(kept.values())).encode()).decode()


@pytest.mark.parametrize(
    "after",
    [
        "", "x", "é", "%%%", "bnVsbA", "W10", forged(begin="2026-09-29T00:00:00"), forged(requests=-1),
        forged(requests=2**64), forged(start=-1), forged(start=2**32), forged(labels=["a"]), forged(cost="NaN"),
        forged(cost="1E500"), forged(cost="-Infinity"), forged(cost="0." + "1" * 19), forged(cost="1" + "0" * 21),
    ],
)  # fmt: skip
def test_what_no_page_ended_with_is_refused(after: str) -> None:
    with pytest.raises(BadUsageQuery, match="`after`"):
        question(after)


@given(end=st.datetimes(timezones=st.just(UTC)) | st.just(datetime.min.replace(tzinfo=UTC)))
def test_any_end_makes_a_question_or_is_refused_with_a_sentence(end: datetime) -> None:
    try:
        assert question(begin=None, end=end).begin == end - timedelta(days=30)
    except BadUsageQuery as refused:
        assert "1970 to 2105" in str(refused) and not datetime(1970, 2, 1, tzinfo=UTC) < end < datetime(
            2106, 1, 1, tzinfo=UTC
        )


@given(after=st.text())
def test_whatever_stands_for_the_page_before_is_refused_with_a_sentence(after: str) -> None:
    with pytest.raises(BadUsageQuery, match="`after`"):
        question(after)
