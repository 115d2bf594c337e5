"""Waiting for what comes of a wish to a pool's scheduler."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from headrace.errors import HeadraceError, Unavailable
from headrace.fleet import Fleet
from schemas.events import PoolCommand, PoolCommandKind, PoolStatus

POLL_S = 0.05
LIFE_S = 62.0
"""A wish is obeyed within a minute or not at all."""


class NotDone(HeadraceError):
    """What was asked for did not come true."""

    status = 409
    code = "not_done"
    type = "invalid_request_error"


class Awaited(NamedTuple):
    """A wish, and its offset in `pool.commands`."""

    wish: PoolCommand
    offset: int


async def came_true(fleet: Fleet, awaited: Awaited, *, timeout_s: float = LIFE_S) -> str:
    """What came true, in a few words. Raises `NotDone` with the reason, or `Unavailable` when nobody took the wish."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = fleet.pools.get(awaited.wish.pool)
        if status is not None and status.wishes.next_offset > awaited.offset:
            said = _outcome(fleet, status, awaited.wish)
            if said is not None:
                return said
        await asyncio.sleep(POLL_S)
    status = fleet.pools.get(awaited.wish.pool)
    if status is None or status.wishes.next_offset <= awaited.offset:
        raise Unavailable(f"The scheduler of the pool {awaited.wish.pool!r} has not taken the wish. Does it run?")
    raise NotDone(_why_not(status, awaited.wish))


def _outcome(fleet: Fleet, status: PoolStatus, wish: PoolCommand) -> str | None:
    held = [lease for lease in fleet.leases.held() if lease.model == wish.model and lease.pool == wish.pool]
    match wish.kind:
        case PoolCommandKind.LOAD:
            if wish.model in status.failed_models:
                raise NotDone(f"{wish.model} could not be loaded: {status.failed_models[wish.model]}")
            return f"{wish.model} is loaded" if wish.model in status.ready_models else None
        case PoolCommandKind.UNLOAD:
            return None if held else f"{wish.model} is unloaded"
        case PoolCommandKind.RELEASE:
            waits = any(lease.worker == wish.worker and lease.bytes for lease in held)
            return None if waits else f"the bytes of {wish.model} on {wish.worker} are free"


def _why_not(status: PoolStatus, wish: PoolCommand) -> str:
    state = next((model.state for model in status.models if model.id == wish.model), "unknown")
    if wish.kind is PoolCommandKind.LOAD:
        return f"{wish.model} is {state}: there was no memory for it that an idle model could give."
    return f"{wish.model} is {state}; requests may still run or wait for it."
