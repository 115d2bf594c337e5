"""Fills the embedded engine with usage, then times dashboards and the sink's way in from a backlog.

python -m bench.analytics --rows 10000000
python -m bench.analytics --rows 100000000 --data /var/tmp/usage     # kept, and used again
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import typer
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError
from rich.table import Table

from bench.analytics.generate import DAYS, statements
from bench.output import new_console, save
from clickhouse.client import connect
from clickhouse.migrate import migrate
from clickhouse.projection import Projection
from clickhouse.rollups import Rollups
from clickhouse.usage_query import Bucket, UsageQuery
from deploy.embedded.ports import PortBook
from headrace.analytics import answered
from headrace.settings import Settings
from processors.sink.batch import Batch, Limits
from schemas.events import Status, UsageEvent
from topics.catalogue import USAGE

REPEATS = 15
SINK_ROWS = 200_000
DATABASE = "bench"


class Timed(msgspec.Struct):
    """A dashboard's query: milliseconds as its caller waits."""

    name: str
    p50_ms: float
    p95_ms: float
    rows: int


class Report(msgspec.Struct):
    """What is kept of a run."""

    started: str
    rows: int
    cores: int
    disk_bytes: int
    generate_s: float
    roll_up_s: float
    dashboards: list[Timed]
    sink_rows: int
    sink_rows_per_s: float
    """By the clock, both processes at once."""
    sink_rows_per_sink_core_s: float
    engine_rows_per_core_s: float


