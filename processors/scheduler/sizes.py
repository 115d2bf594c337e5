"""How much memory models take, and how long they load, as their workers tell it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from schemas.control import Model
from schemas.events import Need, WorkerStatus


class Sizes:
    """What workers expect of models, and have measured; what an operator declared goes before it."""

    def __init__(self) -> None:
        self._told: dict[str, list[Need]] = {}

    def learn(self, status: WorkerStatus) -> bool:
        """Take a heartbeat; whether anything is new."""
        if self._told.get(status.worker, []) == status.needs:
            return False
        self._told[status.worker] = status.needs
        return True

    def applied(self, models: Mapping[str, Model]) -> dict[str, Model]:
        """The models with their sizes. Where workers differ the larger one counts: a lease must hold anywhere."""
        needs: dict[str, list[Need]] = {}
        for told in self._told.values():
            for need in told:
                needs.setdefault(need.model, []).append(need)
        return {id: _sized(model, needs[id]) if id in needs else model for id, model in models.items()}


def _sized(model: Model, needs: list[Need]) -> Model:
    return msgspec.structs.replace(
        model,
        bytes=model.bytes or max(need.bytes for need in needs),
        load_ms=model.load_ms or max(need.load_ms for need in needs),
    )
