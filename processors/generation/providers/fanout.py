"""Several choices from an engine that makes one: `n` generations side by side, merged into one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

import msgspec

from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from schemas.events import Usage

_QUEUE_BATCHES = 4
"""Batches a choice may be ahead of the reader."""


async def fan_out(streams: Sequence[AsyncGenerator[list[Piece], None]]) -> AsyncGenerator[list[Piece], None]:
    """Merge one stream a choice, in choice order; the prompt is counted once, as OpenAI counts it.

    The first failure ends all others and is raised. Closing ends them all.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for batch in only:
                yield batch
        return
    queue: asyncio.Queue[tuple[int, list[Piece]] | BaseException] = asyncio.Queue(_QUEUE_BATCHES * len(streams))

    async def pump(index: int, stream: AsyncGenerator[list[Piece], None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for batch in stream:
                    await queue.put((index, batch))
        except Exception as problem:
            await queue.put(problem)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    ends: dict[int, Done] = {}
    try:
        while len(ends) < len(streams):
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            index, batch = item
            if isinstance(end := batch[-1], Done):
                ends[index] = end
            merged = [_renumbered(piece, index) for piece in batch if not isinstance(piece, Done)]
            if len(ends) == len(streams):
                merged.append(_whole([ends[number] for number in range(len(streams))]))
            if merged:
                yield merged
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _renumbered(piece: Piece, index: int) -> Piece:
    if isinstance(piece, Choices):
        choices = msgspec.json.decode(piece.json, type=list[dict[str, object]])
        return Choices(msgspec.json.encode([{**choice, "index": index} for choice in choices]), piece.tokens)
    if isinstance(piece, Text | Finish):
        piece.index = index
    return piece


def _whole(ends: Sequence[Done]) -> Done:
    usages = [end.usage for end in ends if end.usage is not None]
    fingerprint = ends[0].system_fingerprint
    if len(usages) < len(ends):
        return Done(None, fingerprint)
    return Done(
        Usage(
            prompt_tokens=usages[0].prompt_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=usages[0].cached_tokens,
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        ),
        fingerprint,
    )
