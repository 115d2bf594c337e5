"""A worker that is cut off from Kafka and goes on generating: others go on with its answers, what it says is void.

It is silent for longer than it is waited for, and shorter than its own questions to Kafka wait (40 s): when the
connection heals it is of use again as it is, with the models that it holds. One that is cut off for longer ends itself,
and is started again by its supervisor like one that was killed.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest

from bench.gateway.spec import Spec
from bench.gateway.tally import Entry
from deploy.embedded.kafka import PROXIED
from deploy.embedded.ports import PortBook
from headrace.parent import die_with_parent
from schemas.events import WorkerStatus
from tests.conftest import MakeStack
from tests.faults.conftest import Note
from tests.faults.test_continuation import MISSED_S, billed, missed, shown, spoke
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, body, fresh
from tests.support.kafka import end_offsets, records
from tests.support.stacks import HEADRACE, PROVIDER_KEY, Stack
from tests.support.tcp_proxy import Cut, TcpProxy
from tests.support.waiting import until
from topics.apply import apply_all
from topics.catalogue import LOG, WORKER_STATUS

CUT = "w2"
STREAMS = 12
TOKENS = 200
INTERVAL_MS = 100.0
CUT_S = 9.0
"""Longer than a worker is waited for (3 s), and than its group session lasts (6 s)."""
USEFUL_S = 60.0
"""Until it is of use again, on a busy machine too."""


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """Of the listener behind the proxy, and of the proxy."""
    book = PortBook(tmp_path_factory.mktemp("ports") / "ports.json")
    return book.port("listener"), book.port("proxy")


@pytest.fixture(scope="module")
def proxied(make_stack: MakeStack, ports: tuple[int, int]) -> Stack:
    """A stack whose broker has a listener behind a proxy."""
    return make_stack(env={PROXIED: f"{ports[0]}:{ports[1]}"})


@pytest.fixture
def workers() -> Iterator[ExitStack]:
    """Ends what a test starts."""
    with ExitStack() as started:
        yield started


@contextmanager
def second_worker(stack: Stack, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that knows Kafka by that port alone; killed in the end."""
    conf = stack.settings
    env = {
        "HEADRACE_KAFKA_BOOTSTRAP": f"127.0.0.1:{port}", "HEADRACE_REDIS_URL": conf.redis_url,
        "HEADRACE_DATA_DIR": str(conf.data_dir), "HEADRACE_WORKER_ID": CUT, "HEADRACE_INSTANCE": "worker-2",
        "HEADRACE_DRAIN_TIMEOUT": "2", "BENCH_PROVIDER_KEY": PROVIDER_KEY,
    }  # fmt: skip
    with worker_log(stack).open("ab") as output:
        process = subprocess.Popen(
            [HEADRACE, "run", "worker"], env={**os.environ, **env}, stdout=output, stderr=output,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def worker_log(stack: Stack) -> Path:
    """What workers behind the proxy wrote."""
    return Path(f"{stack.data_dir}.w2.log")


def why_ended(stack: Stack) -> str:
    """What the worker behind the proxy that failed last says is the reason."""
    failed = [line for line in worker_log(stack).read_text().splitlines() if '"role_failed"' in line]
    return str(msgspec.json.decode(failed[-1])["error"]) if failed else ""


async def heartbeat(stack: Stack) -> WorkerStatus | None:
    """The last of the worker behind the proxy."""
    last = None
    for record in await records(stack.settings, WORKER_STATUS):
        if record.key == CUT.encode() and record.value:
            last = msgspec.json.decode(record.value, type=WorkerStatus)
    return last


async def works(stack: Stack, api: Api) -> bool:
    """Whether the worker behind the proxy answers some of the requests."""
    seen = await asyncio.gather(*(api.stream(body(Spec(tokens=1, ttft_ms=100))) for _ in range(4)))
    rows = await usage_rows(stack, [one.request_id for one in seen])
    return CUT in {str(row["worker"]) for row in rows.values()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", list(Cut))
async def test_answers_go_on_elsewhere_and_the_worker_comes_back(
    proxied: Stack, ports: tuple[int, int], how: Cut, seed: int, note: Note, workers: ExitStack
) -> None:
    await proxied.ready()
    chance = random.Random(f"{seed}-cut-{how}")
    specs = [Spec(tokens=TOKENS, interval_ms=INTERVAL_MS, seq=1_000 * at, id=fresh("cut")) for at in range(STREAMS)]
    since = await end_offsets(proxied.settings, LOG)
    await apply_all(proxied.settings, workers=["w1", CUT])
    async with TcpProxy(ports[1], ports[0]) as proxy, Api(proxied) as api:
        process = workers.enter_context(second_worker(proxied, ports[1]))
        await until(partial(works, proxied, api), "both workers answer", 60)
        before = await heartbeat(proxied)
        assert before is not None
        question = [body(spec, stream_options={"include_usage": True}) for spec in specs]
        streams = [asyncio.create_task(api.stream(one)) for one in question]

        async def all_begun() -> bool:
            seen = await proxied.all_seen()
            tries = [one for spec in specs for one in seen.get(spec.id, Entry()).tries]
            return len(tries) == STREAMS and all(one.tokens for one in tries)

        await until(all_begun, "every answer has begun", 20)
        await asyncio.sleep(chance.uniform(0.3, 3.0))
        proxy.cut(how)
        cut_s = time.time()
        await asyncio.sleep(CUT_S)
        proxy.heal()
        healed = time.monotonic()

        async def useful() -> bool:
            return process.poll() is not None or await works(proxied, api)

        await until(useful, "the worker is of use again, or has ended", USEFUL_S)
        if restarted := process.poll() is not None:
            # On a slow machine it can have been without its broker for too long: its supervisor would start it again.
            why = why_ended(proxied)
            assert process.returncode == 1 and why.startswith("Kafka"), f"it ends for no other reason: {why}"
            process = workers.enter_context(second_worker(proxied, ports[1]))
            await until(partial(works, proxied, api), "the worker is of use when it was started again", USEFUL_S)
        useful_s = time.monotonic() - healed
        assert process.poll() is None
        seen = await asyncio.gather(*streams)
        after = await heartbeat(proxied)
        assert after is not None and (after.boot != before.boot) == restarted

        for spec, one in zip(specs, seen, strict=True):
            assert one.done and one.tokens == list(range(spec.seq, spec.seq + TOKENS)), (one.error, one.tokens)
        rows = await usage_rows(proxied, [one.request_id for one in seen])
        for one in seen:
            assert shown(one.chunks[-1]["usage"]) == billed(rows[one.request_id]), one.request_id
        went_on = [one for one in seen if int(str(rows[one.request_id]["attempts"])) > 1]
        assert len(went_on) >= STREAMS // 4, "nothing was lost in the middle"
        assert {int(str(row["attempts"])) for row in rows.values()} == {1, 2}
        heard_s = sorted(one.began[2] for one in went_on)
        missed_s = sorted(await missed(proxied, [one.request_id for one in went_on]))
        assert cut_s < missed_s[0] and missed_s[-1] <= heard_s[-1] < cut_s + MISSED_S, (cut_s, missed_s, heard_s)
        generated = await proxied.all_seen()
        for spec, one in zip(specs, seen, strict=True):
            tries = generated[spec.id].tries
            assert len(tries) == int(str(rows[one.request_id]["attempts"])), "each attempt is generated once"
            assert len(tries) == 1 or tries[-1].tokens < TOKENS
        # What it still said of them is in the log, and decides nothing.
        if not restarted:
            await until(lambda: spoke(proxied, since, {one.request_id for one in went_on}), "the zombie has spoken", 30)
        assert await usage_rows(proxied, list(rows)) == rows

        async def idle() -> bool:
            now = await heartbeat(proxied)
            return now is not None and not now.running

        await until(idle, "it runs nothing any more", 20)
        await settled(proxied)
    note(
        part=f"a worker cut off from Kafka, {how.value}", continued=len(went_on), callers=STREAMS,
        missed_s=round(missed_s[-1] - cut_s, 2), first_heard_s=round(heard_s[0] - cut_s, 2),
        last_heard_s=round(heard_s[-1] - cut_s, 2), useful_again_s=round(useful_s, 2), restarted=restarted,
    )  # fmt: skip
