"""Pages of usage: where one ends is told as an opaque text, after which the next one begins. Pure."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from clickhouse.usage_query import OTHER_YEARS, BadUsageQuery, Bucket, Place, UsageQuery

SPAN = timedelta(days=30)
"""Of a question that names no begin."""
_UNREADABLE = "`after` must be the `last_id` of the page before"


class _Kept(msgspec.Struct, array_like=True):
    """What the text holds."""

    digest: str
    begin: datetime
    end: datetime
    start: int
    cost: Decimal
    requests: int
    labels: tuple[str, ...]


_json = msgspec.json.Encoder()
_kept = msgspec.json.Decoder(_Kept)


def asked(
    begin: datetime | None,
    end: datetime | None,
    bucket: Bucket,
    *,
    by: tuple[str, ...],
    where: Mapping[str, tuple[str, ...]],
    limit: int,
    after: str | None,
    now: datetime,
) -> UsageQuery:
    """The question of a caller, who may leave the range out, for the page after the one that ended at `after`.

    A further page is one of the same question and range: what is left out is as it was. Raises `BadUsageQuery`.
    """
    if after is None:
        until = end or now
        try:
            return UsageQuery(begin or until - SPAN, until, bucket, by, where, limit)
        except OverflowError:
            raise BadUsageQuery(OTHER_YEARS) from None
    kept = _read(after)
    query = UsageQuery(begin or kept.begin, end or kept.end, bucket, by, where, limit)
    if (query.begin, query.end, _digest(query)) != (kept.begin, kept.end, kept.digest):
        raise BadUsageQuery(f"{_UNREADABLE}, of the same question: range, bucket, `by` and `where` must be the same")
    return replace(query, after=Place(kept.start, kept.cost, kept.requests, kept.labels))


def last_id(query: UsageQuery, row: Sequence[Any]) -> str:
    """What the next page of a question begins after, given the last row of this one as ClickHouse gave it."""
    told = dict(zip(query.columns, row, strict=True))
    start = 0
    if "start" in told:
        at: datetime = told["start"]
        start = int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())
    labels = tuple(str(told[name]) for name in (*query.by, "currency"))
    kept = _Kept(_digest(query), query.begin, query.end, start, told["cost"], told["requests"], labels)
    return base64.urlsafe_b64encode(_json.encode(kept)).decode().rstrip("=")


def _read(text: str) -> _Kept:
    try:
        kept = _kept.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, msgspec.MsgspecError):  # The first of what is no base64, and no ASCII.
        raise BadUsageQuery(_UNREADABLE) from None
    if kept.begin.tzinfo is None or kept.end.tzinfo is None:
        raise BadUsageQuery(_UNREADABLE)
    return kept


def _digest(query: UsageQuery) -> str:
    """What tells questions apart, but for their ranges."""
    where = sorted((name, sorted(values)) for name, values in query.where.items())
    return hashlib.sha256(_json.encode([query.bucket, query.by, where])).hexdigest()[:12]
