"""What models are, cached in Redis: a projection of `model.facts`, and what of it does not go with a model's record.

Keys: the hash `hr:facts` (worker/model -> JSON card) and `hr:facts:next`, the offset up to which the topic is in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import msgspec
import structlog
from aiokafka.errors import KafkaError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.errors import Unavailable
from headrace.redis_client import connect
from headrace.settings import Settings
from schemas.control import CHAT, TOOLS, VISION, Model
from schemas.events import ModelCard
from topics.catalogue import MODEL_FACTS
from topics.clients import LogReader
from topics.cluster import Cluster

log = structlog.get_logger(__name__)

CARDS, NEXT = "hr:facts", "hr:facts:next"
POLL_MS = 1000
AGAIN_S = 1.0
KNOWN_TIMEOUT_S = 2.0
_AWAY = (RedisError, OSError, KafkaError, Unavailable)
_card = msgspec.json.Decoder(ModelCard)


# --- what it is good for ------------------------------------------------------------------------------------------


def newest(cards: Iterable[ModelCard], models: Mapping[str, Model]) -> dict[str, ModelCard]:
    """Model id -> the card that was told last of the backend that its record names; none of backends of before."""
    found: dict[str, ModelCard] = {}
    for card in sorted(cards, key=lambda card: card.at_ms):
        model = models.get(card.model)
        if model is not None and (model.provider, model.backend_tag) == (card.provider, card.backend_tag):
            found[card.model] = card
    return found


def warnings(model: Model, card: ModelCard | None) -> list[str]:
    """What a model's record says that the model itself does not bear out, each as a sentence that says what to do."""
    if card is None:
        return []
    found = []
    if 0 < card.context_length < model.context_length:
        found.append(
            f"context_length is {model.context_length}, more than the {card.context_length} tokens of the model itself:"
            " lower it"
        )
    if not card.architecture:
        return found  # Its provider tells no more than that.
    doubtful = [name for name in (CHAT, TOOLS, VISION) if name in model.capabilities and name not in card.capabilities]
    return found + [
        f"capabilities has {name!r}, which {_lacks(name, card)}: remove it, or serve another model" for name in doubtful
    ]


def _lacks(capability: str, card: ModelCard) -> str:
    if capability == VISION:
        return "its provider does not serve with it"
    return "its chat template does not offer" if card.chat_template else "it has no chat template for"


# --- the projection -----------------------------------------------------------------------------------------------


class FactsCache:
    """Reads and writes the projection. All calls but `known` raise `RedisError`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def cards(self) -> list[ModelCard]:
        """Everything that is known of models."""
        return [_card.decode(raw) for raw in await self._redis.hvals(CARDS)]

    async def known(self) -> list[ModelCard]:
        """The same, and nothing while Redis does not answer: nobody waits, or fails, for want of cards."""
        try:
            async with asyncio.timeout(KNOWN_TIMEOUT_S):
                return await self.cards()
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("facts_unread", error=repr(error))
            return []

    async def next(self) -> int | None:
        """Offset up to which the topic is in it; None when it is not there."""
        raw = await self._redis.get(NEXT)
        return int(raw) if raw is not None else None

    async def replace(self, cards: Mapping[str, bytes], next_offset: int) -> None:
        """Put a whole projection into force, in one atomic step."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(CARDS)
            if cards:
                pipe.hset(CARDS, mapping=dict(cards.items()))
            pipe.set(NEXT, next_offset)
            await pipe.execute()

    async def apply(self, key: str, value: bytes | None, offset: int) -> None:
        """Put one record into force; None deletes it. Doing so twice changes nothing."""
        async with self._redis.pipeline(transaction=True) as pipe:
            if value is None:
                pipe.hdel(CARDS, key)
            else:
                pipe.hset(CARDS, key, value)
            pipe.set(NEXT, offset + 1)
            await pipe.execute()


async def read_cards(settings: Settings) -> list[ModelCard]:
    """What is known of models, for who has no connection to Redis; nothing while that does not answer."""
    redis = connect(settings.redis_url)
    try:
        return await FactsCache(redis).known()
    finally:
        await redis.aclose()


async def rebuild_facts(cluster: Cluster, client_id: str, cache: FactsCache) -> int:
    """Fill the projection anew from Kafka; how many cards it has. Raises `KafkaError` or `RedisError`."""
    async with LogReader(cluster, client_id) as reader:
        cards, _ = await _restored(reader, cache)
    return len(cards)


async def keep_facts(cluster: Cluster, client_id: str, redis: Redis) -> None:
    """Keep the projection like the topic, for ever; one that is lost or older is filled anew."""
    cache = FactsCache(redis)
    while True:
        try:
            async with LogReader(cluster, client_id, max_wait_ms=POLL_MS) as reader:
                await _follow(reader, cache)
        except _AWAY as error:
            log.warning("facts_not_followed", error=repr(error))
        await asyncio.sleep(AGAIN_S)


async def _follow(reader: LogReader, cache: FactsCache) -> None:
    """Fill the projection and keep it; returns when it is found to be older than what was written to it."""
    _, position = await _restored(reader, cache)
    while True:
        held = await cache.next()
        if held is None or held < position:
            log.warning("facts_lost", held=held, position=position)
            return
        for records in (await reader.consumer.getmany(timeout_ms=POLL_MS)).values():
            for record in records:
                if record.value is None or _readable(record.value, record.offset):
                    await cache.apply((record.key or b"").decode(), record.value, record.offset)
                    position = record.offset + 1


async def _restored(reader: LogReader, cache: FactsCache) -> tuple[dict[str, bytes], int]:
    """Fill the projection from the whole topic; what is in it, and the offset up to which that goes."""
    assignment = reader.assign([MODEL_FACTS])
    await reader.consumer.seek_to_beginning(*assignment)
    cards: dict[str, bytes] = {}
    async for record in reader.read_to_end(assignment):
        key = (record.key or b"").decode()
        if record.value is None:
            cards.pop(key, None)
        elif _readable(record.value, record.offset):
            cards[key] = record.value
    position = int(await reader.position(assignment[0]))
    await cache.replace(cards, position)
    return cards, position


def _readable(value: bytes, offset: int) -> bool:
    try:
        _card.decode(value)
    except msgspec.MsgspecError as error:
        log.error("unreadable", topic=MODEL_FACTS.name, offset=offset, error=str(error))
        return False
    return True
