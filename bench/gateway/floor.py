"""The floor under every figure: one plain aiokafka hop, produce to consume, on the broker that the stack uses.

`python -m bench.gateway.floor --bootstrap HOST:PORT` prints its distribution as JSON. Headrace's way has several such
hops, so its added time is judged in multiples of this, measured in the same run.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Annotated

import msgspec
import typer
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.gateway.figures import Percentiles, percentiles

PAYLOAD = b"x" * 512
"""About the size of a small request."""
WARM_UP = 30
"""Hops before the first that counts."""


async def hops(bootstrap: str, count: int, pause: float) -> Percentiles:
    """Send `count` records one after another (acks=all, linger 0) and time each from send to receipt.

    `pause` is the time in seconds between two of them. Works on a topic of its own, which it deletes.
    """
    topic = f"bench.floor.{uuid.uuid4().hex}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name=topic, num_partitions=1, replication_factor=1)])
        try:
            return percentiles(await _measure(bootstrap, topic, count, pause))
        finally:
            await admin.delete_topics([topic])
    finally:
        await admin.close()


async def _measure(bootstrap: str, topic: str, count: int, pause: float) -> list[int]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=0)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await producer.start()
    await consumer.start()
    consumer.assign([TopicPartition(topic, 0)])
    times: list[int] = []
    try:
        for number in range(WARM_UP + count):
            await asyncio.sleep(pause)
            started = time.monotonic_ns()
            acknowledged = await producer.send(topic, PAYLOAD, partition=0)
            await asyncio.wait_for(consumer.getone(), 10.0)
            if number >= WARM_UP:
                times.append(time.monotonic_ns() - started)
            await acknowledged
    finally:
        await consumer.stop()
        await producer.stop()
    return times


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bootstrap: Annotated[str, typer.Option(help="Kafka's `host:port`.")],
    count: int = 500,
    pause_ms: Annotated[float, typer.Option(help="Milliseconds between two hops.")] = 3.0,
) -> None:
    """Measure one produce-to-consume hop; print its distribution in milliseconds as JSON."""
    print(msgspec.json.encode(uvloop.run(hops(bootstrap, count, pause_ms / 1000))).decode())


if __name__ == "__main__":
    app()
