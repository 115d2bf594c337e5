"""From what a load client saw to figures: percentiles, stalls, and whether each token came once and in order.

Pure functions; times are nanoseconds of CLOCK_MONOTONIC, figures for readers are milliseconds.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

STALL_NS = 50_000_000
"""A stream stalls when a gap between two tokens is longer by this than the gap with which the upstream sent them."""


class Percentiles(msgspec.Struct, kw_only=True):
    """A distribution in milliseconds; all zero when there was nothing to count."""

    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class Order(msgspec.Struct, kw_only=True):
    """How a stream's tokens differ from the sequence that was sent; all zero is exact."""

    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    """Tokens that came after one with a higher number."""
    foreign: int = 0
    """Tokens that belong to another stream."""


class Trace(msgspec.Struct, kw_only=True):
    """What one caller saw of one request."""

    expected: int
    """Tokens that the upstream was asked for."""
    base: int = 0
    """Number of the first token."""
    started: int = 0
    """When the request was written."""
    ended: int = 0
    numbers: array[int] = msgspec.field(default_factory=lambda: array("q"))
    sent: array[int] = msgspec.field(default_factory=lambda: array("q"))
    received: array[int] = msgspec.field(default_factory=lambda: array("q"))
    done: bool = False
    """Whether the answer ended as it should: `[DONE]`, or a whole body."""
    usage: int | None = None
    """`completion_tokens` as reported."""
    error: str | None = None


class Load(msgspec.Struct, kw_only=True):
    """The figures of one run of the load client."""

    callers: int
    requests: int
    tokens: int
    seconds: float
    """From the first request's start to the last answer's end."""
    requests_per_second: float
    tokens_per_second: float
    ttft: Percentiles
    """From writing the request to its first token (not streamed: to the whole answer)."""
    delay: Percentiles
    """From the upstream's writing of a token to the caller's reading of it."""
    gap: Percentiles
    """Between two tokens of a stream, as received."""
    stall_free: float
    """Share of requests without a stall, among all requests; an unfinished one counts as stalled."""
    order: Order
    wrong_usage: int
    """Finished requests whose reported `completion_tokens` is not what was sent."""
    errors: dict[str, int]
    """Requests that failed, by what went wrong."""
    client_cpu_seconds: float = 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the ascending `ordered` lies, linear between neighbours; 0 if empty."""
    if not ordered:
        return 0.0
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values_ns: Iterable[int]) -> Percentiles:
    """The distribution of nanosecond values, in milliseconds."""
    ordered = sorted(values_ns)
    p50, p95, p99 = (round(percentile(ordered, share) / 1e6, 3) for share in (0.5, 0.95, 0.99))
    return Percentiles(count=len(ordered), p50=p50, p95=p95, p99=p99, max=round(ordered[-1] / 1e6, 3) if ordered else 0)


def stalls(received: Sequence[int], sent: Sequence[int], limit_ns: int = STALL_NS) -> int:
    """How many gaps between neighbouring tokens grew by more than `limit_ns` on their way."""
    return sum(
        (received[at] - received[at - 1]) - (sent[at] - sent[at - 1]) > limit_ns for at in range(1, len(received))
    )


def order(numbers: Sequence[int], base: int, expected: int) -> Order:
    """Compare received token numbers with `base … base + expected - 1`."""
    own = [number for number in numbers if base <= number < base + expected]
    counts = Counter(own)
    highest, reordered = base - 1, 0
    seen: set[int] = set()
    for number in own:
        reordered += number < highest and number not in seen
        highest = max(highest, number)
        seen.add(number)
    return Order(
        lost=expected - len(counts),
        doubled=len(own) - len(counts),
        reordered=reordered,
        foreign=len(numbers) - len(own),
    )


def exact(found: Order) -> bool:
    """Whether nothing was lost, doubled, reordered or foreign."""
    return found == Order()


def summarise(traces: Sequence[Trace], callers: int) -> Load:
    """The figures of a run. Lost tokens are counted for every request, also for one that failed."""
    total = Order()
    ttft: list[int] = []
    delay: list[int] = []
    gap: list[int] = []
    errors: Counter[str] = Counter()
    smooth = wrong_usage = 0
    for trace in traces:
        found = order(trace.numbers, trace.base, trace.expected)
        total = Order(**{name: getattr(total, name) + getattr(found, name) for name in Order.__struct_fields__})
        received = trace.received
        if received:
            ttft.append(received[0] - trace.started)
        delay.extend(at - sent for at, sent in zip(received, trace.sent, strict=True))
        gap.extend(received[at] - received[at - 1] for at in range(1, len(received)))
        if trace.error is not None or not trace.done:
            errors[trace.error or "unfinished"] += 1
            continue
        smooth += stalls(received, trace.sent) == 0
        wrong_usage += trace.usage is not None and trace.usage != trace.expected
    started = min((trace.started for trace in traces), default=0)
    seconds = (max((trace.ended for trace in traces), default=0) - started) / 1e9
    tokens = sum(len(trace.numbers) for trace in traces)
    return Load(
        callers=callers,
        requests=len(traces),
        tokens=tokens,
        seconds=round(seconds, 3),
        requests_per_second=round((len(traces) - errors.total()) / seconds, 2) if seconds else 0.0,
        tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
        ttft=percentiles(ttft),
        delay=percentiles(delay),
        gap=percentiles(gap),
        stall_free=round(smooth / len(traces), 4) if traces else 0.0,
        order=total,
        wrong_usage=wrong_usage,
        errors=dict(errors),
    )
