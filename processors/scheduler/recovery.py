"""Settles requests whose worker was lost: they are generated again, go on elsewhere, are complete, or fail clearly."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from aiokafka import TopicPartition

from headrace import metrics
from headrace.errors import WorkerLost
from processors.scheduler.fate import Fate, capped, fate
from processors.scheduler.messages import Recover
from processors.scheduler.sent import Sent, sent_frames
from processors.scheduler.tails import Tails
from processors.scheduler.terminals import assigned_at, terminal_of
from schemas.control import Provider
from schemas.events import AttemptOpened, ErrorInfo, Routed, Stage, Status
from topics import frames, request_log
from topics.catalogue import LOG, frames_at
from topics.clients import Producer
from topics.cluster import Cluster
from topics.outcomes import Outcomes, now_ms


@dataclass(frozen=True, slots=True)
class Again:
    """A request that may be assigned again."""

    request_id: str
    attempt: int
    sent: Sent
    """What the new attempt goes on from; empty where it starts from the beginning."""


class Recovery:
    """Opens attempts, fences the dead, reads what they had sent, and does what `fate` says."""

    def __init__(
        self,
        cluster: Cluster,
        producer: Producer,
        outcomes: Outcomes,
        tails: Tails,
        provider_of: Callable[[str], Provider | None],
        hold: Callable[[], Awaitable[None]],
    ) -> None:
        """`provider_of` gives the provider of a model as the registry has it now; `hold` raises when we may not write.

        Reading takes a while, in which another scheduler may have taken the pool.
        """
        self._cluster = cluster
        self._producer = producer
        self._outcomes = outcomes
        self._tails = tails
        self._provider_of = provider_of
        self._hold = hold

    async def settle(self, lost: Sequence[tuple[Recover, Routed]]) -> list[Again]:
        """Settle what is lost; returns what may be assigned again.

        Idempotent: a scheduler that dies in the middle leaves records that its successor's run builds on.
        """
        attempts = await self._open_attempts(lost)
        fences = await self._fence(
            [(routed, attempts[routed.request_id]) for _, routed in lost if routed.request_id in attempts]
        )
        by_partition: dict[int, list[Routed]] = defaultdict(list)
        for _, routed in lost:
            if routed.request_id in fences:
                by_partition[routed.reply_partition].append(routed)
        sent: dict[str, Sent] = {}
        for partition, requests in by_partition.items():
            wanted = {routed.request_id: fences[routed.request_id] for routed in requests}
            since = min(routed.accepted_ms for routed in requests)
            sent |= await sent_frames(self._cluster, partition, wanted, since)
        await self._hold()
        again: list[Again] = []
        for action, routed in lost:
            if routed.request_id not in sent:
                continue
            attempt, seen = attempts[routed.request_id], sent[routed.request_id]
            decided = fate(action, routed, seen, self._provider_of(routed.model))
            if action.running.worker:  # Else it is not known that anybody had it.
                metrics.ATTEMPTS_LOST.labels(outcome=decided.value).inc()
            match decided:
                case Fate.RETRIED | Fate.CONTINUED:
                    again.append(Again(routed.request_id, attempt, seen))
                case Fate.COMPLETED:
                    await self._complete(action, routed, attempt, seen)
                case Fate.FAILED:
                    await self._give_up(action, routed, attempt, seen)
        return again

    async def _open_attempts(self, lost: Sequence[tuple[Recover, Routed]]) -> dict[str, int]:
        """Open the next attempt of each, and read the log past the openings: who has a terminal by then is done."""
        await self._hold()
        attempts: dict[str, int] = {}
        waits = []
        for action, routed in lost:
            request_id, running = routed.request_id, action.running
            attempt = max(running.request.attempt, self._tails.view.attempts(request_id)) + 1
            attempts[request_id] = attempt
            reason = action.reason or f"worker {running.worker} was lost"
            opened = AttemptOpened(request_id, routed.tenant, attempt, 0, "", reason, now_ms())
            headers = [(request_log.KIND_HEADER, b"attempt_opened")]
            waits.append(
                await self._producer.post(LOG.name, msgspec.json.encode(opened), key=request_id, headers=headers)
            )
            detail: dict[str, str | int | float | bool] = {"worker": running.worker, "reason": reason}
            self._outcomes.event(request_id, routed.tenant, Stage.ATTEMPT_LOST, attempt=attempt - 1, detail=detail)
        positions: dict[TopicPartition, int] = {}
        for written in await asyncio.gather(*waits):
            tp = TopicPartition(LOG.name, written.partition)
            positions[tp] = max(positions.get(tp, 0), written.offset + 1)
        await self._tails.reached(positions)
        return {found: attempt for found, attempt in attempts.items() if not self._tails.view.decided(found)}

    async def _fence(self, requests: Sequence[tuple[Routed, int]]) -> dict[str, int]:
        """Append each request's fence to its reply partition; returns the fences' offsets."""
        await self._hold()
        waits = []
        for routed, attempt in requests:
            fence = frames.Delta(bytes.fromhex(routed.request_id), attempt, 0, frames.Kind.FENCE, 0, "")
            record = frames.encode([fence])
            topic, partition = frames_at(routed.reply_partition)
            waits.append(await self._producer.post(topic.name, record, partition=partition))
        written = await asyncio.gather(*waits)
        return {routed.request_id: at.offset for (routed, _), at in zip(requests, written, strict=True)}

    async def _complete(self, action: Recover, routed: Routed, attempt: int, sent: Sent) -> None:
        """End a request whose answer was sent whole; where the cap ended it, its finish reason is sent first."""
        if capped(routed, sent):
            rid = bytes.fromhex(routed.request_id)
            finish = frames.Delta(rid, attempt, sent.last_seq + 1, frames.Kind.FINISH, 0, "length")
            topic, partition = frames_at(routed.reply_partition)
            await self._producer.send(topic.name, frames.encode([finish]), partition=partition)
            sent.add(finish, now_ms())
        await self._end(action, routed, attempt, Status.COMPLETED, None, sent)

    async def _give_up(self, action: Recover, routed: Routed, attempt: int, sent: Sent) -> None:
        """End a request that cannot be generated again: what was sent is metered, the caller is told."""
        if action.running.cancel_asked:
            left = ErrorInfo(499, "cancelled", "The caller left.")
            await self._end(action, routed, attempt, Status.CANCELLED, left, sent)
            return
        lost = WorkerLost(
            "The worker died or stopped while it generated this answer, which cannot go on elsewhere; what was sent is"
            " all there is. Send the request again."
        )
        await self._end(action, routed, attempt, Status.FAILED, lost.info(), sent)

    async def _end(
        self, action: Recover, routed: Routed, attempt: int, status: Status, error: ErrorInfo | None, sent: Sent
    ) -> None:
        provider, running = self._provider_of(routed.model), action.running
        terminal = terminal_of(
            routed, attempt, status, error, sent=sent, epoch=running.epoch, worker=running.worker,
            provider=provider.name if provider is not None else "", assigned_ms=assigned_at(running),
        )  # fmt: skip
        await self._outcomes.end(terminal)
