"""The control plane on real Kafka and Valkey: in force, refused, and written by one hand only."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from decimal import Decimal

import msgspec
import pytest
from aiokafka.errors import ProducerFenced

from headrace.api_keys import admin_record, sha256
from headrace.apply import apply_config
from headrace.config import default_config, parse_config
from headrace.control_client import CommandsRefused, ControlClient, command, control_client
from headrace.control_log import end_offsets
from headrace.registry import Registry
from headrace.settings import Settings
from processors.control import writer as writer_module
from processors.control.state import ControlState, Write
from processors.control.writer import TOPICS, Writer
from schemas.control import Model
from tests.support.control import ADMIN, Role, app, kept, letters, until
from topics.apply import apply_all
from topics.catalogue import CONTROL_COMMANDS
from topics.clients import Producer


async def test_what_is_applied_is_in_force_and_a_second_apply_writes_nothing(
    infra: Settings, registry: Registry
) -> None:
    await apply_config(infra, default_config(), admin_key=ADMIN)
    model = registry.snapshot.resolve("gpt-4o-mini")
    assert model is not None
    assert (model.id, model.price.version > 0, model.created > 0) == ("smollm2", True, True)
    key = await registry.key(sha256(ADMIN))
    assert key is not None
    assert (key.role, key.app, key.enabled) == ("owner", "default", True)
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
    both = [f"{name}/1", f"{name}/2"]
    await kept(infra, lambda records: sorted(key for key in records["prices"] if key.startswith(name)) == both)
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
    assert plane.apps[after.id].name == after.name
    assert any(model.id in reason and value is not None for reason, value in await letters(infra))


async def test_a_malformed_command_is_dead_lettered_as_it_was_and_the_next_is_handled(
    infra: Settings, client: ControlClient
) -> None:
    poison = b"\xff not a command " + uuid.uuid4().bytes
    async with Producer(infra.kafka, "test") as producer:
        await producer.send(CONTROL_COMMANDS.name, poison)
    await client.submit([command(app(), actor="test")])
    (reason,) = [reason for reason, value in await letters(infra) if value == poison]
    assert reason.startswith("not a control command")


async def test_a_new_key_and_its_revocation_are_in_force_when_the_sender_is_told(
    client: ControlClient, registry: Registry
) -> None:
    key = msgspec.structs.replace(admin_record(f"hr-{uuid.uuid4().hex}", "default"), id="key-test", role="member")
    assert await registry.key(key.sha256) is None
    await client.submit([command(key, actor="test")])
    filed = await registry.key(key.sha256)
    assert filed is not None and filed == msgspec.structs.replace(key, created=filed.created)
    revoked = msgspec.structs.replace(filed, enabled=False)
    await client.submit([command(revoked, actor="test")])

    async def refused() -> bool:
        return await registry.key(key.sha256) == revoked

    await until(refused, within=5)


async def test_commands_survive_a_killed_processor(infra: Settings, control: Role, client: ControlClient) -> None:
    apps = [app(str(number)) for number in range(200)]
    submitting = asyncio.create_task(client.submit([command(made, actor="test") for made in apps]))

    async def some() -> bool:
        known = (await client.read()).apps
        return any(made.id in known for made in apps)

    await until(some, within=20)
    await control.kill()
    await control.start()
    with contextlib.suppress(Exception):
        await submitting  # Outcomes told before the kill may be gone with it; what was sent is not.

    async def all_there() -> bool:
        return {made.id for made in apps} <= (await client.read()).apps.keys()

    await until(all_there, within=40)
    await kept(infra, lambda records: {made.id for made in apps} <= ControlState.of(records).apps.keys())


async def test_only_the_newest_writer_can_write(infra: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    await apply_all(infra, workers=[])
    monkeypatch.setattr(writer_module, "TRANSACTIONAL_ID", f"test-{uuid.uuid4().hex}")
    old, new = Writer(infra.kafka, "old"), Writer(infra.kafka, "new")
    made = app()
    write = Write("apps", made.id, msgspec.json.encode(made))
    await old.start()
    (first,) = await old.write([write])
    await new.start()
    with pytest.raises(ProducerFenced):
        await old.write([Write("apps", made.id, msgspec.json.encode(app("late")))])
    (second,) = await new.write([Write("apps", made.id, None)])
    assert second > first
    await kept(infra, lambda records: made.id not in records["apps"])
    await new.stop()
    with contextlib.suppress(ProducerFenced):
        await old.stop()


async def test_what_takes_several_batches_is_written_in_order(infra: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "TRANSACTIONAL_ID", f"test-{uuid.uuid4().hex}")
    monkeypatch.setattr(writer_module, "BATCH_BYTES", 4096)
    writer, made = Writer(infra.kafka, "test"), [app(f"app {number}") for number in range(60)]
    await writer.start()
    written = [Write("apps", one.id, msgspec.json.encode(one)) for one in made]
    users = Write("users", "u", None), Write("users", "v", None)
    offsets = await writer.write([users[0], *written[:30], users[1], *written[30:]])
    await writer.stop()
    mine = [*offsets[1:31], *offsets[32:]]
    assert mine == list(range(mine[0], mine[0] + 60)) and offsets[31] == offsets[0] + 1
    await kept(infra, lambda records: {one.id for one in made} <= records["apps"].keys())


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


async def test_a_processor_that_slept_through_its_replacement_cannot_write(
    infra: Settings, control: Role, client: ControlClient
) -> None:
    """The last test here: it leaves no role running."""
    made = app("first")
    await client.submit([command(made, actor="test")])
    control.send(signal.SIGSTOP)
    successor = Role(infra, "control-successor")
    await successor.start()
    try:
        async with control_client(infra, timeout=60) as patient:
            await patient.submit([command(msgspec.structs.replace(made, name="second"), actor="test")])
        control.send(signal.SIGCONT)
        async with control_client(infra, timeout=60) as patient:
            await patient.submit([command(msgspec.structs.replace(made, name="third"), actor="test")])
        assert (await client.read()).apps[made.id].name == "third"
        await kept(infra, lambda records: ControlState.of(records).apps[made.id].name == "third")
    finally:
        await successor.kill()
        await control.kill()
