"""Ends the answers of callers that are revoked while they wait: keys and users that are disabled, apps that are.

What is looked at is how things are, several times a second and at every change, and not the changes themselves: one
that was missed would leave a stream running.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from headrace import metrics
from headrace.access import USER_PREFIX, app_refusal, key_refusal, user_refusal
from headrace.errors import HeadraceError, Unavailable
from headrace.registry import Caller, Registry, Snapshot
from schemas.control import Key, User

log = structlog.get_logger(__name__)

EVERY_S = 0.25
"""How often Redis is asked of the callers that have an answer running, when no change is announced."""

Revoke = Callable[[HeadraceError], None]


class Revocations:
    """The callers whose answers run on this ingress, and what ends them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._running: dict[Key, set[Revoke]] = {}

    def enter(self, key: Key, revoke: Revoke) -> None:
        """An answer to this key begins; `revoke` ends it."""
        self._running.setdefault(key, set()).add(revoke)

    def leave(self, key: Key, revoke: Revoke) -> None:
        """It has ended."""
        running = self._running.get(key, set())
        running.discard(revoke)
        if not running:
            self._running.pop(key, None)

    async def run(self) -> None:
        """Look for ever."""
        version = 0
        while True:
            version = await self._registry.moved(version, EVERY_S)
            try:
                await self.look()
            except Unavailable:
                continue  # What runs goes on while nobody can tell; new requests are answered 503.

    async def look(self) -> None:
        """End the answers of those who may not have them any more. Raises `Unavailable`."""
        keys = list(self._running)
        found = await self._registry.callers([_name(key) for key in keys])
        snapshot = self._registry.snapshot
        for key, caller in zip(keys, found, strict=True):
            refused = refusal(key, caller, snapshot)
            if refused is None:
                continue
            running = self._running.get(key, set())
            log.info("caller_revoked", key_id=key.id, app=key.app, answers=len(running))
            metrics.ANSWERS_REVOKED.inc(len(running))
            for revoke in list(running):
                revoke(refused)

    async def why(self, key: Key) -> HeadraceError | None:
        """Why a caller is refused now, if it is. Raises `Unavailable`."""
        [found] = await self._registry.callers([_name(key)])
        return refusal(key, found, self._registry.snapshot)


def _name(key: Key) -> tuple[str, str]:
    if key.id.startswith(USER_PREFIX):
        return "user", key.id.removeprefix(USER_PREFIX)
    return "id", key.id


def refusal(key: Key, found: Caller | None, snapshot: Snapshot) -> HeadraceError | None:
    """Why a caller that was let in as `key` is refused now. One that has only expired may hear its answer out."""
    if key.id.startswith(USER_PREFIX):
        user = found if isinstance(found, User) else None
        return user_refusal(user) or app_refusal(key.app, snapshot.apps)
    return key_refusal(found if isinstance(found, Key) else None, snapshot.apps, now_s=0)
