"""`control.erasures`, followed without a group: for those who keep a projection and have no Redis to ask."""

from __future__ import annotations

from types import TracebackType

import msgspec

from headrace.control_log import CommittedReader, Replay
from headrace.erasure import Erasures
from headrace.settings import Settings
from schemas.control import Erasure
from topics.catalogue import CONTROL_ERASURES


class ErasureLog:
    """All erasures, as far as they were read. Of one that is asked for again, the later counts."""

    def __init__(self, settings: Settings, client_id: str) -> None:
        self._reader = CommittedReader(settings.kafka, f"{client_id}-erasures-{settings.instance}")
        self._replay = Replay(self._reader, {"erasures": CONTROL_ERASURES})
        self._known: dict[str, Erasure] = {}

    async def __aenter__(self) -> ErasureLog:
        await self._reader.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._reader.stop()

    @property
    def erasures(self) -> Erasures:
        """By subject."""
        return self._known

    async def read_on(self) -> list[Erasure]:
        """Read to the end; the erasures that were asked for since the last time. Raises `KafkaError`."""
        if not await self._replay.read_on():
            return []
        held = {
            subject: msgspec.json.decode(raw, type=Erasure) for subject, raw in self._replay.records["erasures"].items()
        }
        new = [
            erasure
            for subject, erasure in held.items()
            if subject not in self._known or self._known[subject].asked_ms < erasure.asked_ms
        ]
        self._known = held
        return new
