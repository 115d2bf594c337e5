"""Leases on the real engine: the view against steps added up in Python, and what models earn for what they hold."""

# ruff: noqa: S608  (ids that the tests make stand in the statements)
from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import msgspec
import pytest
from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse.projection import Projection
from clickhouse.rows import Unreadable, read
from headrace import sql
from headrace.settings import Settings
from schemas.events import LeaseEvent, UsageEvent
from tests.support.tables import Record, answer, items, usage_event

GIB = 2**30
_offsets = itertools.count(1)
_usages = itertools.count(50_000)


@dataclass
class Life:
    """One lease: its steps as (ms after its grant, state, bytes, reason)."""

    model: str
    worker: str
    began_ms: int
    steps: list[tuple[int, str, int, str]]
    device: str = "d0"

    def records(self) -> Iterator[Record]:
        """Its records as the scheduler writes them."""
        epoch = next(_offsets)
        for after_ms, state, size, reason in self.steps:
            first = state == "granted"
            event = LeaseEvent(
                f"{self.worker}:{self.model}", "p", 1, self.worker, self.model, state, self.began_ms + after_ms,
                epoch=-1 if first else epoch, boot="b", bytes=size, reason=reason, device=self.device,
            )  # fmt: skip
            yield Record("vram.leases", epoch if first else next(_offsets), msgspec.json.encode(event))

    def spans(self, until_ms: int) -> Iterator[tuple[int, int, int]]:
        """(from, to, bytes) of each state that holds memory."""
        ends = [after for after, *_ in self.steps[1:]] + [until_ms - self.began_ms]
        for (after, state, size, _), end in zip(self.steps, ends, strict=True):
            if state in ("free", "lost"):
                return
            yield self.began_ms + after, self.began_ms + end, size


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def names() -> str:
    """A prefix for names of models, so that tests do not see each other's."""
    return f"m{next(_usages)}-"


