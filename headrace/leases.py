"""Which leases there are, by `vram.leases`: the newest word on each. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from schemas.events import LeaseEvent

ENDED = ("free", "lost")
"""States of a lease that holds nothing any more."""


class _Told(NamedTuple):
    term: int
    offset: int
    event: LeaseEvent


class LeaseBook:
    """The newest record of each lease: of the highest term, so that no zombie's late word counts, then offset."""

    def __init__(self) -> None:
        self._leases: dict[str, dict[int, _Told]] = {}
        """Lease id -> epoch -> record; a lease id is a worker and a model, which meet again and again."""

    def take(self, event: LeaseEvent, offset: int) -> None:
        """Take in a record, in the order of offsets; a granted record's own offset is the lease's epoch."""
        epoch = offset if event.state == "granted" else event.epoch
        known = self._leases.setdefault(event.lease_id, {})
        if epoch in known and (event.term, offset) < known[epoch][:2]:
            return
        newest = max(known, default=epoch)
        if epoch not in known and epoch < newest:
            return  # It ended so long ago that it was forgotten.
        known[epoch] = _Told(event.term, offset, msgspec.structs.replace(event, epoch=epoch))
        for old in [old for old, told in known.items() if old < max(known) and told.event.state in ENDED]:
            del known[old]

    def held(self) -> Iterator[LeaseEvent]:
        """The leases that have not ended, each as its newest record tells, with its epoch."""
        for known in self._leases.values():
            for told in known.values():
                if told.event.state not in ENDED:
                    yield told.event
