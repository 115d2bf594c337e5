"""The generation agent: reads `worker.<id>.commands`, and tells its scheduler every second what it holds and runs."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import structlog
import uuid_utils
from aiokafka.errors import KafkaError

from headrace.errors import Unavailable
from headrace.redis_client import connect
from headrace.registry import Registry
from headrace.settings import Settings
from processors.generation.bodies import Bodies
from processors.generation.cards import Cards
from processors.generation.frames_out import FrameWriter
from processors.generation.memory import Memory
from processors.generation.providers.factory import make_provider
from processors.generation.worker import Worker
from schemas.control import Model
from schemas.events import Command, ModelCard
from topics.agents import AgentRole, Message
from topics.catalogue import MODEL_FACTS, WORKER_STATUS, worker_commands
from topics.clients import Producer
from topics.dead_letters import bury
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)

HEARTBEAT_S = 0.5
LOOK_S = 1.0
DESCRIBE_S = 2.0
FAREWELL_S = 3.0
_command: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)


class Role:
    """The worker between its command topic and its heartbeats."""

    def __init__(self, settings: Settings, producer: Producer, registry: Registry) -> None:
        self._settings = settings
        self._producer = producer
        self._registry = registry
        topic = worker_commands(settings.worker_id)
        self.agent = AgentRole(settings, "worker", topic, self.handle, group=f"headrace-worker-{settings.worker_id}")
        self.bodies = Bodies(settings.kafka)
        memory = Memory(settings)
        self.cards = Cards(settings.worker_id, self._tell, memory.forget, now_ms)
        self.worker = Worker(
            settings.worker_id,
            settings.pool,
            uuid_utils.uuid7().hex,
            make_provider,
            memory,
            FrameWriter(producer, self.agent.fail),
            Outcomes(producer, "worker", settings.instance),
            self.bodies,
            self.agent.fail,
        )

    async def handle(self, batch: list[Message]) -> None:
        """Obey a batch of commands."""
        for message in batch:
            try:
                command = _command.decode(message.value or b"")
            except msgspec.MsgspecError as error:
                await bury(self._producer, message, reason=str(error), role="worker")
                continue
            await self.worker.obey(command)

    async def heartbeat(self) -> None:
        """Report at each change and twice a second, for ever. Raises `KafkaError`."""
        while True:
            self.worker.changed.clear()
            await self._report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.worker.changed.wait(), HEARTBEAT_S)

    async def farewell(self) -> None:
        """Say that this process has left, once it obeys nobody: its requests go on elsewhere before it is missed."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._report(left=True)
        except (KafkaError, TimeoutError) as error:
            log.warning("left_without_farewell", error=repr(error))

    async def _report(self, *, left: bool = False) -> None:
        status = self.worker.status()
        status.left = left
        await self._producer.send(WORKER_STATUS.name, msgspec.json.encode(status), key=self._settings.worker_id)

    async def describe(self) -> None:
        """Tell what the models are, at each change, for ever. Raises `KafkaError`."""
        while True:
            with contextlib.suppress(Unavailable):
                await self.cards.look(self.worker.served, self._models(), self.worker.loads())
            await asyncio.sleep(DESCRIBE_S)

    async def _tell(self, model: str, card: ModelCard | None) -> None:
        value = msgspec.json.encode(card) if card is not None else None
        await self._producer.send(MODEL_FACTS.name, value, key=f"{self._settings.worker_id}/{model}")

    def _models(self) -> list[Model]:
        """The models of the pool. Raises `Unavailable` while the registry is not known."""
        return [one for one in self._registry.snapshot.models.values() if one.pool == self._settings.pool]

    async def watch(self) -> None:
        """Follow the registry, and look at the memory each second, for ever."""
        wanted = {name.strip() for name in self._settings.worker_providers.split(",")}
        while True:
            with contextlib.suppress(Unavailable):
                known = self._registry.snapshot
                served = [one for name, one in known.providers.items() if "*" in wanted or name in wanted]
                before = self.worker.providers
                await self.worker.follow(served, self._models())
                if self.worker.providers != before:
                    self.worker.changed.set()
            await asyncio.sleep(LOOK_S)


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life: on a wish to stop it takes no more work, lets running answers end, then leaves."""
    client = connect(settings.redis_url)
    registry = Registry(client)
    async with Producer(settings.kafka, settings.instance) as producer:
        await registry.start()
        role = Role(settings, producer, registry)
        beside = [asyncio.create_task(role.heartbeat()), asyncio.create_task(role.watch())]
        beside.append(asyncio.create_task(role.describe()))
        for task in beside:
            task.add_done_callback(
                lambda done: None if done.cancelled() else role.agent.fail(done.exception() or RuntimeError("ended"))
            )
        drained = asyncio.Event()
        leaving = asyncio.create_task(_drain_first(stop, role.worker, settings.drain_timeout, drained))
        try:
            await role.agent.run(drained)
        finally:
            leaving.cancel()
            if not drained.is_set():
                await role.worker.drain(0)
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, leaving, return_exceptions=True)
            if stop.is_set():  # Whoever fails is missed: what makes workers fail must not be handed on for ever.
                await role.farewell()
            await role.bodies.close()
            await registry.stop()
            await client.aclose()


async def _drain_first(stop: asyncio.Event, worker: Worker, timeout_s: float, drained: asyncio.Event) -> None:
    await stop.wait()
    worker.begin_stop()
    try:
        await worker.drain(timeout_s)
    finally:
        drained.set()
