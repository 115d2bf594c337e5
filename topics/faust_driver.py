"""Faust's Kafka driver on the loop of the role, without the thread in which Faust runs its consumer.

Faust keeps the consumer alive beside agents that block. Ours never do, and for them the thread costs a fifth of a
role's CPU (docs/performance.md): each fetch crosses to it and each record back, and every record is raced against three
events in four tasks of its own.
What is inherited from Faust 0.15.3 stays as it is: rebalances, acknowledgements, commits, flow control, gaps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import faust
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import ConsumerStoppedError
from faust.auth import Credentials, SASLCredentials, SSLCredentials
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, Message
from mode.services import Service
from mode.types import ServiceT

from topics.cluster import FETCHER_WAKES_MS, Cluster, pace

YIELD_EVERY = 100
"""Records handed to the stream before the loop runs something else."""


class LoopConsumer(driver.AIOKafkaConsumerThread):
    """What Faust calls the consumer's thread: here a service of the role's own loop."""

    def __init__(self, consumer: driver.Consumer, **kwargs: Any) -> None:
        super().__init__(consumer, thread_loop=asyncio.get_running_loop(), **kwargs)

    def _create_worker_consumer(self, transport: driver.Transport) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        consumer._consumer_timeout = FETCHER_WAKES_MS / 1000  # which Faust does not pass on
        pace(consumer)
        return consumer

    async def start(self) -> None:
        """Connect, and start this service's timers. Raises `KafkaError` when no broker answers."""
        self._thread_started.set()
        await self._default_start()

    async def stop(self) -> None:
        """Leave the group and close."""
        if self._started.is_set() and not self._stopped.is_set():
            self._stopped.set()
            await self._shutdown_thread()

    async def call_thread(self, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `fun`: there is no thread to carry the call to."""
        result = fun(*args, **kwargs)
        return await result if isinstance(result, Awaitable) else result

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """A rebalance takes these partitions."""
        await self.consumer.on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """A rebalance has given these partitions."""
        await self.consumer.on_partitions_assigned(assigned, generation_id)


class Consumer(driver.Consumer):
    """Faust's consumer over `LoopConsumer`."""

    def _new_consumer_thread(self) -> LoopConsumer:
        return LoopConsumer(self, loop=self.loop, beacon=self.beacon)

    async def _drain_messages(self, fetcher: ServiceT) -> None:
        """Hand records to the streams until this consumer or `fetcher` stops."""
        try:
            while not (self._stopped.is_set() or cast(Service, fetcher)._stopped.is_set()):
                # Where there is much to read, a fetch may return without ever waiting.
                await asyncio.sleep(0)
                handed = 0
                async for tp, message in self.getmany(timeout=1.0):
                    handed += 1
                    if handed % YIELD_EVERY == 0:
                        await asyncio.sleep(0)
                    await self._hand_over(tp, message)
        except ConsumerStoppedError:
            if not self.app.should_stop:
                raise

    async def _hand_over(self, tp: TP, message: Message) -> None:
        read = self._read_offset[tp]
        if read is not None and message.offset < read:
            return  # fetched before a seek
        if read and message.offset - read > 1 and self.app.topics.acks_enabled_for(message.topic):
            await self._add_gap(tp, read + 1, message.offset)
        if self.flow_active and not self._buffered_partitions:
            await self.callback(message)
        else:
            # The stream's buffer fills, or a rebalance has begun, and that must not wait until there is room.
            await self.wait_first(self.callback(message), self.suspend_flow.wait())
        self._read_offset[tp] = message.offset


class Transport(driver.Transport):
    """Faust's transport, with the consumer above."""

    Consumer = Consumer


def credentials(cluster: Cluster) -> Credentials | None:
    """What an app is told of how to be let in; None where nobody asks. Raises `AccessRefused` as the cluster does."""
    context = cluster.ssl_context
    if cluster.sasl:
        return SASLCredentials(
            username=cluster.username, password=cluster.password, ssl_context=context, mechanism=cluster.mechanism
        )
    return SSLCredentials(context) if context is not None else None


def on_own_loop(app: faust.App) -> faust.App:
    """Give an app this driver; to be called before its first agent is declared."""
    app.transport = Transport(app.conf.broker_consumer, app)
    return app
