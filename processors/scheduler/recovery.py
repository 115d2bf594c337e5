"""Frames of the dead: what a lost attempt had sent, read up to the fence that ends its say."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import structlog
from aiokafka import TopicPartition

from headrace import metrics
from headrace.errors import WorkerLost
from processors.scheduler.messages import Recover
from processors.scheduler.tails import Tails
from schemas.events import NOTHING, AttemptOpened, ErrorInfo, Routed, Stage, Status, Terminal, Timings, Usage
from topics import frames, request_log
from topics.catalogue import LOG, REPLIES
from topics.clients import LogReader, Producer
from topics.cluster import Cluster
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Sent:
    """What callers may have seen of a request."""

    last_seq: int = 0
    tokens: int = 0
    texts: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    structured: bool = False
    """Whether something other than plain text was sent (tool deltas, logprobs)."""

    @property
    def empty(self) -> bool:
        """Whether nothing was sent, so that another attempt may start from the beginning."""
        return self.last_seq == 0

    def choices(self) -> bytes:
        """The text so far in the shape of OpenAI's `choices`, cut where the worker was lost."""
        return msgspec.json.encode(
            [
                {"index": index, "message": {"role": "assistant", "content": "".join(parts)}, "finish_reason": None}
                for index, parts in sorted(self.texts.items())
            ]
        )


async def sent_frames(cluster: Cluster, partition: int, wanted: dict[str, int], since_ms: int) -> dict[str, Sent]:
    """What each request of `wanted` (id -> offset of its fence) had sent on a reply partition, in one pass.

    Frames before the fence count, later ones do not. `since_ms` (Unix ms) is when the oldest of them was accepted.
    """
    found = {bytes.fromhex(request_id): Sent() for request_id in wanted}
    views = {rid: frames.StreamView() for rid in found}
    fences = {bytes.fromhex(request_id): offset for request_id, offset in wanted.items()}
    tp = TopicPartition(REPLIES.name, partition)
    async with LogReader(cluster, "scheduler-recovery") as reader:
        reader.assign([REPLIES], [partition])
        await reader.seek_to_time([tp], since_ms)
        async for record in reader.read_to_end([tp]):
            try:
                deltas = frames.decode(record.value or b"")
            except msgspec.MsgspecError:
                log.error("unreadable", topic=REPLIES.name, partition=partition, offset=record.offset)
                continue
            for delta in deltas:
                view = views.get(delta.rid)
                if view is not None and record.offset < fences[delta.rid] and view.accept(delta):
                    _add(found[delta.rid], delta)
    return {rid.hex(): sent for rid, sent in found.items()}


def _add(sent: Sent, delta: frames.Delta) -> None:
    sent.last_seq = delta.seq
    sent.tokens += delta.tokens
    if delta.kind == frames.Kind.TEXT:
        sent.texts[delta.index].append(delta.data)
    elif delta.kind == frames.Kind.CHOICES:
        sent.structured = True


class Recovery:
    """Settles requests whose worker was lost: another attempt where nothing was sent, a clear failure where it was."""

    def __init__(self, cluster: Cluster, producer: Producer, outcomes: Outcomes, tails: Tails) -> None:
        self._cluster = cluster
        self._producer = producer
        self._outcomes = outcomes
        self._tails = tails

    async def settle(self, lost: Sequence[tuple[Recover, Routed]]) -> list[tuple[str, int]]:
        """Settle what is lost; returns the (request id, attempt) that may be assigned again.

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
        again: list[tuple[str, int]] = []
        for action, routed in lost:
            if routed.request_id not in sent:
                continue
            attempt, seen = attempts[routed.request_id], sent[routed.request_id]
            if seen.empty and action.may_retry:
                metrics.ATTEMPTS_LOST.labels(outcome="retried").inc()
                again.append((routed.request_id, attempt))
            else:
                metrics.ATTEMPTS_LOST.labels(outcome="failed").inc()
                await self._give_up(action, routed, attempt, seen)
        return again

    async def _open_attempts(self, lost: Sequence[tuple[Recover, Routed]]) -> dict[str, int]:
        """Open the next attempt of each, and read the log past the openings: who has a terminal by then is done."""
        attempts: dict[str, int] = {}
        waits = []
        for action, routed in lost:
            request_id, running = routed.request_id, action.running
            attempt = max(running.request.attempt, self._tails.view.attempts(request_id)) + 1
            attempts[request_id] = attempt
            reason = f"worker {running.worker} was lost"
            opened = AttemptOpened(request_id, routed.tenant, attempt, 0, "", reason, now_ms())
            headers = [(request_log.KIND_HEADER, b"attempt_opened")]
            waits.append(
                await self._producer.post(LOG.name, msgspec.json.encode(opened), key=request_id, headers=headers)
            )
            self._outcomes.event(
                request_id, routed.tenant, Stage.ATTEMPT_LOST, attempt=attempt - 1, detail={"worker": running.worker}
            )
        positions: dict[TopicPartition, int] = {}
        for written in await asyncio.gather(*waits):
            tp = TopicPartition(LOG.name, written.partition)
            positions[tp] = max(positions.get(tp, 0), written.offset + 1)
        await self._tails.reached(positions)
        return {found: attempt for found, attempt in attempts.items() if not self._tails.view.decided(found)}

    async def _fence(self, requests: Sequence[tuple[Routed, int]]) -> dict[str, int]:
        """Append each request's fence to its reply partition; returns the fences' offsets."""
        waits = []
        for routed, attempt in requests:
            fence = frames.Delta(bytes.fromhex(routed.request_id), attempt, 0, frames.Kind.FENCE, 0, "")
            record = frames.encode([fence])
            waits.append(await self._producer.post(REPLIES.name, record, partition=routed.reply_partition))
        written = await asyncio.gather(*waits)
        return {routed.request_id: at.offset for (routed, _), at in zip(requests, written, strict=True)}

    async def _give_up(self, action: Recover, routed: Routed, attempt: int, sent: Sent) -> None:
        """End a request that cannot be generated again: what was sent is metered, the caller is told."""
        running = action.running
        status, error = (
            Status.FAILED,
            WorkerLost(
                "The worker died while it generated this answer; what was sent is all there is. Send the request again."
            ).info(),
        )
        if running.cancel_asked:
            status, error = Status.CANCELLED, ErrorInfo(499, "cancelled", "The caller left.")
        usage = Usage(completion_tokens=sent.tokens, estimated=True)
        if not sent.empty:
            usage.prompt_tokens = routed.prompt_tokens_estimate
        await self._outcomes.end(
            Terminal(
                request_id=routed.request_id,
                tenant=routed.tenant,
                attempt=attempt,
                epoch=running.epoch,
                status=status,
                key_id=routed.key_id,
                model=routed.model,
                alias=routed.alias,
                pool=routed.pool,
                worker=running.worker,
                stream=routed.stream,
                reply_partition=routed.reply_partition,
                usage=usage,
                error=error,
                choices=msgspec.Raw(sent.choices()) if sent.texts else NOTHING,
                timings=Timings(accepted_ms=routed.accepted_ms, routed_ms=routed.routed_ms, finished_ms=now_ms()),
                price=routed.price,
                last_seq=sent.last_seq,
            )
        )
