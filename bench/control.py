"""How many changes of the control plane a second come into force: decided, in Kafka with their audit events, in Redis.

    python -m bench.control [--changes 20000]

A stack of its own. The changes are new keys, sent by one process as fast as the brokers take them. The clock runs from
when the last one is acknowledged, on what is not in force by then: a backlog. What reads the projection meanwhile is
one ingress and the other roles of the stack.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import typer
import uvloop

from bench.gateway.stack import data_dir, headrace, upstream
from bench.output import save
from deploy.embedded.stack import discover
from headrace.control_client import command, control_client
from headrace.projection import Projection
from headrace.redis_client import connect
from headrace.settings import Settings
from schemas.control import App, Key
from topics.catalogue import CONTROL_COMMANDS, CONTROL_RECORDS
from topics.clients import Producer

KEYS = CONTROL_RECORDS["keys"].name
PATIENCE_S = 300.0


class Report(msgspec.Struct):
    """What is kept of a run."""

    started: str
    changes: int
    """Those that were left when the last command was acknowledged."""
    seconds: float
    """From then to the last change in Redis."""
    changes_s: float
    cpu_ms: float
    """Of the control role, for one change."""


def main(
    changes: Annotated[int, typer.Option(min=1, help="How many keys are made.")] = 20_000,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Measure, show, and keep."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as found:
        directory = Path(found)
        with upstream(directory) as url, headrace(directory, url):
            stack = discover(data_dir(directory))
            if stack is None or (pid := stack.children["control-1"].pid) is None:
                sys.exit("the stack has no control role")
            conf = Settings(kafka_bootstrap=stack.kafka_bootstrap, redis_url=stack.redis_url, data_dir=directory)
            report = uvloop.run(measured(conf, psutil.Process(pid), changes))
    print(f"{report.changes} changes in {report.seconds:.1f} s: {report.changes_s:,.0f} a second, goal 5,000")
    print(f"{report.cpu_ms:.2f} ms of the control role's CPU for one")
    print(f"written to {save(report, 'control', report.started, *([output] if output else []))}")


async def measured(conf: Settings, role: psutil.Process, changes: int) -> Report:
    """Send so many changes, and wait until the last is in force; what counts is what comes after the last was sent."""
    async with control_client(conf) as control:
        await control.submit([command(App("bench", "bench"), actor="bench")])
    redis = connect(conf.redis_url)
    projection = Projection(redis)
    keys = (
        Key(id=f"k{n}", sha256=hashlib.sha256(b"%d" % n).hexdigest(), name=f"key {n}", app="bench")
        for n in range(changes)
    )
    sent = [command(key, actor="bench") for key in keys]
    want = (await projection.state()).offsets.get(KEYS, 0) + changes
    started = datetime.now(UTC).isoformat(timespec="seconds")
    async with Producer(conf.kafka, "bench") as producer:
        await asyncio.gather(
            *(
                producer.send(CONTROL_COMMANDS.name, msgspec.json.encode(one), key=f"{one.kind}/{one.key}")
                for one in sent
            )
        )
        left = want - (await projection.state()).offsets.get(KEYS, 0)
        began, before = time.monotonic(), sum(role.cpu_times()[:2])
        while (await projection.state()).offsets.get(KEYS, 0) < want:
            if time.monotonic() > began + PATIENCE_S:
                sys.exit(f"not all changes were in force after {PATIENCE_S:.0f} s")
            await asyncio.sleep(0.05)
        seconds = time.monotonic() - began
    await redis.aclose()
    cpu = sum(role.cpu_times()[:2]) - before
    return Report(started, left, seconds, left / seconds, cpu * 1000 / left)


if __name__ == "__main__":
    typer.run(main)
