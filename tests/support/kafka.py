"""Looking into topics, and writing what no producer of ours would."""

from __future__ import annotations

from headrace.settings import Settings
from topics.catalogue import Topic
from topics.clients import LogReader
from topics.record import Record


async def end_offsets(conf: Settings, topic: Topic) -> dict[int, int]:
    """The end offset of every partition."""
    async with LogReader(conf.kafka, "test") as reader:
        ends = await reader.consumer.end_offsets(reader.assign([topic]))
        return {tp.partition: end for tp, end in ends.items()}


async def records(conf: Settings, topic: Topic, since: dict[int, int] | None = None) -> list[Record]:
    """All records of a topic, or those from the given offsets on."""
    async with LogReader(conf.kafka, "test", max_wait_ms=100) as reader:
        assignment = reader.assign([topic])
        if since is None:
            await reader.consumer.seek_to_beginning(*assignment)
        else:
            for tp in assignment:
                reader.consumer.seek(tp, since[tp.partition])
        return [record async for record in reader.read_to_end(assignment)]
