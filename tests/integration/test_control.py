"""The control plane on real Kafka and Valkey: in force, healed, rebuilt, and written by one hand only."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal

import msgspec
import pytest
from redis.asyncio import Redis

from headrace.api_keys import sha256
from headrace.apply import apply_config
from headrace.config import default_config, parse_config
from headrace.control_client import CommandsRefused, ControlClient, command, control_client
from headrace.control_log import end_offsets, replay_control
from headrace.rebuild import rebuild
from headrace.redis_client import connect
from headrace.registry import Registry
from headrace.settings import Settings
from processors.control.decide import ControlState
from processors.control.writer import TOPICS
from schemas.control import App, Model
from topics.apply import apply_all
from topics.catalogue import CONTROL_COMMANDS, DEAD_LETTERS, REQUESTS
from topics.clients import LogReader, Producer
from topics.dead_letters import describe
from topics.envelope import Envelope

ADMIN = "hr-test-admin"
START = "from headrace.cli import main; main()"


class Role:
    """`headrace run control` as a process."""

    def __init__(self, settings: Settings, instance: str) -> None:
        self._env = os.environ | {
            "HEADRACE_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
            "HEADRACE_REDIS_URL": settings.redis_url,
            "HEADRACE_DATA_DIR": str(settings.data_dir),
            "HEADRACE_INSTANCE": instance,
        }
        self._log = settings.data_dir / f"{instance}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", START, "run", "control", env=self._env, stdout=log, stderr=log
            )

    def send(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    async def ended(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    def log(self) -> str:
        return self._log.read_text()

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def until(holds: Callable[[], Awaitable[bool]], within: float) -> float:
    """Wait for something to become true; seconds that it took. Fails after `within` seconds."""
    start = time.monotonic()
    async with asyncio.timeout(within):
        while not await holds():
            await asyncio.sleep(0.01)
    return time.monotonic() - start


@pytest.fixture(scope="module")
async def control(infra: Settings) -> AsyncIterator[Role]:
    """A running control role with the default configuration in force."""
    await apply_all(infra, workers=[])
    role = Role(infra, f"control-{uuid.uuid4().hex[:6]}")
    await role.start()
    await apply_config(infra, default_config(), admin_key=ADMIN)
    yield role
    await role.kill()


@pytest.fixture
async def client(infra: Settings, control: Role) -> AsyncIterator[ControlClient]:
    async with control_client(infra, timeout=20) as made:
        yield made


@pytest.fixture
async def redis(infra: Settings) -> AsyncIterator[Redis]:
    made = connect(infra.redis_url)
    yield made
    await made.aclose()


@pytest.fixture
async def registry(control: Role, redis: Redis) -> AsyncIterator[Registry]:
    made = Registry(redis)
    await made.start()
    await made.wait_complete(20)
    yield made
    await made.stop()


def app(name: str = "") -> App:
    return App(id=f"app-{uuid.uuid4().hex[:8]}", name=name or "A test's")


async def letters(infra: Settings) -> list[tuple[str, bytes | None]]:
    """Reason and value of every dead letter of control commands."""
    async with LogReader(infra.kafka_bootstrap, "test", max_wait_ms=100) as reader:
        found = [record async for record in reader.read_to_end(reader.assign([DEAD_LETTERS]))]
    described = [(describe(record.headers)[0], record.value) for record in found]
    return [(letter.reason, value) for letter, value in described if letter.source_topic == CONTROL_COMMANDS.name]


async def test_what_is_applied_is_in_force_and_a_second_apply_writes_nothing(
    infra: Settings, registry: Registry
) -> None:
    await apply_config(infra, default_config(), admin_key=ADMIN)
    model = registry.snapshot.resolve("gpt-4o-mini")
    assert model is not None
    assert (model.id, model.price.version > 0, model.created > 0) == ("smollm2", True, True)
    key = await registry.key(sha256(ADMIN))
    assert key is not None
    assert (key.role, key.app, key.enabled) == ("admin", "default", True)
    topics = {**TOPICS, "commands": CONTROL_COMMANDS}
    before = await end_offsets(infra, topics)
    assert await apply_config(infra, default_config(), admin_key=ADMIN) == []
    assert await end_offsets(infra, topics) == before


async def test_a_changed_price_is_a_new_version_and_the_old_one_is_kept(
    infra: Settings, client: ControlClient, registry: Registry
) -> None:
    name = f"priced-{uuid.uuid4().hex[:8]}"
    source = (await client.read()).models["smollm2"]
    for amount in ("1", "1.0", "2"):
        price = msgspec.structs.replace(source.price, input=Decimal(amount))
        model = msgspec.structs.replace(source, id=name, aliases=(), price=price)
        await client.submit([command(model, actor="test")])
    found = registry.snapshot.resolve(name) or (await client.read()).models[name]
    assert (await client.read()).models[name].price.version == 2
    assert found.id == name
    prices = (await replay_control(infra, TOPICS)).records["prices"]
    assert sorted(key for key in prices if key.startswith(name)) == [f"{name}/1", f"{name}/2"]
    await client.submit([command(msgspec.structs.replace(model, enabled=False), actor="test")])


async def test_a_refused_command_is_told_recorded_and_changes_nothing(infra: Settings, client: ControlClient) -> None:
    model = Model(id=f"m-{uuid.uuid4().hex[:8]}", provider="gone", backend_tag="x")
    taken = Model(id=f"m-{uuid.uuid4().hex[:8]}", provider="local", backend_tag="x", aliases=("smollm2",))
    after = app()
    before = await client.read()
    with pytest.raises(CommandsRefused) as refused:
        await client.submit([command(record, actor="test") for record in (model, taken, after)])
    assert str(refused.value).splitlines() == [
        f"model {model.id!r}: there is no provider 'gone'",
        f"model {taken.id!r}: the name 'smollm2' is taken by model 'smollm2'",
    ]
    plane = await client.read()
    assert plane.models == before.models
    assert plane.apps[after.id] == after
    assert any(model.id in reason and value is not None for reason, value in await letters(infra))


async def test_a_malformed_command_is_dead_lettered_as_it_was_and_the_next_is_handled(
    infra: Settings, client: ControlClient
) -> None:
    poison = b"\xff not a command " + uuid.uuid4().bytes
    async with Producer(infra.kafka_bootstrap, "test") as producer:
        await producer.send(CONTROL_COMMANDS.name, poison)
    await client.submit([command(app(), actor="test")])
    assert [reason for reason, value in await letters(infra) if value == poison][0].startswith("not a control command")


async def test_a_new_key_and_its_revocation_are_in_force_when_the_sender_is_told(
    client: ControlClient, registry: Registry
) -> None:
    from headrace.api_keys import admin_record

    key = msgspec.structs.replace(admin_record(f"hr-{uuid.uuid4().hex}", "default"), id="key-test", role="member")
    assert await registry.key(key.sha256) is None
    await client.submit([command(key, actor="test")])
    assert await registry.key(key.sha256) == key
    revoked = msgspec.structs.replace(key, enabled=False)
    await client.submit([command(revoked, actor="test")])

    async def refused() -> bool:
        return await registry.key(key.sha256) == revoked

    assert await until(refused, within=1) < 0.5


async def test_a_flushed_redis_heals_by_itself_with_the_same_answers(
    infra: Settings, client: ControlClient, registry: Registry, redis: Redis
) -> None:
    before, snapshot = await client.read(), registry.snapshot
    await redis.flushall()

    async def whole() -> bool:
        return bool(await redis.exists("hr:gen"))

    assert await until(whole, within=10) < 5
    assert await client.read() == before
    healed = await registry.wait_complete(5)
    assert healed.models == snapshot.models
    assert (await registry.key(sha256(ADMIN))) is not None


async def test_rebuilds_beside_a_busy_processor_lose_nothing(infra: Settings, client: ControlClient) -> None:
    apps = [app() for _ in range(60)]
    done = asyncio.Event()

    async def change() -> None:
        for start in range(0, len(apps), 3):
            await client.submit([command(made, actor="test") for made in apps[start : start + 3]])
        done.set()

    changing = asyncio.create_task(change())
    rebuilds = 0
    while not done.is_set() or rebuilds < 3:
        await rebuild(infra)
        rebuilds += 1
    await changing
    plane = await client.read()
    assert {made.id for made in apps} <= plane.apps.keys()
    replay = await replay_control(infra, TOPICS)
    assert ControlState.of(replay.records).apps == plane.apps


async def test_commands_survive_a_killed_processor(infra: Settings, control: Role, client: ControlClient) -> None:
    apps = [app(str(number)) for number in range(200)]
    submitting = asyncio.create_task(client.submit([command(made, actor="test") for made in apps]))

    async def some() -> bool:
        return any(made.id in (await client.read()).apps for made in apps)

    await until(some, within=20)
    await control.kill()
    await control.start()
    with contextlib.suppress(Exception):
        await submitting  # Outcomes told before the kill may be gone with it; what was sent is not.

    async def all_there() -> bool:
        return {made.id for made in apps} <= (await client.read()).apps.keys()

    await until(all_there, within=40)
    assert {made.id for made in apps} <= ControlState.of((await replay_control(infra, TOPICS)).records).apps.keys()


async def test_a_processor_that_slept_through_its_replacement_cannot_write(
    infra: Settings, control: Role, client: ControlClient
) -> None:
    made = app("first")
    await client.submit([command(made, actor="test")])
    control.send(signal.SIGSTOP)
    successor = Role(infra, f"control-{uuid.uuid4().hex[:6]}")
    await successor.start()
    try:
        async with control_client(infra, timeout=60) as patient:
            await patient.submit([command(msgspec.structs.replace(made, name="second"), actor="test")])
        control.send(signal.SIGCONT)
        async with control_client(infra, timeout=60) as patient:
            await patient.submit([command(msgspec.structs.replace(made, name="third"), actor="test")])
        assert (await client.read()).apps[made.id].name == "third"
        assert ControlState.of((await replay_control(infra, TOPICS)).records).apps[made.id].name == "third"
    finally:
        await successor.kill()
        await control.kill()
        await control.start()


async def test_a_rebuild_remembers_idempotent_requests_of_the_last_day(
    infra: Settings, control: Role, redis: Redis
) -> None:
    tenant, now = f"t-{uuid.uuid4().hex[:8]}", time.time_ns() // 1_000_000
    body = b'{"model":"m","messages":[]}'
    digest = hashlib.sha256(body).hexdigest()
    keyed = Envelope(uuid.uuid4().hex, "/test", now, tenant, "k", 3, digest, 60.0, 30, "order-1")
    plain = msgspec.structs.replace(keyed, request_id=uuid.uuid4().hex, idempotency_key=None)
    async with Producer(infra.kafka_bootstrap, "test") as producer:
        for envelope in (keyed, plain):
            await producer.send(REQUESTS.name, body, key=envelope.request_id, headers=envelope.headers())
        await producer.send(REQUESTS.name, b"no envelope")
    assert (await rebuild(infra))["idempotency"] >= 1
    name = f"hr:idem:{tenant}:{keyed.request_id}"
    assert [key.decode() for key in await redis.keys(f"hr:idem:{tenant}:*")] == [name]
    held = msgspec.json.decode(await redis.get(name))
    assert held == {"digest": digest, "reply_partition": 3, "created_ms": now, "state": "accepted"}
    assert 86_000 < await redis.ttl(name) <= 86_400
    await redis.set(name, b"newer")
    await rebuild(infra)
    assert await redis.get(name) == b"newer"


async def test_names_move_between_models_in_one_apply(infra: Settings, registry: Registry) -> None:
    text = """
[[providers]]
name = "local"
kind = "llama_cpp"
[[models]]
id = "a"
provider = "local"
backend_tag = "t"
aliases = ["{}"]
[[models]]
id = "b"
provider = "local"
backend_tag = "t"
aliases = ["{}"]
"""
    await apply_config(infra, parse_config(text.format("x", "y")), admin_key=ADMIN)
    await apply_config(infra, parse_config(text.format("y", "x")), admin_key=ADMIN)

    async def moved() -> bool:
        found = [registry.snapshot.resolve(name) for name in ("x", "y")]
        return [model.id if model is not None else None for model in found] == ["b", "a"]

    await until(moved, within=1)
    assert registry.snapshot.resolve("smollm2") is None
    await apply_config(infra, default_config(), admin_key=ADMIN)
