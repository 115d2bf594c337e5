"""Questions about usage: ranges are covered once, and nothing of a caller's stands in the SQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clickhouse.usage_query import (
    DAY_S,
    DIMENSIONS,
    HOUR_S,
    MAX_RANGES,
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
