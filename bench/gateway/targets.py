"""The targets that the gateway is held to, and the verdict on each from a run's figures. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from bench.gateway.figures import Percentiles, exact
from bench.gateway.measure import Measurement
from bench.gateway.usage import Usage

Outcome = Literal["stretch", "met", "missed"]


class Verdict(msgspec.Struct, kw_only=True, frozen=True):
    """One target beside the figure that was reached."""

    target: str
    figure: str
    goal: str
    outcome: Outcome
    gate: bool = False
    """Whether it is about correctness: missing it is a defect."""


def failed(verdicts: Sequence[Verdict], *, strict: bool) -> bool:
    """Whether a run with these verdicts fails: a gate was missed, or with `strict` anything was."""
    return any(verdict.outcome == "missed" and (strict or verdict.gate) for verdict in verdicts)


def at_most(value: float, goal: float, stretch: float | None = None) -> Outcome:
    """Verdict on a figure that should be small."""
    if stretch is not None and value <= stretch:
        return "stretch"
    return "met" if value <= goal else "missed"


def at_least(value: float, goal: float, stretch: float | None = None) -> Outcome:
    """Verdict on a figure that should be large."""
    return at_most(-value, -goal, None if stretch is None else -stretch)


def added(subject: Percentiles, direct: Percentiles, share: Literal["p50", "p95", "p99"]) -> float:
    """Milliseconds that a subject adds at a percentile, over the direct path's median: the strict reading, since the
    direct path's own outliers are not taken off."""
    return float(getattr(subject, share)) - direct.p50


def judge(
    measurements: Sequence[Measurement], floor: Percentiles | None, idle: Usage | None, subject: str = "headrace"
) -> list[Verdict]:
    """Every target that the run has figures for, with its verdict."""
    by = {(one.subject, one.scenario): one for one in measurements}
    own = [one for one in measurements if one.subject == subject]
    verdicts: list[Verdict] = []
    one, direct = by.get((subject, "ttft-1")), by.get(("direct", "ttft-1"))
    if one and direct and floor and floor.p50:
        verdicts += _first_token(one, direct, floor)
    many = by.get((subject, "streams-500"))
    if many:
        share, rate = many.load.stall_free, many.tokens_per_cpu_second()
        verdicts += [
            Verdict(
                target="500 streams, stall-free",
                figure=f"{share:.1%}",
                goal="≥ 95 %, stretch 99 %",
                outcome=at_least(share, 0.95, 0.99),
            ),
            Verdict(
                target="tokens per CPU second, whole stack",
                figure=f"{rate:,.0f}",
                goal="≥ 7,000, stretch 10,000",
                outcome=at_least(rate, 7000, 10000),
            ),
        ]
    short = by.get((subject, "short-64"))
    if short:
        rate = short.load.requests_per_second
        verdicts.append(
            Verdict(
                target="short requests/s at a 20 ms upstream",
                figure=f"{rate:,.0f}",
                goal="≥ 120, stretch 200",
                outcome=at_least(rate, 120, 200),
            )
        )
    if own:
        verdicts.append(_gate(own))
    return verdicts + (_idle(idle) if idle else [])


def _first_token(one: Measurement, direct: Measurement, floor: Percentiles) -> list[Verdict]:
    """Added time to first token in multiples of the median hop."""
    half = added(one.load.ttft, direct.load.ttft, "p50")
    tail = added(one.load.ttft, direct.load.ttft, "p99")
    return [
        Verdict(
            target="added TTFT at 1 stream, p50",
            figure=f"{half:.1f} ms = {half / floor.p50:.1f} hops",
            goal="≤ 8 hops, stretch 5",
            outcome=at_most(half / floor.p50, 8, 5),
        ),
        Verdict(
            target="added TTFT at 1 stream, p99",
            figure=f"{tail:.1f} ms = {tail / floor.p50:.1f} hops",
            goal="≤ 15 hops",
            outcome=at_most(tail / floor.p50, 15),
        ),
    ]


def _gate(own: Sequence[Measurement]) -> Verdict:
    """No token lost, doubled or reordered, no request failed, usage right: in every scenario."""
    broken = [one.scenario for one in own if not exact(one.load.order) or one.load.errors or one.load.wrong_usage]
    return Verdict(
        target="every token once and in order, no error (gate)",
        figure="exact" if not broken else "broken in " + ", ".join(broken),
        goal="exact",
        outcome="missed" if broken else "met",
        gate=True,
    )


def _idle(idle: Usage) -> list[Verdict]:
    """What the stack costs when nobody calls. Shared pages count once where the system tells (PSS)."""
    memory, kind = (idle.pss, "PSS") if idle.pss is not None else (idle.rss_peak, "RSS")
    share = idle.cpu_seconds / idle.seconds
    return [
        Verdict(
            target="idle stack, memory",
            figure=f"{memory:,.0f} MiB {kind} (RSS {idle.rss_peak:,.0f})",
            goal="≤ 1,229 MiB",
            outcome=at_most(memory, 1.2 * 1024),
        ),
        Verdict(
            target="idle stack, CPU",
            figure=f"{share:.1%} of a core",
            goal="≤ 12 %",
            outcome=at_most(share, 0.12),
        ),
    ]
