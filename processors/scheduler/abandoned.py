"""Requests that nobody will have: the ingress that their caller asked is gone, and nobody has come back for them."""

from __future__ import annotations

from collections.abc import Iterable

from schemas.events import IngressStatus, Routed

GONE_MS = 12_000
"""An ingress that was not heard for this long is gone. It beats every 5 s."""
GRACE_S = 30
"""How long a request outlives the ingress of its caller, where the caller did not say for how long."""
ABANDONED = "The ingress of its caller is gone, and nobody came back for it."


class Ingresses:
    """Which ingress processes there are, by their heartbeats; the newest of an instance has taken its place."""

    def __init__(self) -> None:
        self._last: dict[str, IngressStatus] = {}
        self._gone_since: dict[str, int] = {}
        """`instance/boot` of a process that is gone -> when that was first seen (Unix ms)."""

    def heard(self, status: IngressStatus) -> None:
        """Take in a heartbeat."""
        self._last[status.instance] = status

    def abandoned(self, held: Iterable[Routed], now_ms: int) -> list[Routed]:
        """Requests whose ingress is gone for longer than they outlive their callers.

        None while no ingress is heard at all: then it may be us who hear nobody.
        """
        if not any(self._lives(status, now_ms) for status in self._last.values()):
            self._gone_since.clear()
            return []
        asked = [routed for routed in held if "/" in routed.ingress]  # An ingress of an earlier version does not beat.
        names = {routed.ingress for routed in asked}
        gone = {name for name in names if not self._is_there(name, now_ms)}
        self._gone_since = {name: self._gone_since.get(name, now_ms) for name in gone}
        return [
            routed
            for routed in asked
            if routed.ingress in gone
            and now_ms - self._gone_since[routed.ingress] >= (routed.resume_s or GRACE_S) * 1000
        ]

    def _is_there(self, name: str, now_ms: int) -> bool:
        instance, _, boot = name.rpartition("/")
        status = self._last.get(instance)
        return status is not None and status.boot == boot and self._lives(status, now_ms)

    @staticmethod
    def _lives(status: IngressStatus, now_ms: int) -> bool:
        return now_ms - status.at_ms < GONE_MS
