"""Questions about usage: ranges are covered once, and nothing of a caller's stands in the SQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clickhouse.usage_query import DIMENSIONS, BadUsageQuery, Bucket, UsageQuery, build, cover

BEGAN = datetime(2026, 9, 29, tzinfo=UTC)
MOMENTS = st.integers(0, 400 * 86_400_000).map(lambda ms: BEGAN + timedelta(milliseconds=ms))


@given(one=MOMENTS, other=MOMENTS, bucket=st.sampled_from(Bucket))
def test_pieces_cover_a_range_once_and_none_is_longer_than_a_step(
    one: datetime, other: datetime, bucket: Bucket
) -> None:
    begin, end = sorted((one, other))
    pieces = list(cover(begin, end, finest=bucket))
    if begin == end:
        assert not pieces
        return
    assert (pieces[0].begin, pieces[-1].end) == (begin, end)
    assert all(before.end == after.begin for before, after in pairwise(pieces))
    for piece in pieces:
        length = {"day": 86_400, "hour": 3_600, "row": 0.001}[piece.grain]
        assert piece.begin < piece.end
        assert piece.begin.timestamp() % length < 1e-6 or piece.grain == "row"
        assert piece.end.timestamp() % length < 1e-6 or piece.grain == "row"
        if bucket is Bucket.HOUR:
            assert piece.grain != "day"
        if bucket is Bucket.MINUTE:
            assert piece.grain == "row"
    rows = sum(((piece.end - piece.begin) for piece in pieces if piece.grain == "row"), timedelta())
    if bucket is not Bucket.MINUTE:
        assert rows < timedelta(hours=2), "the rows themselves are read at the edges only"


HOSTILE = st.text(st.characters(codec="utf-8"), min_size=1) | st.sampled_from(["'; DROP TABLE usage --", "{b0:String}"])


@given(value=HOSTILE, name=st.sampled_from(sorted(DIMENSIONS)))
def test_what_a_caller_says_is_a_bound_value(value: str, name: str) -> None:
    end = BEGAN + timedelta(days=40, minutes=3)
    marked = f"\u2603{value}"
    sql, values = build(UsageQuery(BEGAN, end, Bucket.DAY, (name,), {name: (marked,)}))
    assert "\u2603" not in sql
    assert [marked] in values.values()
    assert sql == build(UsageQuery(BEGAN, end, Bucket.DAY, (name,), {name: ("x",)}))[0]


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
    ],
)
def test_what_cannot_be_asked_is_told(changes: dict[str, object], message: str) -> None:
    asked: dict[str, object] = {"begin": BEGAN, "end": BEGAN + timedelta(days=30)} | changes
    with pytest.raises(BadUsageQuery, match=message):
        UsageQuery(**asked)  # type: ignore[arg-type]
