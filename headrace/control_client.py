"""Asking the control processor for changes, and waiting until they are in force."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
import uuid_utils
from aiokafka.errors import KafkaError
from redis.exceptions import RedisError

from headrace.errors import HeadraceError, Unavailable
from headrace.projection import EXISTS, PRECONDITION, CommandOutcome, Projection
from headrace.redis_client import connect
from headrace.settings import Settings
from schemas.control import App, ControlCommand, Erasure, Key, Model, Price, Provider, Record, Replay, User
from topics.catalogue import CONTROL_COMMANDS
from topics.clients import Producer

POLL_S = 0.03
_PLANE = ("providers", "models", "apps", "users", "keys")


class CommandsRefused(HeadraceError):
    """The control processor refused one or more commands; the message has a line for each."""

    status = 409
    code = "refused"
    type = "invalid_request_error"


class AlreadyThere(CommandsRefused):
    """What was to be made is there already, and is another."""

    code = "exists"


class PreconditionFailed(HeadraceError):
    """The record was changed since its sender read it."""

    status = 412
    code = "precondition_failed"
    type = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """All records in force, by natural key."""

    providers: dict[str, Provider]
    models: dict[str, Model]
    apps: dict[str, App]
    users: dict[str, User]
    keys: dict[str, Key]


def command(record: Record, *, actor: str, reason: str = "", if_match: str | None = None) -> ControlCommand:
    """A command that puts a record into force, on the condition that `ControlCommand.if_match` tells of."""
    match record:
        case Provider():
            kind, key = "providers", record.name
        case Model():
            kind, key = "models", record.id
        case App():
            kind, key = "apps", record.id
        case User():
            kind, key = "users", record.id
        case Key():
            kind, key = "keys", record.sha256
        case Replay():
            kind, key = "replays", record.letter
        case Erasure():
            kind, key = "erasures", record.subject
    return _command(kind, key, msgspec.Raw(msgspec.json.encode(record)), actor, reason, if_match)


def priced(model_id: str, price: Price, *, actor: str, reason: str = "", if_match: str | None = None) -> ControlCommand:
    """A command that gives a model a price from `price.effective_from_ms` on, 0 meaning now."""
    return _command("prices", model_id, msgspec.Raw(msgspec.json.encode(price)), actor, reason, if_match)


def deletion(kind: str, key: str, *, actor: str, reason: str = "") -> ControlCommand:
    """A command that deletes a record."""
    return _command(kind, key, None, actor, reason, None)


def _command(
    kind: str, key: str, value: msgspec.Raw | None, actor: str, reason: str, if_match: str | None
) -> ControlCommand:
    return ControlCommand(
        id=uuid_utils.uuid7().hex,
        kind=kind,
        key=key,
        value=value,
        actor=actor,
        reason=reason,
        at_ms=time.time_ns() // 1_000_000,
        if_match=if_match,
    )


_REFUSALS: dict[str, type[HeadraceError]] = {PRECONDITION: PreconditionFailed, EXISTS: AlreadyThere}


class ControlClient:
    """Reads the control plane from Redis and changes it through Kafka. `timeout` bounds each wait, in seconds.

    With a `producer` of its maker's it makes none of its own.
    """

    def __init__(
        self, settings: Settings, projection: Projection, *, timeout: float, producer: Producer | None = None
    ) -> None:
        self._settings = settings
        self._projection = projection
        self._timeout = timeout
        self._producer = producer

    async def read(self) -> ControlPlane:
        """All records in force; waits for a projection that is not complete. Raises `Unavailable`."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        while True:
            try:
                raw = {kind: await self._projection.records(kind) for kind in _PLANE}
                break
            except (Unavailable, RedisError, OSError) as error:
                if asyncio.get_running_loop().time() > deadline:
                    why = error.message if isinstance(error, Unavailable) else f"Redis does not answer: {error}"
                    raise Unavailable(
                        f"The control plane could not be read within {self._timeout:g} s. {why}"
                    ) from error
                await asyncio.sleep(POLL_S)
        providers = [msgspec.json.decode(value, type=Provider) for value in raw["providers"]]
        models = [msgspec.json.decode(value, type=Model) for value in raw["models"]]
        apps = [msgspec.json.decode(value, type=App) for value in raw["apps"]]
        users = [msgspec.json.decode(value, type=User) for value in raw["users"]]
        keys = [msgspec.json.decode(value, type=Key) for value in raw["keys"]]
        return ControlPlane(
            providers={record.name: record for record in sorted(providers, key=lambda record: record.name)},
            models={record.id: record for record in sorted(models, key=lambda record: record.id)},
            apps={record.id: record for record in sorted(apps, key=lambda record: record.id)},
            users={record.id: record for record in sorted(users, key=lambda record: record.email)},
            keys={record.sha256: record for record in sorted(keys, key=lambda record: (record.app, record.name))},
        )

    async def some(self, kind: str, keys: Sequence[str]) -> list[bytes]:
        """Those of some records of one kind that are in force, as JSON. Raises `Unavailable`, or `RedisError`."""
        return await self._projection.some(kind, keys)

    async def submit(self, commands: Sequence[ControlCommand]) -> None:
        """Send commands, in order, and return when all are in force.

        Raises `CommandsRefused` with the reasons (`AlreadyThere` or `PreconditionFailed` where that was the first),
        `Unavailable` when it is not known in time what became of them.
        """
        if not commands:
            return
        try:
            async with contextlib.AsyncExitStack() as own:
                producer = self._producer
                if producer is None:
                    name = f"control-client-{self._settings.instance}"
                    producer = await own.enter_async_context(Producer(self._settings.kafka, name))
                for sent in commands:
                    key = f"{sent.kind}/{sent.key}"
                    await producer.send(CONTROL_COMMANDS.name, msgspec.json.encode(sent), key=key)
        except KafkaError as error:
            raise Unavailable(f"Kafka does not take control commands: {error}") from error
        await self._wait_for(commands)

    async def _wait_for(self, commands: Sequence[ControlCommand]) -> None:
        waiting = {sent.id: sent for sent in commands}
        refusals: list[CommandOutcome] = []
        try:
            async with asyncio.timeout(self._timeout):
                while waiting:
                    for sent in list(waiting.values()):
                        outcome = None
                        with contextlib.suppress(RedisError, OSError):  # It may come back before the time is up.
                            outcome = await self._projection.outcome(sent.id)
                        if outcome is None:
                            await asyncio.sleep(POLL_S)
                            break
                        del waiting[sent.id]
                        if outcome.status == "refused":
                            refusals.append(outcome)
        except TimeoutError:
            named = ", ".join(f"{sent.kind}/{sent.key}" for sent in list(waiting.values())[:5])
            raise Unavailable(
                f"{len(waiting)} of {len(commands)} changes were sent but not confirmed within {self._timeout:g} s "
                f"({named}). Is the control role running? They will be in force when it does."
            ) from None
        if refusals:
            raise _REFUSALS.get(refusals[0].code, CommandsRefused)("\n".join(one.reason for one in refusals))


@contextlib.asynccontextmanager
async def control_client(settings: Settings, *, timeout: float = 30.0) -> AsyncIterator[ControlClient]:
    """A client for the length of a `with`."""
    redis = connect(settings.redis_url)
    try:
        yield ControlClient(settings, Projection(redis), timeout=timeout)
    finally:
        await redis.aclose()
