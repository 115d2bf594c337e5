"""How much memory models take, and how long they load, as their workers tell it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import msgspec

from schemas.control import Model
from schemas.events import RAM, Device, Need, WorkerStatus


class Sizes:
    """What workers expect of models, and have measured; what an operator declared goes before it."""

    def __init__(self) -> None:
        self._told: dict[str, list[Need]] = {}
        self._where: dict[str, dict[str, str]] = {}
        """Worker -> provider -> where its models lie there."""

    def learn(self, status: WorkerStatus) -> bool:
        """Take a heartbeat; whether anything is new."""
        where = {provider: _where(device) for device in status.devices for provider in device.providers}
        if (self._told.get(status.worker, []), self._where.get(status.worker, {})) == (status.needs, where):
            return False
        self._told[status.worker], self._where[status.worker] = status.needs, where
        return True

    def applied(self, models: Mapping[str, Model]) -> dict[str, Model]:
        """The models with their sizes.

        What one worker measured goes before what others estimate where the model lies alike there: in main memory, on
        GPUs, or in one server's memory. Else, where workers differ, the larger one counts: a lease must hold anywhere.
        """
        needs: defaultdict[str, defaultdict[str, list[Need]]] = defaultdict(lambda: defaultdict(list))
        for worker, told in self._told.items():
            for need in told:
                if (model := models.get(need.model)) is not None:
                    needs[need.model][self._where[worker].get(model.provider, "")].append(need)
        return {id: _sized(model, needs[id]) if id in needs else model for id, model in models.items()}


def _where(device: Device) -> str:
    """What devices have in common on which a model takes the same."""
    return device.id if device.shared or device.id == RAM else "gpu"


def _sized(model: Model, needs: Mapping[str, list[Need]]) -> Model:
    counted = [need for alike in needs.values() for need in [one for one in alike if one.measured] or alike]
    return msgspec.structs.replace(
        model,
        bytes=model.bytes or max(need.bytes for need in counted),
        load_ms=model.load_ms or max(need.load_ms for need in counted),
    )
