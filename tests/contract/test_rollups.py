"""Usage added up on the real engine: whatever is doubled, late or priced anew, it is what a recount in Python gives."""

# ruff: noqa: S608  (names of views stand in the statements)
from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec
import pytest
from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse import usage_pages
from clickhouse.client import connect
from clickhouse.migrate import migrate
from clickhouse.projection import Projection
from clickhouse.rollups import Rollups
from clickhouse.usage_query import Bucket, UsageQuery
from headrace.analytics import Analytics
from headrace.settings import Settings
from schemas.events import PricedBefore, Status, UsageEvent
from tests.support.tables import Record, answer, items, usage_event

_databases = itertools.count(1)
BEGAN = datetime(2026, 9, 29, 21, 0, tzinfo=UTC)
LATER = BEGAN + timedelta(days=4)


@pytest.fixture
async def own(server: Settings) -> AsyncIterator[tuple[Settings, AsyncClient]]:
    """A database of the test's own, and a client."""
    conf = server.model_copy(update={"clickhouse_database": f"rollups_{next(_databases)}"})
    migrate(conf)
    client = await connect(conf)
    yield conf, client
    await client.command(f"DROP DATABASE {conf.clickhouse_database}")
    await client.close()


def history(seed: random.Random, count: int) -> list[Record]:
    """Usage of three days around the end of a month, and some of it priced anew."""
    records: list[Record] = []
    for number in range(count):
        accepted = int(BEGAN.timestamp() * 1000) + int(seed.betavariate(1, 3) * 60 * 3_600_000)
        event = usage_event(
            number, tenant=seed.choice("abc"), key_id=seed.choice(("k1", "k2")), model=seed.choice(("m1", "m2")),
            status=seed.choice((Status.COMPLETED, Status.COMPLETED, Status.FAILED)),
            currency=seed.choice(("USD", "EUR")),
            prompt_tokens=seed.randrange(1000), completion_tokens=seed.randrange(500), estimated=seed.random() < 0.1,
            cost=Decimal(seed.randrange(10**15)).scaleb(-18), accepted_ms=accepted,
            finished_ms=accepted + seed.randrange(5000), ttft_ms=seed.choice((0, seed.randrange(900))),
            queue_ms=seed.randrange(400), generation_ms=seed.randrange(4000), audio_seconds=Decimal("0.125"), images=1,
        )  # fmt: skip
        records.append(Record("usage.events", len(records), msgspec.json.encode(event)))
        while seed.random() < 0.2:
            before = PricedBefore(event.revision, event.price_version, event.currency, event.cost)
            event = msgspec.structs.replace(
                event, revision=event.revision + 1, cost=event.cost * 3, price_version=event.price_version + 1,
                currency=seed.choice(("USD", "EUR")), repriced_of=[*event.repriced_of, before],
            )  # fmt: skip
            records.append(Record("usage.events", len(records), msgspec.json.encode(event)))
    return records


def counted(records: Sequence[Record]) -> list[UsageEvent]:
    """The events that count: of each id the highest revision, of that the lowest offset."""
    best: dict[str, tuple[int, int, UsageEvent]] = {}
    for record in records:
        event = msgspec.json.decode(record.value, type=UsageEvent)
        rank = (-event.revision, record.offset)
        if event.usage_id not in best or rank < best[event.usage_id][:2]:
            best[event.usage_id] = (*rank, event)
    return [event for _, _, event in best.values()]


def added_up(events: Sequence[UsageEvent], key: Callable[[UsageEvent], tuple[object, ...]]) -> list[tuple[object, ...]]:
    groups: dict[tuple[object, ...], list[UsageEvent]] = defaultdict(list)
    for event in events:
        groups[key(event)].append(event)
    return sorted(
        (
            *label, len(group), sum(e.prompt_tokens for e in group), sum(e.completion_tokens for e in group),
            sum((e.cost for e in group), Decimal(0)), sum(e.finished_ms - e.accepted_ms for e in group),
            sum(e.ttft_ms > 0 for e in group), sum(e.estimated for e in group), max(e.queue_ms for e in group),
            sum((e.audio_seconds for e in group), Decimal(0)), sum(e.images for e in group),
        )
        for label, group in groups.items()
    )  # fmt: skip


SUMS = (
    "sum(requests), sum(prompt_tokens), sum(completion_tokens), sum(cost), sum(total_ms), sum(answered), "
    "sum(estimated_requests), max(longest_queue_ms), sum(audio_seconds), sum(images)"
)


