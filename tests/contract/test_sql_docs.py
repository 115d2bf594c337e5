"""Every example of docs/sql.md, run on generated data, against figures that Python works out from the same events."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from clickhouse.client import connect
from clickhouse.migrate import migrate
from clickhouse.projection import Projection
from clickhouse.rollups import Rollups
from headrace import sql
from headrace.settings import Settings
from schemas.events import (
    AttemptOpened,
    ErrorInfo,
    LeaseEvent,
    LifecycleEvent,
    PricedBefore,
    Stage,
    Status,
    Terminal,
    Timings,
    Usage,
    UsageEvent,
)
from tests.support.tables import Record, items, usage_event

DOCS = Path(__file__).parents[2] / "docs" / "sql.md"
EXAMPLES: dict[str, str] = dict(re.findall(r"```sql\n-- ([a-z-]+)\n(.*?)```", DOCS.read_text(), re.DOTALL))
T = TypeVar("T")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class World:
    """Some days of a small installation, ending now."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.now = datetime.now(UTC)
        self.usage: list[UsageEvent] = []
        self.before: list[UsageEvent] = []
        """Every revision, those that no longer count too."""
        self.terminals: list[Terminal] = []
        self.events: list[LifecycleEvent] = []
        self.opened: list[AttemptOpened] = []
        self.leases: list[tuple[str, int, int, str, int]] = []
        """(model, begin ms, end ms, reason, bytes) of leases that have ended."""
        now_ms = int(self.now.timestamp() * 1000)
        for number in range(400):
            # Away from the edges of what is asked for: an hour, a day, a fortnight ago.
            ages = (rng.randrange(10, 170), rng.randrange(200, 1400), rng.randrange(1500, 18_000))
            self._request(rng, number, now_ms - rng.choice(ages) * 60_000 - rng.randrange(30_000))
        for _ in range(30):
            begin = now_ms - rng.randrange(1, 300) * 3_600_000
            reason = rng.choice(("makes room for m2", "makes room for m1", "idle"))
            self.leases.append(
                (rng.choice(("m1", "m2")), begin, begin + rng.randrange(1, 90_000) * 1000, reason, 2**30)
            )

    def _request(self, rng: random.Random, number: int, accepted: int) -> None:
        rid, tenant, key = f"{number:032x}", rng.choice("abc"), rng.choice(("k1", "k2"))
        model, alias = rng.choice(("m1", "m2")), rng.choice(("small", "big"))
        steps = [rng.randrange(1, 50), rng.randrange(1, 900), rng.randrange(1, 20), rng.randrange(1, 400)]
        routed = accepted + steps[0]
        assigned = routed + steps[1]
        started = assigned + steps[2]
        first = started + steps[3]
        finished = first + rng.randrange(10, 5000)
        for stage, at in zip(
            (Stage.ACCEPTED, Stage.ROUTED, Stage.ASSIGNED, Stage.STARTED, Stage.FIRST_TOKEN),
            (accepted, routed, assigned, started, first), strict=True,
        ):  # fmt: skip
            detail: dict[str, str | int | float | bool] = {"key_id": key, "alias": alias}
            self.events.append(
                LifecycleEvent(rid, tenant, stage, at, "r", "i", detail=detail if stage is Stage.ACCEPTED else {})
            )
        if number % 50 == 0:
            return  # in flight
        failed = rng.random() < 0.2
        status = Status.FAILED if failed else Status.COMPLETED
        code = rng.choice(("provider_error", "worker_lost")) if failed else ""
        attempt = 1
        if rng.random() < 0.05:
            attempt = 2
            self.opened.append(AttemptOpened(rid, tenant, 2, 1, "w2", "lost", started))
        prompt = rng.randrange(1, 900)
        usage = Usage(prompt, rng.randrange(1, 500), rng.randrange(prompt + 1))
        self.terminals.append(
            Terminal(
                rid, tenant, attempt, 1, status, key_id=key, model=model, alias=alias, usage=usage,
                error=ErrorInfo(502, code, f"because of {code}") if failed else None,
                timings=Timings(accepted, routed, assigned, started, first, finished),
            )
        )  # fmt: skip
        line = usage_event(
            number, request_id=rid, tenant=tenant, key_id=key, user_id=f"user-{key}", model=model, alias=alias,
            status=status, error_code=code, prompt_tokens=prompt, cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens, currency="EUR" if tenant == "c" else "USD",
            cost=Decimal(rng.randrange(1, 10**14)).scaleb(-18), accepted_ms=accepted, finished_ms=finished,
            queue_ms=started - accepted, load_ms=rng.randrange(started - accepted), ttft_ms=first - accepted,
            generation_ms=finished - started,
        )  # fmt: skip
        self.before.append(line)
        if rng.random() < 0.2:
            was = PricedBefore(0, line.price_version, line.currency, line.cost)
            line = msgspec.structs.replace(line, revision=1, cost=line.cost * 2, price_version=9, repriced_of=[was])
            self.before.append(line)
        self.usage.append(line)

    def records(self) -> Iterable[Record]:
        for offset, opening in enumerate(self.opened):
            yield Record("inference.log", offset, msgspec.json.encode(opening))
        for offset, terminal in enumerate(self.terminals, len(self.opened)):
            yield Record("inference.log", offset, msgspec.json.encode(terminal))
        for offset, event in enumerate(self.events):
            yield Record("inference.events", offset, msgspec.json.encode(event))
        for offset, line in enumerate(self.before):
            yield Record("usage.events", offset, msgspec.json.encode(line))
        for number, (model, begin, end, reason, size) in enumerate(self.leases):
            for step, (state, at) in enumerate((("granted", begin), ("active", begin), ("free", end))):
                event = LeaseEvent(
                    f"l{number}", "p", 1, "w", model, state, at, epoch=-1 if not step else number * 3, bytes=size,
                    reason=reason if state == "free" else "", device="d0",
                )  # fmt: skip
                yield Record("vram.leases", number * 3 + step, msgspec.json.encode(event))