async def write(client: AsyncClient, conf: Settings, records: list[Record], seed: random.Random) -> None:
    """Deliver the records more than once, in batches that differ."""
    projection = Projection(client, conf.clickhouse_database)
    for _ in range(3):
        at = seed.randrange(1, len(records) + 1)
        await projection.write(items(records[:at]))
        await projection.write(items(records[at // 2 :]))


async def test_a_lease_is_one_row_with_what_it_held(client: AsyncClient, migrated: Settings, names: str) -> None:
    began = now_ms() - 3_600_000
    ended = Life(
        f"{names}a", "w1", began,
        [(0, "granted", 2 * GIB, ""), (10, "loading", 2 * GIB, ""), (2_010, "active", 3 * GIB, ""),
         (62_010, "draining", 3 * GIB, "makes room for b"), (63_010, "releasing", 3 * GIB, ""),
         (64_010, "free", 3 * GIB, ""), (70_000, "free", 0, "")],
    )  # fmt: skip
    lost = Life(f"{names}a", "w2", began, [(0, "granted", GIB, ""), (500, "lost", GIB, "the worker's process is gone")])
    back = Life(
        f"{names}a", "w3", began,
        [(0, "granted", GIB, ""), (500, "lost", GIB, "gone"), (2_500, "active", GIB, ""), (3_000, "lost", GIB, "gone")],
    )  # fmt: skip
    again = Life(f"{names}a", "w1", began + 100_000, [(0, "granted", GIB, ""), (1_000, "active", GIB, "")], device="")
    await write(client, migrated, [r for life in (ended, lost, back, again) for r in life.records()], random.Random(1))
    rows = answer(
        migrated,
        "SELECT worker, device, state, toUnixTimestamp64Milli(granted_at), toUnixTimestamp64Milli(active_at), "
        "toUnixTimestamp64Milli(released_at), if(released_at IS NULL, 0, seconds), bytes, "
        f"if(released_at IS NULL, 0, byte_seconds), reason FROM leases WHERE model = '{names}a' ORDER BY epoch",
    )
    held = 2 * GIB * 2.01 + 3 * GIB * 62.0
    assert rows == [
        ("w1", "d0", "free", began, began + 2_010, began + 64_010, 64.01, 3 * GIB, pytest.approx(held),
         "makes room for b"),
        ("w2", "d0", "lost", began, None, began + 500, 0.5, GIB, GIB * 0.5, "the worker's process is gone"),
        ("w3", "d0", "lost", began, began + 2_500, began + 3_000, 1.0, GIB, GIB * 1.0, "gone"),
        ("w1", "", "active", began + 100_000, began + 101_000, None, 0, GIB, 0, ""),
    ]  # fmt: skip
    [(seconds,)] = answer(migrated, f"SELECT seconds FROM leases WHERE model = '{names}a' AND state = 'active'")
    assert seconds == pytest.approx(3_500, abs=30), "it is held to this day"


async def test_every_record_is_one_row_however_often_it_comes(
    client: AsyncClient, migrated: Settings, names: str
) -> None:
    life = Life(names, "w1", now_ms(), [(0, "granted", 1, ""), (5, "loading", 1, ""), (9, "active", 1, "")])
    await write(client, migrated, list(life.records()), random.Random(2))
    rows = answer(migrated, f"SELECT state, epoch = min(epoch) OVER () FROM lease_events WHERE model = '{names}'")
    assert sorted(rows) == [("active", 1), ("granted", 1), ("loading", 1)]


@pytest.mark.parametrize("changes", [{"epoch": -1}, {"bytes": -5}, {"at_ms": 12}, {"term": -1}])
def test_a_lease_event_that_can_be_no_row_is_told(changes: dict[str, int]) -> None:
    event = LeaseEvent("w:m", "p", 1, "w", "m", "active", now_ms(), epoch=3)
    with pytest.raises(Unreadable, match=next(iter(changes))):
        read(Record("vram.leases", 7, msgspec.json.encode(msgspec.structs.replace(event, **changes))))


# --- cost-by-model ------------------------------------------------------------------------------------------------


def union_ms(spans: list[tuple[int, int]]) -> int:
    """Milliseconds in which at least one of the spans lasts: each is laid on a line, and the line is measured."""
    edges = sorted([(begin, 1) for begin, end in spans] + [(end, -1) for begin, end in spans])
    total = depth = since = 0
    for at, change in edges:
        if depth > 0:
            total += at - since
        depth, since = depth + change, at
    return total


def generated(names: str, seed: random.Random, now: int) -> tuple[list[Life], list[UsageEvent]]:
    """Leases and usage of some models on two workers, some of it before the window of a day."""
    lives, usages = [], []
    for model, worker in itertools.product((f"{names}{n}" for n in range(3)), ("w1", "w2")):
        at = now - 30 * 3_600_000
        while at < now - 2 * 3_600_000:
            size, span = seed.randrange(GIB, 8 * GIB), seed.randrange(600_000, 4 * 3_600_000)
            lives.append(
                Life(model, worker, at, [(0, "granted", size // 2, ""), (3_000, "active", size, ""),
                                         (span, "draining", size, "x"), (span + 900, "free", size, "")])
            )  # fmt: skip
            for _ in range(seed.randrange(0, 12)):
                finished = at + seed.randrange(10_000, span)
                usages.append(
                    usage_event(
                        next(_usages), tenant=names, model=model, worker=worker,
                        currency=seed.choice(["USD", "EUR"]), cost=Decimal(seed.randrange(10**6)) / 10**6,
                        prompt_tokens=seed.randrange(5_000), completion_tokens=seed.randrange(900),
                        accepted_ms=finished - 9_000, finished_ms=finished, generation_ms=seed.randrange(0, 600_000),
                    )
                )  # fmt: skip
            at += span + seed.randrange(1_000, 3_600_000)
    lives.append(Life(f"{names}unused", "w1", now - 7_200_000, [(0, "granted", GIB, ""), (3_600_000, "free", GIB, "")]))
    usages.append(usage_event(next(_usages), tenant=names, model=f"{names}remote", accepted_ms=now - 60_000,
                              finished_ms=now - 50_000, cost=Decimal("0.5")))  # fmt: skip
    return lives, usages


async def test_cost_by_model_is_what_adding_up_gives(client: AsyncClient, migrated: Settings, names: str) -> None:
    seed, now = random.Random(7), now_ms()
    lives, usages = generated(names, seed, now)
    records = [record for life in lives for record in life.records()]
    records += [Record("usage.events", next(_offsets), msgspec.json.encode(usage)) for usage in usages]
    await write(client, migrated, records, seed)
    since = now - 86_400_000

    paid: dict[tuple[str, str], list[UsageEvent]] = defaultdict(list)
    for usage in usages:
        if usage.accepted_ms >= since:
            paid[usage.model, usage.currency].append(usage)
    seconds: dict[str, float] = defaultdict(float)
    gib_seconds: dict[str, float] = defaultdict(float)
    for life in lives:
        for begin, end, size in life.spans(now):
            within = max(0, end - max(begin, since)) / 1000
            seconds[life.model] += within
            gib_seconds[life.model] += within * size / GIB
    busy: dict[str, float] = defaultdict(float)
    for model, worker in {(usage.model, usage.worker) for usage in usages}:
        spans = [
            (max(since, usage.finished_ms - usage.generation_ms), usage.finished_ms)
            for usage in usages
            if (usage.model, usage.worker) == (model, worker) and usage.finished_ms > since
        ]
        busy[model] += union_ms(spans) / 1000

    text, bound = sql.statement("cost-by-model", {"days": "1"})
    found = sql.run(migrated, text, bound)
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    mine = {(str(row["model"]), str(row["currency"])): row for row in rows if str(row["model"]).startswith(names)}
    assert set(mine) == {*paid, (f"{names}unused", "")}
    assert len(paid) == 7, "three models in two currencies, and one without a lease"
    for (model, currency), row in mine.items():
        events = paid.get((model, currency), [])
        tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in events)
        cost = sum((usage.cost for usage in events), Decimal(0))
        assert (row["requests"], row["cost"]) == (len(events), cost)
        assert row["prompt_tokens"] == sum(usage.prompt_tokens for usage in events)
        # The window moves on while the rows are written.
        assert row["lease_seconds"] == pytest.approx(seconds[model], abs=30)
        assert row["gib_seconds"] == pytest.approx(gib_seconds[model], abs=8 * 30)
        if model == f"{names}remote":
            assert row["idle"] is row["cost_per_lease_hour"] is row["tokens_per_lease_second"] is None
        else:
            assert row["tokens_per_lease_second"] == pytest.approx(tokens / seconds[model], rel=0.01, abs=0.001)
            assert row["cost_per_lease_hour"] == pytest.approx(float(cost) * 3600 / seconds[model], rel=0.01)
            assert row["idle"] == pytest.approx(1 - min(1, busy[model] / seconds[model]), abs=0.005)
