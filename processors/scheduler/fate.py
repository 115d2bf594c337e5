"""What becomes of a request whose worker was lost: a pure function of what it asked for and what had been sent."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from processors.scheduler.messages import Recover
from processors.scheduler.sent import Sent
from schemas.control import Provider
from schemas.events import MAX_EMITTED_BYTES, Routed


class Fate(StrEnum):
    """Values are the outcomes that the metrics count."""

    RETRIED = "retried"
    """Nothing was sent: another attempt starts from the beginning."""
    CONTINUED = "continued"
    """Another attempt goes on from what was sent."""
    COMPLETED = "completed"
    """All of it was sent; only its end was not written."""
    FAILED = "failed"
    """The caller keeps what was sent, and is told."""


def fate(lost: Recover, routed: Routed, sent: Sent, provider: Provider | None) -> Fate:
    """Decide; `provider` is that of the request's model, None where there is none any more."""
    if complete(routed, sent):
        return Fate.COMPLETED
    if sent.empty:
        return Fate.RETRIED if lost.may_retry else Fate.FAILED
    if lost.running.cancel_asked or not lost.may_retry:
        return Fate.FAILED
    if not routed.continuable or provider is None or not provider.can_continue or not sent.answer.plain:
        return Fate.FAILED
    text = sent.answer.content()
    return Fate.CONTINUED if text and len(msgspec.json.encode(text)) <= MAX_EMITTED_BYTES else Fate.FAILED


def complete(routed: Routed, sent: Sent) -> bool:
    """Whether nothing is left to generate: every choice has ended, or the only one has all its tokens."""
    return 0 < routed.choices <= sent.answer.finished or capped(routed, sent)


def capped(routed: Routed, sent: Sent) -> bool:
    """Whether the only choice has all the tokens that it may have, and its finish reason was not sent."""
    full = routed.max_tokens is not None and sent.tokens >= routed.max_tokens
    return full and routed.choices == 1 and not sent.answer.finished