@pytest.fixture(scope="module")
async def world(server: Settings) -> tuple[Settings, World]:
    """The data in a database of its own, every record delivered twice, half of the windows added up."""
    made = World(7)
    conf = server.model_copy(update={"clickhouse_database": "sql_docs"})
    migrate(conf)
    client = await connect(conf)
    projection = Projection(client, conf.clickhouse_database)
    records = list(made.records())
    random.Random(1).shuffle(late := [record for record in records if record.topic == "usage.events"])
    await projection.write(items(records))
    await Rollups(client, conf.clickhouse_database).run(made.now + timedelta(minutes=1))
    await projection.write(items(late[:20]))
    await client.close()
    return conf, made


def at(ms: int, step_s: int) -> datetime:
    return (EPOCH + timedelta(seconds=ms // 1000 // step_s * step_s)).replace(tzinfo=None)


def day(ms: int) -> date:
    return at(ms, 86_400).date()


def middle(values: Iterable[int], level: float = 0.5) -> int:
    """ClickHouse's quantileExact: the value that far along the sorted ones."""
    ordered = sorted(values)
    return ordered[int(level * len(ordered))]


def grouped(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def money(lines: Sequence[UsageEvent]) -> Decimal:
    return sum((line.cost for line in lines), Decimal(0))


Rows = list[tuple[Any, ...]]


def spend_this_month(w: World) -> Rows:
    begin = datetime(w.now.year, w.now.month, 1, tzinfo=UTC).timestamp() * 1000
    groups = grouped((u for u in w.usage if u.accepted_ms >= begin), lambda u: (u.tenant, u.currency))
    rows = [(*k, money(g), sum(u.prompt_tokens + u.completion_tokens for u in g)) for k, g in groups.items()]
    return sorted(rows, key=lambda row: -row[2])


def spend_adds_up(w: World) -> Rows:
    rows: Rows = []
    since = w.now.date() - timedelta(days=14)
    groups = grouped(
        (u for u in w.usage if day(u.accepted_ms) > since), lambda u: (u.tenant, u.currency, day(u.accepted_ms))
    )
    total: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for (tenant, currency, when), lines in groups.items():
        total[tenant, currency] += money(lines)
        rows.append((when, tenant, currency, money(lines), total[tenant, currency]))
    return rows


def dearest_users(w: World) -> Rows:
    rows = [(*k, len(g), money(g)) for k, g in grouped(w.usage, lambda u: (u.user_id, u.currency)).items()]
    return sorted(rows, key=lambda row: -row[3])[:5]


def share_by_model(part: str, whole: str, places: int) -> Callable[[World], Rows]:
    def shares(w: World) -> Rows:
        return [
            (model, round(sum(getattr(u, part) for u in g) / sum(getattr(u, whole) for u in g), places))
            for model, g in grouped(w.usage, lambda u: u.model).items()
        ]

    return shares


def repriced(w: World) -> Rows:
    lines = {u.usage_id: u for u in w.usage}
    return [
        (*k, money([u for u in g if u.revision == 0]), money([u for u in g if lines[u.usage_id] is u]))
        for k, g in grouped(w.before, lambda u: (u.tenant, u.currency)).items()
    ]


def where_time_goes(w: World) -> Rows:
    done = [t for t in w.terminals if t.status is Status.COMPLETED]
    return [
        (
            model, len(g), middle(t.timings.assigned_ms - t.timings.routed_ms for t in g),
            middle(t.timings.first_token_ms - t.timings.accepted_ms for t in g),
            middle(t.timings.finished_ms - t.timings.started_ms for t in g),
            middle(t.timings.finished_ms - t.timings.accepted_ms for t in g),
        )
        for model, g in grouped(done, lambda t: t.model).items()
    ]  # fmt: skip


def slow_hours(w: World) -> Rows:
    done = (u for u in w.usage if u.status is Status.COMPLETED)
    rows = [
        (*k, len(g), middle((u.ttft_ms for u in g), 0.95))
        for k, g in grouped(done, lambda u: (at(u.accepted_ms, 3600), u.model)).items()
        if len(g) >= 3
    ]
    return sorted(rows, key=lambda row: (-row[3], row[0], row[1]))[:5]


def tokens_per_second(w: World) -> Rows:
    since = (w.now - timedelta(hours=3)).replace(tzinfo=None)
    groups = grouped(w.usage, lambda u: at(u.accepted_ms, 60))
    return [(k, round(sum(u.completion_tokens for u in g) / 60, 1)) for k, g in groups.items() if k > since]


def failures(w: World) -> Rows:
    since = (w.now - timedelta(days=1)).timestamp() * 1000
    lost = [t.error.code for t in w.terminals if t.error is not None and t.timings.finished_ms > since]
    rows = [(code, f"because of {code}", count) for code, count in Counter(lost).items()]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def error_rate(w: World) -> Rows:
    groups = grouped(w.usage, lambda u: u.model)
    return [(m, round(sum(u.status is not Status.COMPLETED for u in g) / len(g), 4)) for m, g in groups.items()]


def errors_by_hour(w: World) -> Rows:
    lost = (u for u in w.usage if u.status is not Status.COMPLETED)
    return [(*k, len(g)) for k, g in grouped(lost, lambda u: (at(u.accepted_ms, 3600), u.model, u.error_code)).items()]


def least_served(w: World) -> Rows:
    rows: Rows = []
    for (hour, model), lines in grouped(w.usage, lambda u: (at(u.accepted_ms, 3600), u.model)).items():
        tenants = grouped(lines, lambda u: u.tenant)
        tokens = {t: sum(u.prompt_tokens + u.completion_tokens for u in g) for t, g in tenants.items()}
        jain = sum(tokens.values()) ** 2 / (len(tokens) * sum(n * n for n in tokens.values()))
        for tenant, g in tenants.items():
            share = tokens[tenant] / sum(tokens.values())
            if share < 0.2:
                waited = sum(u.queue_ms for u in g) / len(g)
                rows.append((hour, model, tenant, round(share, 3), round(jain, 3), waited))
    return rows


def ledger(w: World) -> Rows:
    accepted = {event.request_id: event for event in w.events if event.stage is Stage.ACCEPTED}
    ended = {t.request_id for t in w.terminals}
    rows: Rows = []
    for key, g in grouped(accepted.values(), lambda e: (day(e.at_ms), e.tenant)).items():
        done = sum(e.request_id in ended for e in g)
        if done < len(g):
            rows.append((*key, len(g), done, len(g) - done, done))
    return rows


def gpu_second(w: World) -> Rows:
    held: dict[tuple[str, date], float] = defaultdict(float)
    for model, begin, end, _, _ in w.leases:
        edges = [begin, *range((begin // 86_400_000 + 1) * 86_400_000, end, 86_400_000), end]
        for one, other in itertools.pairwise(edges):
            held[model, day(one)] += (other - one) / 1000
    groups = grouped(w.usage, lambda u: (u.model, u.currency))
    rows: Rows = []
    for (model, currency), lines in groups.items():
        days = {day(u.accepted_ms) for u in lines if held.get((model, day(u.accepted_ms)))}
        seconds = sum(held[model, one] for one in days)
        rows.append((model, currency, float(money([u for u in lines if day(u.accepted_ms) in days])) / seconds))
    return rows


def more_than_one_worker(w: World) -> Rows:
    return sorted((o.request_id, 2, "w2", "lost") for o in w.opened)[:20]


def hops(w: World) -> Rows:
    since = (w.now - timedelta(days=1)).timestamp() * 1000
    steps: dict[Stage, list[int]] = defaultdict(list)
    for g in grouped((e for e in w.events if e.at_ms > since), lambda e: e.request_id).values():
        before = g[0].at_ms
        for event in g:
            steps[event.stage].append(event.at_ms - before)
            before = event.at_ms
    return [(s.value, len(ms), middle(ms), middle(ms, 0.99)) for s, ms in steps.items()]


def gave_way(w: World) -> Rows:
    gone = [lease for lease in w.leases if lease[3].startswith("makes room")]
    groups = grouped(gone, lambda lease: (lease[0], lease[3]))
    rows = [(*k, len(g), sum(lease[2] - lease[1] for lease in g) / 1000 / len(g)) for k, g in groups.items()]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def asked_for(w: World) -> Rows:
    found = Counter((e.detail["key_id"], e.detail["alias"]) for e in w.events if e.stage is Stage.ACCEPTED)
    return sorted(((*k, n) for k, n in found.items()), key=lambda row: (-row[2], row[0], row[1]))


RECOUNTS: dict[str, Callable[[World], Rows]] = {
    "spend-this-month": spend_this_month,
    "spend-adds-up": spend_adds_up,
    "dearest-users": dearest_users,
    "cached-share": share_by_model("cached_tokens", "prompt_tokens", 3),
    "repriced": repriced,
    "where-time-goes": where_time_goes,
    "slow-hours": slow_hours,
    "loading": share_by_model("load_ms", "queue_ms", 3),
    "tokens-per-second": tokens_per_second,
    "failures": failures,
    "error-rate": error_rate,
    "errors-by-hour": errors_by_hour,
    "least-served": least_served,
    "ledger": ledger,
    "gpu-second": gpu_second,
    "more-than-one-worker": more_than_one_worker,
    "hops": hops,
    "gave-way": gave_way,
    "asked-for": asked_for,
}
ROUNDED = {"tokens-per-second": 0.101, "least-served": 1.0, "gpu-second": 1e-11, "gave-way": 1.0}
"""How far the last column may be off: rounding of halves, and sums of floats."""


def test_every_example_has_a_recount() -> None:
    assert set(EXAMPLES) == set(RECOUNTS) and len(EXAMPLES) >= 12
    assert DOCS.read_text().count("```sql") == len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
async def test_the_answer_is_what_python_counts(world: tuple[Settings, World], name: str) -> None:
    conf, made = world
    rows = [tuple(_naive(value) for value in row) for row in sql.run(conf, EXAMPLES[name].strip(), {}).rows]
    expected = RECOUNTS[name](made)
    assert expected, "the data must make it say something"
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        for value, want in zip(row, wanted, strict=True):
            if isinstance(want, float):
                assert value == pytest.approx(want, abs=ROUNDED.get(name, 0.0011))
            else:
                assert value == want


def _naive(value: object) -> object:
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value
