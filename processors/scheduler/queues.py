"""The requests that wait for one model: by priority, fair between tenants, first come first served within one.

Fairness is the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each
tenant has a counter of the service it was given, and the lowest counter goes next. Prompt tokens are charged when a
request is dispatched, completion tokens as they come. A tenant that comes back is lifted to the lowest counter of those
that wait, so that nobody saves up for a burst.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from schemas.events import Priority

if TYPE_CHECKING:
    from processors.scheduler.state import Request

PROMPT_WEIGHT = 1.0
COMPLETION_WEIGHT = 2.0
"""Service units of a prompt and of a completion token, as in the paper."""


class Queue:
    """Requests that wait for one model, and what its tenants were served."""

    __slots__ = ("_by_id", "_idle_counter", "_lanes", "counters", "pressing", "pressing_ms", "weights")

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        """Shares of tenants; 1 for those without one."""
        self.counters: dict[str, float] = {}
        """Tenant -> service units over its weight."""
        self._lanes: dict[tuple[Priority, str], OrderedDict[str, Request]] = {}
        self.pressing = 0
        """Requests that are not batch work."""
        self.pressing_ms = 0
        """Since when there have been such requests all the time."""
        self._by_id: dict[str, Request] = {}
        self._idle_counter = 0.0
        """Counter of the last tenant that left the queue empty."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._by_id.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: str) -> Request | None:
        """The request with this id; None when it does not wait."""
        return self._by_id.get(request_id)

    def add(self, request: Request, *, first: bool = False) -> None:
        """Let a request wait; `first` before all others of its tenant and priority."""
        tenant = request.tenant
        if not any(waiting == tenant for _, waiting in self._lanes):
            floor = min((self.counters[waiting] for _, waiting in self._lanes), default=self._idle_counter)
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
        lane = self._lanes.setdefault((request.priority, tenant), OrderedDict())
        lane[request.id] = request
        if first:
            lane.move_to_end(request.id, last=False)
        if request.id not in self._by_id and request.priority is not Priority.BATCH:
            if not self.pressing:
                self.pressing_ms = request.waiting_ms
            self.pressing += 1
        self._by_id[request.id] = request

    def remove(self, request_id: str) -> Request | None:
        """Take a request out, wherever it waits; None when it does not."""
        request = self._by_id.pop(request_id, None)
        if request is not None:
            self.pressing -= request.priority is not Priority.BATCH
            place = (request.priority, request.tenant)
            lane = self._lanes[place]
            del lane[request_id]
            if not lane:
                del self._lanes[place]
                if not self._lanes:
                    self._idle_counter = self.counters[request.tenant]
        return request

    def take(self, *, idle: bool) -> Request | None:
        """The next to be served; batch work only when capacity is `idle`."""
        places = [place for place in self._lanes if idle or place[0] is not Priority.BATCH]
        if not places:
            return None
        place = min(places, key=lambda at: (at[0], self.counters[at[1]], at[1]))
        request = next(iter(self._lanes[place].values()))
        self.charge_tokens(request, prompt=request.prompt_tokens)
        return self.remove(request.id)

    def charge_tokens(self, request: Request, *, prompt: int = 0, completion: int = 0) -> None:
        """Count a request's tokens so far, in all, for its tenant; what was counted before is not counted again."""
        units = PROMPT_WEIGHT * (prompt - request.charged_prompt) if prompt else 0.0
        if prompt:
            request.charged_prompt = prompt
        if completion > request.charged_completion:
            units += COMPLETION_WEIGHT * (completion - request.charged_completion)
            request.charged_completion = completion
        if units:
            self.charge(request.tenant, units)

    def charge(self, tenant: str, units: float) -> None:
        """Count service given to a tenant."""
        self.counters[tenant] = self.counters.get(tenant, 0.0) + units / self.weights.get(tenant, 1.0)

    def before(self, tenant: str | None, priority: Priority) -> float:
        """About how many of those that wait go before a request that comes now.

        All of a higher priority, those of its tenant, and of each other tenant as many as its share lets through
        meanwhile. None stands for a tenant with the largest share, of which nothing waits.
        """
        own = len(self._lanes.get((priority, tenant), ())) if tenant is not None else 0
        share = max((1.0, *self.weights.values())) if tenant is None else self.weights.get(tenant, 1.0)
        turns = (own + 1) / share
        count = float(own)
        for (theirs, other), lane in self._lanes.items():
            if theirs < priority:
                count += len(lane)
            elif theirs == priority and other != tenant:
                count += min(len(lane), turns * self.weights.get(other, 1.0))
        return count

    def oldest(self, *, batch: bool = True) -> Request | None:
        """The request that has waited longest."""
        oldest: Request | None = None
        for (priority, _), lane in self._lanes.items():
            if batch or priority is not Priority.BATCH:
                head = next(iter(lane.values()))
                if oldest is None or head.waiting_ms < oldest.waiting_ms:
                    oldest = head
        return oldest
