"""How unevenly tenants were served while both waited, out of what a run left in ClickHouse. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

PROMPT, COMPLETION = 1.0, 2.0
"""Units of a token, as the scheduler counts them."""


@dataclass(frozen=True)
class Served:
    """A request of one model. Times are milliseconds of one clock."""

    tenant: str
    came: int
    began: int
    ended: int
    prompt: int
    completion: int
    lane: int = 0
    """Place of its priority, the lowest goes first; only those of one lane are served by turns."""


def bound(served: Sequence[Served], slots: int) -> float:
    """Largest difference of service in any interval in which both wait: 2 max(wp L, wq M) (Sheng et al. 2024, 4.4).

    And what counting late adds: completion tokens count here when a request ends, so that those of `slots` running
    requests are missing at each end of the interval.
    """
    longest = max(one.completion for one in served)
    inner = 2 * max(PROMPT * max(one.prompt for one in served), COMPLETION * slots * longest)
    return inner + 2 * COMPLETION * slots * longest


def widest(served: Sequence[Served]) -> float:
    """The largest difference of service between two tenants over any interval in which both waited all the time.

    And in which what was most urgent of each was of one lane: between lanes it is not fairness that decides.
    """
    tenants = sorted({one.tenant for one in served})
    return max((gap for pair in combinations(tenants, 2) for gap in _gaps(served, *pair)), default=0.0)


def _gaps(served: Sequence[Served], first: str, second: str) -> Iterator[float]:
    """For each stretch of time in which both wait, how far their service drifts apart within it."""
    steps: list[tuple[int, int, str, int, float]] = []  # when, change of those that wait, tenant, lane, service
    for one in served:
        if one.tenant in (first, second):
            steps += [
                (one.came, 1, one.tenant, one.lane, 0.0),
                (one.began, -1, one.tenant, one.lane, PROMPT * one.prompt),
                (one.ended, 0, one.tenant, one.lane, COMPLETION * one.completion),
            ]
    waiting: dict[str, Counter[int]] = {first: Counter(), second: Counter()}
    gap, low, high, stretch = 0.0, 0.0, 0.0, None
    for _, change, tenant, lane, units in sorted(steps):
        gap += units if tenant == first else -units
        if stretch is not None:
            low, high = min(low, gap), max(high, gap)
        waiting[tenant][lane] += change
        before, stretch = stretch, _lane(*waiting.values())
        if before is not None and before != stretch:
            yield high - low
        if before != stretch:
            low = high = gap
    if stretch is not None:
        yield high - low


def _lane(first: Counter[int], second: Counter[int]) -> int | None:
    """The lane in which both wait, where it is the most urgent of each; None where there is none."""
    theirs = [
        min((lane for lane, number in waiting.items() if number > 0), default=None) for waiting in (first, second)
    ]
    return theirs[0] if theirs[0] == theirs[1] else None
