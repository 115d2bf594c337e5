"""Terminals that a scheduler writes: of requests that wait, and of those whose worker was lost."""

from __future__ import annotations

from processors.scheduler.sent import Sent
from processors.scheduler.state import Running
from schemas.events import NOTHING, ErrorInfo, Routed, Status, Terminal, Timings, Usage
from topics.outcomes import now_ms


def terminal_of(
    routed: Routed,
    attempt: int,
    status: Status,
    error: ErrorInfo | None = None,
    *,
    sent: Sent | None = None,
    epoch: int = 0,
    worker: str = "",
    provider: str = "",
    assigned_ms: int = 0,
) -> Terminal:
    """The end of a request that no worker ends; what lost attempts had `sent` is its answer, and is metered.

    What was sent had been started when it was assigned (`assigned_ms`, Unix ms), as far as that is known: as with
    answers that workers end, never after its first token.
    """
    usage, choices, last_seq, first_ms = Usage(), NOTHING, 0, 0
    if sent is not None and not sent.empty:
        usage = Usage(prompt_tokens=routed.prompt_tokens_estimate, completion_tokens=sent.tokens, estimated=True)
        choices, last_seq, first_ms = sent.answer.choices(), sent.last_seq, sent.first_ms
    return Terminal(
        request_id=routed.request_id,
        tenant=routed.tenant,
        attempt=attempt,
        epoch=epoch,
        status=status,
        key_id=routed.key_id,
        user_id=routed.user_id,
        model=routed.model,
        alias=routed.alias,
        pool=routed.pool,
        provider=provider,
        worker=worker,
        stream=routed.stream,
        reply_partition=routed.reply_partition,
        usage=usage,
        error=error,
        choices=choices,
        timings=Timings(
            accepted_ms=routed.accepted_ms,
            routed_ms=routed.routed_ms,
            assigned_ms=assigned_ms,
            started_ms=min(assigned_ms or first_ms, first_ms),
            first_token_ms=first_ms,
            finished_ms=now_ms(),
        ),
        price=routed.price,
        last_seq=last_seq,
    )


def assigned_at(running: Running) -> int:
    """When this scheduler assigned an attempt (Unix ms); 0 where no worker has it, or the scheduler before assigned it.

    What is taken over has the time of that as `began_ms`; it is told by never having waited here. A request that waited
    and was then shown by its worker is not told from one that we assigned: it seems to have been assigned when shown.
    """
    return running.began_ms if running.worker and running.request.waiting_ms else 0
