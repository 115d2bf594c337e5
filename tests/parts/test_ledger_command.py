"""`headrace ledger` on a real broker: it says what does not add up, and a script can tell by its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from decimal import Decimal

import msgspec

from headrace.settings import Settings
from schemas.events import Status, Terminal, UsageEvent
from schemas.ids import new_request_id
from tests.support.stacks import HEADRACE
from topics.catalogue import LOG, REQUESTS, USAGE
from topics.clients import Producer
from topics.envelope import Envelope
from topics.outcomes import now_ms


async def ledger(conf: Settings, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HEADRACE_KAFKA_BOOTSTRAP": conf.kafka_bootstrap, "HEADRACE_REDIS_URL": conf.redis_url,
        "HEADRACE_CLICKHOUSE_URL": conf.clickhouse_url, "HEADRACE_DATA_DIR": str(conf.data_dir),
    }  # fmt: skip
    command = [HEADRACE, "ledger", "--wait", "0", *options]
    return await asyncio.to_thread(
        subprocess.run, command, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def usage(request_id: str, usage_id: str) -> bytes:
    return msgspec.json.encode(
        UsageEvent(
            usage_id=usage_id,
            request_id=request_id,
            tenant="ledger",
            key_id="k",
            model="m",
            alias="m",
            provider="p",
            worker="w",
            status=Status.COMPLETED,
            attempts=1,
            prompt_tokens=1,
            cached_tokens=0,
            completion_tokens=1,
            reasoning_tokens=0,
            estimated=False,
            price_version=1,
            currency="USD",
            cost=Decimal(0),
            stream=False,
            accepted_ms=now_ms(),
            finished_ms=now_ms(),
            queue_ms=0,
            ttft_ms=0,
            generation_ms=0,
        )
    )


async def test_what_does_not_add_up_is_named_and_ends_with_1(infra: Settings, producer: Producer) -> None:
    request_id = new_request_id()
    asked = Envelope(
        request_id=request_id, source="/test", time_ms=now_ms(), tenant="ledger", key_id="k", reply_partition=0,
        digest="d", deadline_s=600.0,
    )  # fmt: skip
    await producer.send(REQUESTS.name, b"{}", key=request_id, headers=asked.headers())
    end = Terminal(request_id=request_id, tenant="ledger", attempt=1, epoch=1, status=Status.COMPLETED)
    await producer.send(LOG.name, msgspec.json.encode(end), key=request_id)

    ran = await ledger(infra, "--by-tenant")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "adds up" not in ran.stdout and "does not add up: " in ran.stderr
    assert request_id in ran.stderr and "no usage" in ran.stderr
    assert "ledger" in ran.stdout, "the tenant's line"

    await producer.send(USAGE.name, usage(request_id, "u1"), key=request_id)
    assert request_id not in (await ledger(infra)).stderr

    await producer.send(USAGE.name, usage(request_id, "u2"), key=request_id)
    ran = await ledger(infra, "--json")
    told = json.loads(ran.stdout)
    assert ran.returncode == 1 and told["adds_up"] is False
    assert request_id in told["doubled_usage"]
