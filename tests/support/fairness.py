"""How unevenly tenants were served while both waited, out of what a run left in ClickHouse. Pure."""

from __future__ import annotations

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


def bound(served: Sequence[Served], slots: int) -> float:
    """Largest difference of service in any interval in which both wait: 2 max(wp L, wq M) (Sheng et al. 2024, 4.4).

    And what counting late adds: completion tokens count here when a request ends, so that those of `slots` running
    requests are missing at each end of the interval.
    """
    longest = max(one.completion for one in served)
    inner = 2 * max(PROMPT * max(one.prompt for one in served), COMPLETION * slots * longest)
    return inner + 2 * COMPLETION * slots * longest


def widest(served: Sequence[Served]) -> float:
    """The largest difference of service between two tenants over any interval in which both waited all the time."""
    tenants = sorted({one.tenant for one in served})
    return max((gap for pair in combinations(tenants, 2) for gap in _gaps(served, *pair)), default=0.0)


def _gaps(served: Sequence[Served], first: str, second: str) -> Iterator[float]:
    """For each stretch of time in which both wait, how far their service drifts apart within it."""
    steps: list[tuple[int, int, str, float]] = []  # when, change of those that wait, tenant, service
    for one in served:
        if one.tenant in (first, second):
            steps += [
                (one.came, 1, one.tenant, 0.0),
                (one.began, -1, one.tenant, PROMPT * one.prompt),
                (one.ended, 0, one.tenant, COMPLETION * one.completion),
            ]
    waiting = {first: 0, second: 0}
    gap, low, high, stretch = 0.0, 0.0, 0.0, False
    for _, change, tenant, units in sorted(steps):
        both = all(waiting.values())
        if both and not stretch:
            low = high = gap
        stretch = both
        gap += units if tenant == first else -units
        if stretch:
            low, high = min(low, gap), max(high, gap)
        waiting[tenant] += change
        if stretch and not all(waiting.values()):
            yield high - low
    if stretch:
        yield high - low