@dataclass(frozen=True)
class Line:
    """A record of `usage.events`, as a consumer gives it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    value: bytes
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


def main(
    rows: Annotated[int, typer.Option(help="Usage rows to make.")] = 10_000_000,
    data: Annotated[Path | None, typer.Option(help="Where the engine keeps them; default: nowhere for long.")] = None,
    seed: Annotated[int, typer.Option(help="Another one makes other rows.")] = 1,
    sink_rows: Annotated[int, typer.Option(help="Length of the sink's backlog.")] = SINK_ROWS,
) -> None:
    """Make rows, time dashboards, time the sink."""
    kept = data if data is not None else Path(tempfile.mkdtemp(prefix="headrace-analytics-", dir=Path.home()))
    try:
        with engine(kept) as (conf, process):
            report = asyncio.run(measured(conf, process, rows, seed, sink_rows))
    finally:
        if data is None:
            shutil.rmtree(kept, ignore_errors=True)
    show(report)
    typer.echo(f"written to {save(report, 'analytics', report.started)}")


@contextmanager
def engine(data: Path) -> Iterator[tuple[Settings, psutil.Process]]:
    """The embedded engine on a data directory."""
    data.mkdir(parents=True, exist_ok=True)
    port = PortBook(data / "ports.json").port("clickhouse")
    argv = [sys.executable, "-m", "deploy.embedded.clickhouse_server", "--data", str(data / "engine")]
    server = subprocess.Popen([*argv, "--port", str(port)], env=os.environ)
    conf = Settings(clickhouse_url=f"http://127.0.0.1:{port}", clickhouse_database=DATABASE)
    try:
        give_up = time.monotonic() + 120
        while True:
            try:
                migrate(conf)
                break
            except (ClickHouseError, OSError):
                if time.monotonic() > give_up or server.poll() is not None:
                    raise
                time.sleep(0.2)
        yield conf, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(60)


async def measured(conf: Settings, process: psutil.Process, rows: int, seed: int, sink_rows: int) -> Report:
    """The whole run."""
    now = datetime.now(UTC)
    client = await connect(conf, database=DATABASE, timeout_s=3600)
    found = await client.query("SELECT count(), max(accepted_at) FROM usage_lines_raw")
    begin = now.replace(minute=0, second=0, microsecond=0) - timedelta(days=DAYS)
    start = time.perf_counter()
    if not found.result_rows[0][0]:
        for statement, _ in statements(DATABASE, rows, begin, seed):
            await client.command(statement, settings={"max_execution_time": 0})
    generated = time.perf_counter() - start
    rollups = Rollups(client, DATABASE)
    start = time.perf_counter()
    await rollups.touch_all(now - timedelta(minutes=5))
    await rollups.run(now)
    rolled = time.perf_counter() - start
    dashboards = [await timed(client, name, query) for name, query in questions(now)]
    by_clock, by_core, by_engine = await sink(client, process, sink_rows, now)
    size = await client.query(
        "SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND database = currentDatabase()"
    )
    await client.close()
    return Report(
        now.isoformat(timespec="seconds"), rows, os.cpu_count() or 1,
        size.result_rows[0][0],
        round(generated, 1), round(rolled, 1), dashboards, sink_rows, round(by_clock), round(by_core), round(by_engine),
    )  # fmt: skip


Question = UsageQuery | str
"""As `/admin/usage` asks, or SQL."""


def questions(now: datetime) -> Iterator[tuple[str, Question]]:
    """What dashboards ask."""

    def asked(days: float, bucket: Bucket, by: tuple[str, ...], **where: tuple[str, ...]) -> Question:
        return UsageQuery(now - timedelta(days=days), now, bucket, by, where)

    yield "spend by tenant, 90 days", asked(90, Bucket.NONE, ("tenant",))
    yield "spend by tenant and day, 90 days", asked(90, Bucket.DAY, ("tenant",))
    yield "tokens by model and day, 30 days", asked(30, Bucket.DAY, ("model",))
    yield "models by hour, 7 days", asked(7, Bucket.HOUR, ("model",))
    yield "one tenant's keys by day, 30 days", asked(30, Bucket.DAY, ("key",), tenant=("tenant-0",))
    yield "errors by model, 30 days", asked(30, Bucket.NONE, ("model", "error"), status=("failed",))
    yield "the last hour by minute", asked(1 / 24, Bucket.MINUTE, ("model",))
    yield "spend_by_tenant_daily, 30 days", "SELECT * FROM spend_by_tenant_daily WHERE day > today() - 30"
    yield (
        "latency_by_model_hourly, 7 days",
        "SELECT * FROM latency_by_model_hourly WHERE hour > now('UTC') - INTERVAL 7 DAY",
    )
    yield "fairness_by_tenant, 1 day", "SELECT * FROM fairness_by_tenant WHERE hour > now('UTC') - INTERVAL 1 DAY"


async def timed(client: AsyncClient, name: str, question: Question) -> Timed:
    """Ask a question again and again."""
    took = []
    rows = 0
    for _ in range(REPEATS):
        start = time.perf_counter()
        if isinstance(question, UsageQuery):
            rows = len(await answered(client, question))
        else:
            rows = len((await client.query(question)).result_rows)
        took.append((time.perf_counter() - start) * 1000)
    took.sort()
    return Timed(name, round(took[len(took) // 2], 1), round(took[int(0.95 * len(took))], 1), rows)


def backlog(count: int, now: datetime) -> list[Line]:
    """Records of `usage.events` of the last hour."""
    begin = int(now.timestamp() * 1000) - 3_600_000
    encode = msgspec.json.Encoder().encode
    return [
        Line(
            USAGE.name, number % 12, number, begin, encode(
                UsageEvent(
                    usage_id=f"{number:032x}", request_id=f"{number:032x}", tenant=f"tenant-{number % 60}",
                    key_id=f"key-{number % 300}", model=f"model-{number % 12}", alias="alias", provider="provider",
                    worker=f"worker-{number % 8}", status=Status.COMPLETED, attempts=1, prompt_tokens=number % 900,
                    cached_tokens=0, completion_tokens=number % 300, reasoning_tokens=0, estimated=False,
                    price_version=1, currency="USD", cost=Decimal(number % 10_000).scaleb(-9), stream=True,
                    accepted_ms=begin + number % 3_600_000, finished_ms=begin + number % 3_600_000 + 900,
                    queue_ms=number % 90, ttft_ms=120, generation_ms=800, user_id=f"user-{number % 97}",
                )
            ),
        )
        for number in range(count)
    ]  # fmt: skip


async def sink(client: AsyncClient, process: psutil.Process, count: int, now: datetime) -> tuple[float, float, float]:
    """Rows a second by the clock, by the sink's own CPU, and by the engine's, of a backlog that lies in memory."""
    records = backlog(count, now)
    projection = Projection(client, DATABASE)
    limits = Limits()
    cpu, engine_cpu, start = time.process_time(), sum(process.cpu_times()[:2]), time.perf_counter()
    position = 0
    while position < len(records):
        batch = Batch(limits)
        while batch.room and batch.bytes < limits.bytes and position < len(records):
            some = records[position : position + min(500, batch.room)]
            batch.add(some, 0.0)
            position += len(some)
        await projection.write(batch.items)
    return (
        count / (time.perf_counter() - start),
        count / (time.process_time() - cpu),
        count / (sum(process.cpu_times()[:2]) - engine_cpu),
    )


def show(report: Report) -> None:
    """The report as tables."""
    table = Table("dashboard", "p50 ms", "p95 ms", "rows", header_style="bold")
    for one in report.dashboards:
        table.add_row(one.name, f"{one.p50_ms:.1f}", f"{one.p95_ms:.1f}", str(one.rows))
    console = new_console(100)
    console.print(table)
    console.print(
        f"{report.rows} rows made in {report.generate_s} s, added up in {report.roll_up_s} s, "
        f"{report.disk_bytes / 1e9:.1f} GB on disk; {report.cores} cores"
    )
    console.print(
        f"sink: {report.sink_rows_per_s:.0f} rows/s by the clock, {report.sink_rows_per_sink_core_s:.0f} a core-second "
        f"of the sink, {report.engine_rows_per_core_s:.0f} a core-second of the engine"
    )


if __name__ == "__main__":
    typer.run(main)
