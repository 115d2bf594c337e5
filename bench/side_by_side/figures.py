"""From what callers saw to figures: who was answered, cut, refused, and how long each tenant waited. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from bench.gateway.figures import Percentiles, percentiles
from bench.side_by_side.client import Seen
from bench.side_by_side.workload import CONTEXT, TENANTS, Ask

WHOLE = 0.95
"""A prompt of which the server says to have read less than this share was cut: templates differ by some tokens."""


class Outcome(StrEnum):
    """How a request ended for its caller."""

    ANSWERED = "answered"
    """Whole: a finish reason, `[DONE]`, and the prompt was read to its end."""
    TRUNCATED = "silently truncated"
    """Answered, but not what was asked: part of the prompt was thrown away, and nothing says so."""
    REFUSED_LONG = "refused: too long"
    """An error that tells that the prompt does not fit."""
    REFUSED = "refused: other"
    """An error of its own of a server that would not serve."""
    CUT = "stream cut"
    """Ended without a finish reason or `[DONE]`, and without an error."""
    FAILED = "failed"
    """The connection broke, or nothing came."""
    LEFT = "left"
    """By the caller's own will."""


class Tenant(msgspec.Struct, kw_only=True):
    """What a tenant got."""

    tenant: str
    asked: int
    answered: int
    tokens: int
    """Completion tokens of its answers, those that it left too."""
    first: Percentiles
    """Time to the first token of those who stayed, ms."""
    waited: Percentiles
    """Time to the end of the answers, ms."""


class Leaving(msgspec.Struct, kw_only=True):
    """What the engine did for callers who had left, on a machine that did nothing else."""

    moment: str
    """In which they left: `prefill` or `answer`."""
    callers: int
    busy_s: float
    """CPU seconds of the engines after a caller left, on average."""
    busy_most_s: float


class Machine(msgspec.Struct, kw_only=True):
    """What the machine saw of the server while the load ran."""

    loads: int
    """Engines that were started: each is a switch from one model to another."""
    engines_peak: int
    """Most bytes that the engines had resident together."""
    all_peak: int
    """Most bytes of all of the server's processes together; pages that they share count in each."""


class Figures(msgspec.Struct, kw_only=True):
    """One server's run."""

    subject: str
    seconds: float
    """From the first request to the last answer."""
    outcomes: dict[str, int]
    too_long: int
    """Requests whose prompt does not fit, and whose caller stayed."""
    first: Percentiles
    """Time to the first token of all whose callers stayed, ms."""
    tenants: list[Tenant]
    machine: Machine
    alone_tokens_s: float = 0.0
    """Tokens a second of one stream while nobody else asks: how fast the engine itself is, on this machine now."""
    leaving: list[Leaving] = []
    notes: list[str] = []
    """What servers said was wrong, some of each kind."""


def outcome(seen: Seen, prompt_tokens: int) -> Outcome:
    """How a request with so many prompt tokens ended."""
    if seen.left:
        return Outcome.LEFT
    if seen.error:
        told = prompt_tokens >= CONTEXT and "context" in seen.error
        return Outcome.REFUSED_LONG if told else Outcome.REFUSED
    if seen.broken or seen.status != 200:
        return Outcome.FAILED
    if not (seen.finish and seen.done):
        return Outcome.CUT
    read = seen.prompt_tokens
    return Outcome.TRUNCATED if read is not None and read < WHOLE * prompt_tokens else Outcome.ANSWERED


def summarise(
    subject: str, asks: Sequence[Ask], prompts: Sequence[int], saw: Sequence[Seen], machine: Machine
) -> Figures:
    """The figures of a run; `prompts` are the true prompt tokens of each request."""
    ends = [outcome(seen, tokens) for seen, tokens in zip(saw, prompts, strict=True)]
    counts = Counter(ends)
    errors = {seen.error or seen.broken for seen in saw if seen.error or seen.broken}
    return Figures(
        subject=subject,
        seconds=round(max(ask.at_s + seen.end_s for ask, seen in zip(asks, saw, strict=True)), 1),
        outcomes={one.value: counts[one] for one in Outcome},
        too_long=sum(tokens >= CONTEXT and end is not Outcome.LEFT for tokens, end in zip(prompts, ends, strict=True)),
        first=_first([seen for seen in saw if not seen.left]),
        tenants=[_tenant(name, asks, saw, ends) for name in TENANTS],
        machine=machine,
        notes=sorted({error[:200] for error in errors})[:5],
    )


def _tenant(name: str, asks: Sequence[Ask], saw: Sequence[Seen], ends: Sequence[Outcome]) -> Tenant:
    own = [(seen, end) for ask, seen, end in zip(asks, saw, ends, strict=True) if ask.tenant == name]
    served = [seen for seen, end in own if end is Outcome.ANSWERED]
    return Tenant(
        tenant=name,
        asked=len(own),
        answered=len(served),
        tokens=sum(seen.completion_tokens for seen, _ in own),
        first=_first([seen for seen, _ in own if not seen.left]),
        waited=percentiles(int(seen.end_s * 1e9) for seen in served),
    )


def _first(saw: Sequence[Seen]) -> Percentiles:
    return percentiles(int(seen.first_s * 1e9) for seen in saw if seen.first_s is not None)
