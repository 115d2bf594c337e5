"""Faust agents as every role builds them: raw bytes in, batches that are acknowledged only after their outputs are.

Faust commits an event when the agent comes back for the next one, and only logs a failed produce. So an agent here
reads batches, awaits the brokers' acknowledgement of all it writes (through our own idempotent producer), and only
then acknowledges; any failure ends the process, and the events come again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import faust
import structlog
from aiokafka import TopicPartition
from faust.types import EventT, StreamT

from headrace import metrics
from headrace.settings import Settings
from topics.catalogue import MAX_MESSAGE_BYTES, Topic
from topics.clients import LogReader
from topics.faust_driver import credentials, on_own_loop

log = structlog.get_logger(__name__)

SESSION_TIMEOUT_S = 6.0
WATCH_EVERY_S = 10.0
STALLED_AFTER_S = 40.0
MAX_BATCH = 64


class Message:
    """A consumed record, without what only Faust needs: a `topics.record.Record`."""

    __slots__ = ("headers", "key", "offset", "partition", "timestamp", "topic", "value")

    def __init__(self, event: EventT[Any]) -> None:
        raw = event.message
        self.topic: str = raw.topic
        self.partition: int = raw.partition
        self.offset: int = raw.offset
        self.timestamp = round(raw.timestamp * 1000)
        self.key: bytes | None = raw.key
        self.value: bytes | None = raw.value
        headers: Any = raw.headers or ()
        self.headers: Sequence[tuple[str, bytes]] = tuple(headers.items() if isinstance(headers, dict) else headers)

    def header(self, name: str) -> bytes | None:
        """The first header of that name."""
        return next((value for found, value in self.headers if found == name), None)


Handler = Callable[[list[Message]], Awaitable[None]]
OnPartitions = Callable[[frozenset[int]], Awaitable[None]]


class AgentRole:
    """One Faust App with one agent on one topic, run until told to stop or until it fails."""

    def __init__(
        self,
        settings: Settings,
        role: str,
        topic: Topic,
        handler: Handler,
        *,
        group: str | None = None,
        gather_s: float = 0,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """`gather_s` lets more records arrive before a batch is handled, where nobody waits for it."""
        self.settings = settings
        self._max_batch = max_batch
        self._gather_s = gather_s
        self.role = role
        self.topic = topic
        self.handler = handler
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handled: dict[int, int] = {}
        self._on_assigned: list[OnPartitions] = []
        self._on_revoked: list[OnPartitions] = []
        self.app = self._make_app(group or f"headrace-{role}")

    def on_partitions(self, assigned: OnPartitions, revoked: OnPartitions) -> None:
        """Call back with the partition numbers of the topic that this member gained or lost."""
        self._on_assigned.append(assigned)
        self._on_revoked.append(revoked)

    def _make_app(self, group: str) -> faust.App:
        conf = self.settings
        datadir = Path(conf.data_dir) / "faust" / f"{self.role}-{conf.instance}"
        datadir.mkdir(parents=True, exist_ok=True)
        app = on_own_loop(
            faust.App(
                group,
                broker="kafka://" + conf.kafka.bootstrap.replace(",", ";kafka://"),
                broker_credentials=credentials(conf.kafka),
                datadir=datadir,
                store="memory://",
                topic_allow_declare=False,
                topic_disable_leader=True,
                web_enabled=False,
                stream_wait_empty=False,
                stream_buffer_maxsize=2 * self._max_batch,
                broker_commit_interval=0.5,
                broker_session_timeout=SESSION_TIMEOUT_S,
                broker_heartbeat_interval=1.5,
                broker_request_timeout=30.0,
                producer_request_timeout=15.0,
                producer_max_request_size=MAX_MESSAGE_BYTES,
                consumer_max_fetch_size=MAX_MESSAGE_BYTES,
                consumer_auto_offset_reset="earliest",
                consumer_group_instance_id=f"{group}-{conf.instance}",
            )
        )
        source = app.topic(
            self.topic.name,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
        )
        app.agent(source, name=f"headrace.{self.role}", concurrency=1)(self._consume)
        app.on_partitions_assigned.connect(self._assigned)  # type: ignore[arg-type]
        app.on_partitions_revoked.connect(self._revoked)  # type: ignore[arg-type]
        return app

    async def _assigned(self, app: faust.App, partitions: set[Any], **_: object) -> None:
        await self._notify(self._on_assigned, partitions)

    async def _revoked(self, app: faust.App, partitions: set[Any], **_: object) -> None:
        for partition in partitions:
            self._handled.pop(partition.partition, None)
        await self._notify(self._on_revoked, partitions)

    async def _notify(self, listeners: list[OnPartitions], partitions: set[Any]) -> None:
        ours = frozenset(found.partition for found in partitions if found.topic == self.topic.name)
        if ours:
            try:
                for listener in listeners:
                    await listener(ours)
            except Exception as error:
                self.fail(error)

    async def _consume(self, stream: StreamT[bytes]) -> None:
        try:
            await self._drain(stream)
        except asyncio.CancelledError:
            raise
        except StopAsyncIteration:
            return  # the stream was stopped; what was not acknowledged comes again
        except Exception as error:
            # Never return to Faust: it would acknowledge the event that failed.
            self.fail(error)
            await asyncio.Event().wait()

    async def _drain(self, stream: StreamT[bytes]) -> None:
        """Hand over what has arrived, at most `max_batch` at once and without waiting for more."""
        stream.enable_acks = False
        arrived = stream.events().__aiter__()
        queue = stream.channel.queue  # type: ignore[attr-defined]
        while True:
            events = [await arrived.__anext__()]
            if self._gather_s:
                await asyncio.sleep(self._gather_s)
            while len(events) < self._max_batch and not queue.empty():
                events.append(await arrived.__anext__())
            await self.handler([Message(event) for event in events])
            for event in events:
                await stream.ack(event)
                self._handled[event.message.partition] = event.message.offset
            metrics.EVENTS_IN.labels(role=self.role, topic=self.topic.name).inc(len(events))

    def fail(self, error: BaseException) -> None:
        """End the role: `run` raises `error`."""
        if not self._failed.done():
            log.error("agent_failed", role=self.role, topic=self.topic.name, error=repr(error), exc_info=error)
            self._failed.set_exception(error)

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until `stop` is set. Raises what the handler raised, or `RuntimeError` when the consumer stalled."""
        self.app.finalize()
        await self.app.start()
        watch = asyncio.create_task(self._watch())
        stopped = asyncio.create_task(stop.wait())
        ends: set[asyncio.Future[Any]] = {stopped, self._failed, watch}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            if watch.done():
                watch.result()
        finally:
            watch.cancel()
            stopped.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.app.stop(), timeout=5)

    async def _watch(self) -> None:
        """End when a partition of ours has records that stay unread: a consumer can die without a word."""
        since: dict[int, tuple[int, float]] = {}
        clock = asyncio.get_running_loop().time
        async with LogReader(self.settings.kafka, f"{self.role}-watch") as reader:
            while True:
                await asyncio.sleep(WATCH_EVERY_S)
                if self.app.crashed:
                    raise RuntimeError("the Faust app crashed")
                for partition in [tp.partition for tp in self.app.consumer.assignment() if tp.topic == self.topic.name]:
                    handled = self._handled.get(partition, -1)
                    tp = TopicPartition(self.topic.name, partition)
                    end = (await reader.consumer.end_offsets([tp]))[tp]
                    seen, at = since.get(partition, (handled, clock()))
                    if handled != seen or partition not in since or handled < 0 or end <= handled + 1:
                        since[partition] = (handled, clock())
                    elif clock() - at > STALLED_AFTER_S:
                        raise RuntimeError(f"consumer of {self.topic.name}/{partition} stalled at {handled} of {end}")
