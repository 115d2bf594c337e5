"""Leases whose worker went while the pool had no scheduler, so that nobody said that they ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headrace.leases import LeaseBook
from processors.scheduler.state import Pool
from schemas.events import LeaseEvent

REASON = "its worker went while the pool had no scheduler"


def ends(book: LeaseBook, name: str, pool: Pool, seen_ms: Mapping[tuple[str, str], int]) -> list[LeaseEvent]:
    """The records that end what the book holds of the pool `name` and nobody else does.

    `seen_ms` tells when a worker's boot was last heard (Unix ms): then the lease is taken to have ended, or else when
    it was last told of.
    """
    lost = []
    for event in book.held():
        if event.pool != name or event.term >= pool.term:
            continue
        lease = pool.leases.get((event.worker, event.model))
        if lease is None or lease.epoch != event.epoch:
            at_ms = max(event.at_ms, seen_ms.get((event.worker, event.boot), 0))
            lost.append(msgspec.structs.replace(event, term=pool.term, state="lost", at_ms=at_ms, reason=REASON))
    return lost
