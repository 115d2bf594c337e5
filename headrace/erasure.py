"""Content that was erased: whether a request's is, how it is said, and when Kafka's own copies are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.errors import HeadraceError, InvalidRequest, Unavailable
from headrace.projection import Projection
from schemas.control import APP, KEY, REQUEST, Erasure
from schemas.ids import normalise_request_id
from topics.catalogue import (
    DAY_MS,
    DEAD_LETTERS,
    HOUR_MS,
    LOG,
    PUBLISHED,
    REPLIES,
    REQUESTS,
    ROUTED,
    Topic,
    answers_of,
    worker_commands,
)

CONTENT: tuple[Topic, ...] = (
    REQUESTS, ROUTED, worker_commands("*"), REPLIES, PUBLISHED, LOG, answers_of("*"), DEAD_LETTERS,
)  # fmt: skip
"""The topics that hold what was asked and answered. Kafka cannot take single records out of them."""
SWEEP_MS = 10 * 60_000
"""How much later than it could, a broker looks for what it may delete, and deletes it."""
RUNNING_MS = HOUR_MS
"""Requests that run when an erasure is asked for have ended and been written by then."""

PROJECTIONS = ("clickhouse",)
"""Those that say when they hold none of it any more. What is asked of the API is refused from the first moment on."""

Erasures = Mapping[str, Erasure]
"""By subject."""


class Erased(HeadraceError):
    """The content was erased, and nobody can read it any more."""

    status = 410
    code = "erased"
    type = "invalid_request_error"

    def __init__(self) -> None:
        super().__init__("The content of this request was erased.")


def subjects(tenant: str, request_id: str, key_id: str) -> list[str]:
    """The subjects whose erasure is one of this request; what is not known is empty."""
    named = ((REQUEST, request_id), (APP, tenant), (KEY, key_id))
    return [f"{kind}/{name}" for kind, name in named if name]


def subject(kind: str, name: str) -> str:
    """The subject that somebody names. Raises `InvalidRequest` when it is no request's id."""
    if kind == REQUEST:
        found = normalise_request_id(name)
        if found is None:
            raise InvalidRequest(f"{name!r} is no request id.", param="request")
        name = found
    return f"{kind}/{name}"


def erased_by(found: Iterable[Erasure], accepted_ms: int) -> Erasure | None:
    """Which of the erasures of a request's subjects means it; `accepted_ms` is when it was accepted."""
    return next((erasure for erasure in found if erasure.covers(accepted_ms)), None)


def gone_ms(asked_ms: int) -> dict[str, int]:
    """By topic, when Kafka holds no copy any more of what had been accepted at `asked_ms` (Unix ms).

    A segment is deleted when its newest record is older than the retention, so that its oldest may be older by as much
    as a segment may last.
    """
    gone = {}
    for topic in CONTENT:
        kept = (topic.retention_ms or 0) + int(topic.config()["segment.ms"])
        gone[topic.name] = asked_ms + RUNNING_MS + kept + SWEEP_MS
    return gone


def longest_days() -> int:
    """After how many days the last of Kafka's copies is gone."""
    return -(-max(gone_ms(0).values()) // DAY_MS)


class ErasureBook:
    """The erasures in force, asked of Redis each time: one holds from the moment that it is confirmed."""

    def __init__(self, redis: Redis) -> None:
        self._projection = Projection(redis)

    async def check(self, tenant: str, request_id: str, key_id: str, accepted_ms: int) -> None:
        """Raises `Erased` when the content of this request is erased, `Unavailable` while that is not known."""
        found = await self._some(subjects(tenant, request_id, key_id))
        if erased_by(found, accepted_ms) is not None:
            raise Erased

    async def of_keys(self, accepted_ms: int) -> bool:
        """Whether any key's content is erased that was accepted then, so that the sender is to be known."""
        return any(found.kind == KEY and found.covers(accepted_ms) for found in await self.all())

    async def all(self) -> list[Erasure]:
        """All erasures, the newest first. Raises `Unavailable`."""
        try:
            raw = await self._projection.records("erasures")
        except (RedisError, OSError) as error:
            raise Unavailable("What is erased is not known now (Redis does not answer).") from error
        found = [msgspec.json.decode(one, type=Erasure) for one in raw]
        return sorted(found, key=lambda erasure: (-erasure.asked_ms, erasure.subject))

    async def _some(self, names: list[str]) -> list[Erasure]:
        try:
            raw = await self._projection.some("erasures", names)
        except (RedisError, OSError) as error:
            raise Unavailable("What is erased is not known now (Redis does not answer).") from error
        return [msgspec.json.decode(one, type=Erasure) for one in raw]
