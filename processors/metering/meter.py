"""From a terminal to a usage event, pure."""

from __future__ import annotations

from decimal import Decimal

from schemas.control import Price
from schemas.events import Terminal, UsageEvent
from schemas.ids import usage_id

_FREE = Price(version=0, input=Decimal(0), output=Decimal(0), cached=Decimal(0))


def usage_of(terminal: Terminal) -> UsageEvent:
    """What a request cost, under an id that is the same however often it is computed.

    The price is the one in force when the request was routed. `queue_ms` is from acceptance to the start of the
    generation, `ttft_ms` from acceptance to the first token, `generation_ms` from start to end; 0 where a hop was
    not reached. Where the worker was lost, the start is the assignment, or the first token where that is not known,
    and `load_ms` is 0.
    """
    usage, timings, price = terminal.usage, terminal.timings, terminal.price or _FREE
    return UsageEvent(
        usage_id=usage_id(terminal.tenant, terminal.request_id),
        request_id=terminal.request_id,
        tenant=terminal.tenant,
        key_id=terminal.key_id,
        model=terminal.model,
        alias=terminal.alias,
        provider=terminal.provider,
        worker=terminal.worker,
        status=terminal.status,
        attempts=terminal.attempt,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        estimated=usage.estimated,
        price_version=price.version,
        currency=price.currency,
        cost=price.cost(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        stream=terminal.stream,
        accepted_ms=timings.accepted_ms,
        finished_ms=timings.finished_ms,
        queue_ms=_between(timings.accepted_ms, timings.started_ms),
        ttft_ms=_between(timings.accepted_ms, timings.first_token_ms),
        generation_ms=_between(timings.started_ms, timings.finished_ms),
        user_id=terminal.user_id,
        error_code=terminal.error.code if terminal.error is not None else "",
        images=usage.images,
        audio_seconds=usage.audio_seconds,
        load_ms=timings.load_ms,
    )


def _between(start_ms: int, end_ms: int) -> int:
    return max(0, end_ms - start_ms) if start_ms and end_ms else 0
