"""How a role tells of a request: lifecycle events, and the terminal with its frame in the right order."""

from __future__ import annotations

import time

import msgspec

from headrace import metrics
from schemas.events import NOTHING, LifecycleEvent, Stage, Terminal
from topics import frames, request_log
from topics.catalogue import EVENTS, LOG, frames_at
from topics.clients import Producer


def now_ms() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


class Outcomes:
    """Writes events and terminals for one role."""

    def __init__(self, producer: Producer, role: str, instance: str) -> None:
        self._producer = producer
        self._role = role
        self._instance = instance

    def event(
        self,
        request_id: str,
        tenant: str,
        stage: Stage,
        *,
        at_ms: int | None = None,
        attempt: int = 1,
        epoch: int = 0,
        detail: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        """Tell of a step. It decides nothing, so nobody waits for it."""
        event = LifecycleEvent(
            request_id=request_id,
            tenant=tenant,
            stage=stage,
            at_ms=now_ms() if at_ms is None else at_ms,
            role=self._role,
            instance=self._instance,
            attempt=attempt,
            epoch=epoch,
            detail=detail or {},
        )
        self._producer.post_later(EVENTS.name, msgspec.json.encode(event), key=request_id)

    async def terminal(self, terminal: Terminal) -> int:
        """Write a terminal to the request log, wait until it is durable, and return its offset.

        Raises `KafkaError` when it could not be written.
        """
        written = await self._producer.send(
            LOG.name,
            msgspec.json.encode(terminal),
            key=terminal.request_id,
            headers=[(request_log.KIND_HEADER, b"terminal")],
        )
        metrics.TERMINALS.labels(role=self._role, status=terminal.status).inc()
        self.event(
            terminal.request_id,
            terminal.tenant,
            Stage.TERMINAL,
            attempt=terminal.attempt,
            epoch=terminal.epoch,
            detail={"status": terminal.status.value},
        )
        return int(written.offset)

    async def terminal_frame(self, terminal: Terminal, *, attempt: int | None = None) -> None:
        """Tell the caller's ingress of a terminal that is already in the log."""
        record = frames.encode([terminal_delta(terminal, attempt or terminal.attempt)])
        topic, partition = frames_at(terminal.reply_partition)
        await self._producer.send(topic.name, record, partition=partition)

    async def end(self, terminal: Terminal) -> None:
        """Write a terminal, then its frame: what the caller sees as the end is durable."""
        await self.terminal(terminal)
        await self.terminal_frame(terminal)


def terminal_delta(terminal: Terminal, attempt: int) -> frames.Delta:
    """The frame of a terminal; a streamed answer is not repeated in it, its caller had it piece by piece."""
    told = msgspec.structs.replace(terminal, choices=NOTHING) if terminal.stream else terminal
    return frames.Delta(
        rid=bytes.fromhex(terminal.request_id),
        attempt=attempt,
        seq=terminal.last_seq + 1,
        kind=frames.Kind.TERMINAL,
        index=0,
        data=msgspec.json.encode(told).decode(),
    )