def start(ms: int, length_s: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000 // length_s * length_s, UTC).replace(tzinfo=None)


def is_recounted(conf: Settings, records: Sequence[Record]) -> None:
    """Compare every rollup with a recount of what was delivered."""
    events = counted(records)
    for view, time, length_s in (("usage_by_minute", "minute", 60), ("usage_by_hour", "hour", 3600)):
        labels = "tenant, model, status, currency"
        rows = answer(conf, f"SELECT toString({time}), {labels}, {SUMS} FROM {view} GROUP BY ALL")

        def key(event: UsageEvent, length_s: int = length_s) -> tuple[object, ...]:
            at = str(start(event.accepted_ms, length_s))
            return at, event.tenant, event.model, event.status.value, event.currency

        assert sorted(rows) == added_up(events, key), view
    rows = answer(conf, f"SELECT toString(toDate(day)), tenant, key_id, {SUMS} FROM usage_by_day GROUP BY ALL")
    assert sorted(rows) == added_up(events, lambda e: (str(start(e.accepted_ms, 86400).date()), e.tenant, e.key_id))
    shown = answer(
        conf,
        "SELECT toString(hour), model, requests, ttft_p50_ms, ttft_p95_ms, ttft_p99_ms, queue_p95_ms, total_p99_ms "
        "FROM latency_by_model_hourly",
    )
    groups: dict[tuple[str, str], list[UsageEvent]] = defaultdict(list)
    for event in events:
        if event.status is Status.COMPLETED:
            groups[str(start(event.accepted_ms, 3600)), event.model].append(event)
    assert sorted(shown) == sorted(
        (
            *key, len(group), *(level(group, "ttft", at) for at in (0.5, 0.95, 0.99)),
            level(group, "queue", 0.95), level(group, "total", 0.99),
        )
        for key, group in groups.items()
    )  # fmt: skip


def level(group: Sequence[UsageEvent], what: str, at: float) -> int:
    """A quantile as ClickHouse's quantileExact takes it: the value at `at` of the way, of the sorted ones."""
    values = sorted(
        {"ttft": e.ttft_ms, "queue": e.queue_ms, "total": e.finished_ms - e.accepted_ms}[what] for e in group
    )
    return values[int(at * len(values))]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_rollups_are_what_a_recount_gives(own: tuple[Settings, AsyncClient], seed: int) -> None:
    """Delivered in any order, doubled and late, with the adding up at any moment between, at once, or half done."""
    conf, client = own
    rng = random.Random(seed)
    records = history(rng, 200)
    arriving = [*records, *rng.sample(records, 100)]
    rng.shuffle(arriving)
    arriving = [*records[:100], *arriving]
    projection, rollups = Projection(client, conf.clickhouse_database), Rollups(client, conf.clickhouse_database)
    delivered: list[Record] = []
    now = BEGAN
    while arriving:
        size = rng.randrange(1, 120)
        batch, arriving = arriving[:size], arriving[size:]
        await projection.write(items(batch))
        delivered += batch
        now += timedelta(hours=rng.randrange(0, 20))
        if rng.random() < 0.7:
            await rollups.run(max(now, datetime.now(UTC) + timedelta(minutes=1)))
        if rng.random() < 0.3:  # somebody dies between the sums and the record of them
            await client.command(
                f"INSERT INTO {conf.clickhouse_database}.usage_hours_raw SELECT *, 7 "
                f"FROM {conf.clickhouse_database}.usage_hours_live"
            )
        is_recounted(conf, delivered)
    await rollups.run(datetime.now(UTC) + timedelta(minutes=1))
    assert answer(conf, "SELECT count() > 0, countIf(NOT clean) FROM usage_windows") == [(1, 0)]
    is_recounted(conf, records)
    await client.command(f"TRUNCATE TABLE {conf.clickhouse_database}.usage_lines_raw")
    is_recounted(conf, records)


async def test_one_who_comes_late_with_old_sums_does_not_count(own: tuple[Settings, AsyncClient]) -> None:
    """A member reads, stops for long, and records what it had read after another has read more."""
    conf, client = own
    records = history(random.Random(9), 40)
    projection = Projection(client, conf.clickhouse_database)
    slow, quick = Rollups(client, conf.clickhouse_database), Rollups(client, conf.clickhouse_database)
    await projection.write(items(records[:20]))
    soon = datetime.now(UTC) + timedelta(minutes=1)
    before = await slow._windows("hour")
    await projection.write(items(records[20:]))
    await quick.run(soon)
    await slow._add_up("hour", before, soon + timedelta(minutes=5))
    is_recounted(conf, records)


async def test_what_no_longer_counts_is_deleted(own: tuple[Settings, AsyncClient]) -> None:
    conf, client = own
    rollups, projection = Rollups(client, conf.clickhouse_database), Projection(client, conf.clickhouse_database)
    records = history(random.Random(4), 40)
    now = datetime.now(UTC) + timedelta(minutes=1)
    for step in range(3):
        await projection.write(items(records))
        await rollups.run(now + timedelta(minutes=20 * step))
    await projection.write(items(records[:1]))
    await rollups.run(now + timedelta(hours=2))
    [(computations, windows)] = answer(conf, "SELECT count(), uniqExact(grain, window) FROM usage_rolled")
    assert isinstance(computations, int) and isinstance(windows, int)
    assert computations == windows + 2 * 3, "one a window, and of the hour and day just added up the three before"
    is_recounted(conf, records)


COLUMN = {"tenant": "tenant", "app": "tenant", "key": "key_id", "model": "model", "status": "status"}


async def test_questions_over_any_range_are_answered_as_python_counts(own: tuple[Settings, AsyncClient]) -> None:
    """Ranges that begin and end anywhere, half of the windows added up, some rows late."""
    conf, client = own
    rng = random.Random(5)
    records = history(rng, 250)
    projection = Projection(client, conf.clickhouse_database)
    await projection.write(items(records[:-30]))
    await Rollups(client, conf.clickhouse_database).run(datetime.now(UTC) + timedelta(minutes=1))
    await projection.write(items(records[-60:]))
    events = counted(records)
    analytics = Analytics(conf)
    for _ in range(12):
        edges = sorted(BEGAN + timedelta(seconds=rng.uniform(-5_000, 230_000)) for _ in range(2))
        bucket = rng.choice((Bucket.NONE, Bucket.HOUR, Bucket.DAY, Bucket.MONTH))
        by = tuple(rng.sample(sorted({"app", "key", "model", "status"}), rng.randrange(3)))
        where = rng.choice(({}, {"tenant": ("a", "b")}, {"model": ("m1",), "key": ("k2",)}))
        query = UsageQuery(edges[0], edges[1], bucket, by, where, 5000)
        chosen = [
            event
            for event in events
            if _ms(edges[0]) <= event.accepted_ms < _ms(edges[1])
            and all(getattr(event, COLUMN[name]) in values for name, values in where.items())
        ]
        groups: dict[tuple[object, ...], list[UsageEvent]] = defaultdict(list)
        for event in chosen:
            labels = tuple(str(getattr(event, COLUMN[name])) for name in by)
            groups[*_step(event.accepted_ms, bucket), *labels, event.currency].append(event)
        answer = await analytics.usage(query)
        shown = {
            tuple(row[: len(answer.columns) - 14]): (row[-14], Decimal(str(row[-6])), row[-1]) for row in answer.rows
        }
        assert shown == {
            key: (
                len(group),
                sum((event.cost for event in group), Decimal(0)),
                pytest.approx(sum(event.finished_ms - event.accepted_ms for event in group) / len(group), abs=0.051),
            )
            for key, group in groups.items()
        }
        if len(groups) > 1:
            for limit, more in ((len(groups) - 1, True), (len(groups), False)):
                cut = await analytics.usage(replace(query, limit=limit))
                assert (list(cut.rows), cut.has_more) == (list(answer.rows[:limit]), more)
    await analytics.stop()


@pytest.mark.parametrize("bucket", [Bucket.NONE, Bucket.HOUR, Bucket.DAY, Bucket.MONTH])
async def test_pages_give_each_row_once_in_the_order_of_the_whole_answer(
    own: tuple[Settings, AsyncClient], bucket: Bucket
) -> None:
    """Also where many rows cost the same, of as many requests, in two currencies, with names that need quoting."""
    conf, client = own
    records = history(random.Random(6), 80)
    for number, name in enumerate(("a'); --", "a\\", "ü", "", "z") * 4):
        event = usage_event(
            900 + number, tenant=name, model=f"m{number % 2}", currency=("USD", "EUR")[number // 10],
            cost=Decimal(0), accepted_ms=_ms(BEGAN),
        )  # fmt: skip
        records.append(Record("usage.events", len(records), msgspec.json.encode(event)))
    await Projection(client, conf.clickhouse_database).write(items(records))
    analytics = Analytics(conf)
    by = ("app", "model")
    whole = await analytics.usage(UsageQuery(BEGAN, LATER, bucket, by))
    assert len(whole.rows) > 15 and not whole.has_more
    pages, after = [], None
    while True:
        query = usage_pages.asked(
            *((BEGAN, LATER) if after is None else (None, None)), bucket, by=by, where={}, limit=2, after=after,
            now=LATER,
        )  # fmt: skip
        page = await analytics.usage(query)
        pages += page.rows
        assert len(pages) <= len(whole.rows), "no row comes twice"
        if not page.has_more:
            break
        after = page.last_id
    assert pages == list(whole.rows)
    await analytics.stop()


def _ms(at: datetime) -> int:
    """As a question says a time: whole milliseconds."""
    return int(at.replace(microsecond=at.microsecond // 1000 * 1000).timestamp() * 1000 + 0.5)


def _step(ms: int, bucket: Bucket) -> tuple[str, ...]:
    at = datetime.fromtimestamp(ms / 1000, UTC)
    form = {Bucket.HOUR: "%Y-%m-%dT%H:00:00Z", Bucket.DAY: "%Y-%m-%dT00:00:00Z", Bucket.MONTH: "%Y-%m-01T00:00:00Z"}
    return () if bucket is Bucket.NONE else (at.strftime(form[bucket]),)
