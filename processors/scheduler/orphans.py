"""Leases whose worker went while the pool had no scheduler, so that nobody said that they ended. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from processors.scheduler.state import Pool
from schemas.events import LeaseEvent

ENDED = ("free", "lost")
REASON = "its worker went while the pool had no scheduler"


@dataclass(slots=True)
class LeaseBook:
    """The newest record of each lease of one pool: of the highest term, then of the highest offset."""

    pool: str
    newest: dict[tuple[str, int], tuple[int, int, LeaseEvent]] = field(default_factory=dict)
    """(Lease id, epoch) -> (term, offset, record); a lease id is a worker and a model, which meet again and again."""

    def take(self, event: LeaseEvent, offset: int) -> None:
        """Take in a record of `vram.leases`."""
        if event.pool != self.pool:
            return
        epoch = offset if event.state == "granted" else event.epoch
        known = self.newest.get((event.lease_id, epoch))
        if known is None or (event.term, offset) > known[:2]:
            self.newest[event.lease_id, epoch] = (event.term, offset, event)

    def held(self) -> Iterable[LeaseEvent]:
        """The leases that have not ended, with their epochs."""
        for (_, epoch), (_, _, event) in self.newest.items():
            if event.state not in ENDED:
                yield msgspec.structs.replace(event, epoch=epoch)


def ends(book: LeaseBook, pool: Pool, seen_ms: Mapping[tuple[str, str], int]) -> list[LeaseEvent]:
    """The records that end what the book holds and nobody else does.

    `seen_ms` tells when a worker's boot was last heard (Unix ms): then the lease is taken to have ended, or else when
    it was last told of.
    """
    lost = []
    for event in book.held():
        lease = pool.leases.get((event.worker, event.model))
        if event.term < pool.term and (lease is None or lease.epoch != event.epoch):
            at_ms = max(event.at_ms, seen_ms.get((event.worker, event.boot), 0))
            lost.append(msgspec.structs.replace(event, term=pool.term, state="lost", at_ms=at_ms, reason=REASON))
    return lost
