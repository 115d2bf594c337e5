"""A worker's memory: on which devices its models lie, what they may take there, and what they are seen to take."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec
import structlog

from headrace.errors import ProviderError
from headrace.settings import Settings
from processors.generation.devices import budget, evidence
from processors.generation.devices.reader import Devices
from processors.generation.devices.reading import Reading
from processors.generation.devices.reading import held as held_on
from processors.generation.needs import Needs, Quietly
from processors.generation.providers.base import LoadedModel, Provider
from schemas import control
from schemas.events import Device, Need, ServerHeld

log = structlog.get_logger(__name__)

MIB = 1024 * 1024
RESERVE_SHARE = 0.05
LEAST_RESERVE = 256 * MIB
"""What is left to others of a device unless an operator says otherwise: this share, and at least so much."""
PROVIDER_PATIENCE_S = 0.5
"""How long a provider may take to tell what it holds; then what it told last counts."""
FIRST_PATIENCE_S = 5.0
"""The same of a server whose memory we plan and that has told nothing yet: it may be full."""
BLIND_S = 30.0
"""After this long without any answer of the GPUs' driver the worker serves without them."""
LOOK_AGAIN_S = 0.25
"""Between two looks for memory that is to become free."""
ESTIMATE_OVER = 1.3
"""An estimate is at most so many times what a model takes (`tests/contract/test_provider_facts.py`)."""


@dataclass(frozen=True, slots=True)
class Held:
    """Where a model is held, or being loaded or unloaded, and by whom."""

    device: str
    """Empty where its memory is not counted."""
    provider: Provider
    """Not the one of the present record, perhaps, when that was changed since."""


class Memory:
    """Follows the devices of one worker. `look` is called each second; what it found is there between two looks."""

    def __init__(self, settings: Settings, devices: Devices | None = None) -> None:
        self.devices: list[Device] = []
        """For the heartbeat."""
        self._reader = devices if devices is not None else Devices()
        self._cap = _plain(settings.worker_memory)
        self._share = settings.worker_memory_share
        self._most: dict[str, int] = {}
        """Most bytes of each device that were ever free for models."""
        self._reserve = _plain(settings.worker_memory_reserve)
        self._steady: dict[str, budget.Steady] = {}
        self._needs = Needs()
        self._quietly = Quietly()
        self._held: dict[str, Held] = {}
        self._seen: dict[str, LoadedModel] = {}
        """What providers told of those models."""
        self._peaks: dict[str, int] = {}
        self._servers: list[Provider] = []
        """Providers whose server has memory of its own."""
        self._told: dict[Provider, list[LoadedModel]] = {}
        """What those last told that their server holds."""
        self._models: list[control.Model] = []
        self._leaving: set[str] = set()
        """Models whose unload is not proven yet: their memory is still ours."""
        self._readings: list[Reading] = []
        self._gpus: list[str] = []
        """Every GPU seen so far."""
        self._blind_until: float | None = None

    # --- for the heartbeat ------------------------------------------------------------------------------------

    @property
    def needs(self) -> list[Need]:
        """What the models of this worker's devices are expected to take, or were seen to; as far as it is known yet."""
        return self._needs.told

    def peak(self, model: str) -> int:
        """Most bytes that a held model was seen to take; 0 where nobody can tell."""
        return self._peaks.get(model, 0)

    def forget(self, model: str) -> None:
        """The model's provider would load other weights now: what they take is not known."""
        self._needs.forget(model)

    async def look(
        self,
        providers: Mapping[str, tuple[control.Provider, Provider]],
        models: Collection[control.Model],
        held: Mapping[str, Held],
    ) -> None:
        """Read devices and providers. `models` are those of the providers; `held` are the models that lie somewhere.

        Never raises what a provider or a device raises: what it did not tell stays as it was.
        """
        self._held = dict(held)
        self._peaks = {model: size for model, size in self._peaks.items() if model in held}
        self._seen = {model: loaded for model, loaded in self._seen.items() if model in held}
        if self._blind_until is None:
            self._blind_until = asyncio.get_running_loop().time() + BLIND_S
        self._models = list(models)
        self._servers = [provider for _, provider in providers.values() if provider.memory_bytes]
        self._told = {server: told for server, told in self._told.items() if server in self._servers}
        await asyncio.gather(*map(self._ask_resident, {one.provider for one in held.values()} | set(self._servers)))
        self._readings = await self._read()
        if not self.ready:
            return
        # Those that are gone too: models of a provider with a GPU are not moved to RAM because it fell off its bus.
        self._gpus += [one.id for one in self._readings if one.kind == "gpu" and one.id not in self._gpus]
        on_gpu: list[str] = []
        on_ram: list[str] = []
        own: list[Device] = []
        for name, (_, provider) in providers.items():
            kind = await provider.device_kind(self._gpus)
            if kind == "own":
                own.append(
                    Device(name, provider.memory_bytes or 0, [name], shared=True, held=self._on_server(provider))
                )
            elif kind != "none":
                (on_gpu if kind == "gpu" else on_ram).append(name)
        self._measure()
        self.devices = [*self._machine(on_gpu, on_ram), *own]
        counted = {name for device in self.devices for name in device.providers}
        wanted = [model for model in models if model.provider in counted]
        self._needs.follow(providers, wanted, self._held, self._peaks)

    @property
    def ready(self) -> bool:
        """Whether it is known which devices there are: before that no model may be planned on the wrong one."""
        late = self._blind_until is not None and asyncio.get_running_loop().time() >= self._blind_until
        return self._reader.complete or late

    async def _read(self, pids: Collection[int] | None = None) -> list[Reading]:
        """All devices, with what our engines or `pids` hold; what was read last if the kernel does not tell."""
        try:
            return await self._reader.read(self._pids() if pids is None else pids)
        except OSError as error:
            log.error("memory_unreadable", error=str(error))
            return self._readings

    async def _ask_resident(self, provider: Provider) -> None:
        trouble = f"provider {provider.name} does not tell what it holds"
        new = provider in self._servers and provider not in self._told
        told = await self._quietly(provider.resident(), trouble, FIRST_PATIENCE_S if new else PROVIDER_PATIENCE_S)
        if told is None:
            return
        if provider in self._servers:
            self._told[provider] = told
        loaded = {one.model: one for one in told}
        for model in [model for model, held in self._held.items() if held.provider is provider]:
            if model in loaded:
                self._seen[model] = loaded[model]
            elif model not in self._leaving:
                self._seen.pop(model, None)

    def _on_server(self, provider: Provider) -> list[ServerHeld]:
        """What a server holds, each of its models once."""
        found: list[ServerHeld] = []
        tags: list[str] = []
        for one in sorted(self._told.get(provider, ()), key=lambda held: held.tag):
            if any(provider.same_backend_model(one.tag, tag) for tag in tags):
                continue
            tags.append(one.tag)
            ours = [
                model.id
                for model in self._models
                if model.provider == provider.name and provider.same_backend_model(one.tag, model.backend_tag)
            ]
            found.append(ServerHeld(sorted(ours), _whole_mib(one.bytes)))
        return found

    def utilisation(self) -> dict[str, float]:
        """Device -> the share of the last moments in which it computed, where its driver tells."""
        return {
            reading.id: round(reading.utilisation, 2)
            for reading in self._readings
            if reading.utilisation is not None and not reading.stale
        }

    def _measure(self) -> None:
        for model, loaded in self._seen.items():
            self._peaks[model] = max(self.peak(model), self._size(self._held[model].device, loaded))

    def _size(self, device: str, loaded: LoadedModel) -> int:
        """Bytes of a loaded model."""
        reading = evidence.find(self._readings, device)
        told = _told(reading, loaded) if reading is not None else None
        return _whole_mib(told or loaded.bytes)

    def _pids(self) -> set[int]:
        """Our engines' processes."""
        return {one.pid for one in self._seen.values() if one.pid is not None}

    def _machine(self, on_gpu: list[str], on_ram: list[str]) -> list[Device]:
        """The machine's own devices that some provider's models lie on."""
        found: dict[str, Device] = {}
        last = {known.id: known.bytes for known in self.devices}
        for reading in self._readings:
            names = on_gpu if reading.kind == "gpu" else on_ram
            if names:
                steady = self._steady.setdefault(reading.id, budget.Steady())
                size = budget.budget(reading, self._ours(reading), self._reserved(reading), self._cap)
                # A provider tells of an engine when it answers; what it takes until then is not somebody else's.
                size = max(size, min(last.get(reading.id, 0), size + self._coming(reading.id)))
                if self._share < 1:
                    # Of the most, as what other workers of the device hold now is not what they may not have.
                    self._most[reading.id] = max(size, self._most.get(reading.id, 0))
                    size = min(size, int(self._share * self._most[reading.id]))
                found[reading.id] = Device(reading.id, steady.follow(size), names)
        for known in self.devices:
            # A device that was there and does not show any more holds nothing; that is not the same as no device.
            if known.id not in found and not known.shared and known.id in self._steady:
                found[known.id] = Device(known.id, 0, known.providers)
        return list(found.values())

    def _ours(self, reading: Reading) -> int:
        """Bytes that our engines hold there; where the device does not say, what their models need."""
        here = [(model, loaded) for model, loaded in self._seen.items() if self._held[model].device == reading.id]
        told = {model: _told(reading, loaded) for model, loaded in here}
        return sum(self._needed(model) if size is None else size for model, size in told.items())

    def _coming(self, device: str) -> int:
        """Bytes that the models that are being loaded there may have taken already."""
        return sum(
            self._needed(model)
            for model, held in self._held.items()
            if held.device == device and model not in self._seen
        )

    def _needed(self, model: str) -> int:
        return self.peak(model) or self._needs.bytes_of(model)

    def _reserved(self, reading: Reading) -> int:
        if self._reserve is not None:
            return self._reserve
        return max(LEAST_RESERVE, int(reading.total * RESERVE_SHARE))

    # --- for loads and unloads --------------------------------------------------------------------------------

    async def check_room(self, model: str, device: str) -> None:
        """Raise `ProviderError` when less is free on a device now than the model needs, whoever took it."""
        reading = evidence.find(await self._read(), device)
        needed = self._needed(model)
        if reading is not None and reading.free < needed:
            raise ProviderError(
                f"{device} has {reading.free // MIB} MiB free and model {model!r} needs {needed // MIB} MiB:"
                " somebody else took memory"
            )

    async def loaded(self, provider: Provider, device: str, loaded: LoadedModel) -> None:
        """A model was loaded: measure it, so that its lease has the true size from its first moment."""
        self._held[loaded.model] = Held(device, provider)
        self._seen[loaded.model] = loaded
        self._readings = await self._read()
        self._measure()

    async def unload(self, model: control.Model, provider: Provider, device: str) -> None:
        """Unload, and return on evidence that the memory is free. Raises `ProviderError` when the provider does not.

        A device that is gone keeps nobody waiting: nothing is granted there, and should it come back, what is free on
        it is measured anew.
        """
        loaded = self._seen.get(model.id)
        pids = {loaded.pid} if loaded is not None and loaded.pid is not None else set()
        self._leaving.add(model.id)
        before = await self._read(pids)
        was = next((reading for reading in before if reading.id == device), None)
        listed = evidence.lists(before, device, pids)
        await provider.unload(model)
        # Without a process of ours, or a device that is read, the provider saw to it.
        while was is not None and pids:
            now = await self._read(pids)
            if all(reading.id != device for reading in now):
                break
            if not evidence.still_holding(now, device, pids, listed=listed):
                break
            if not listed and evidence.given_back(was, now, self._given_back_on(device)):
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        self._leaving.discard(model.id)
        self._seen.pop(model.id, None)
        await self.look_at_server(provider)

    async def look_at_server(self, provider: Provider) -> None:
        """See anew what a server holds: whoever reads that a model has gone is not to read here that it is there."""
        if provider in self._servers:
            await self._ask_resident(provider)
            held = self._on_server(provider)
            self.devices = [
                msgspec.structs.replace(device, held=held) if device.shared and device.id == provider.name else device
                for device in self.devices
            ]

    def _given_back_on(self, device: str) -> int:
        """Least bytes by which a device's free memory rises when all that is being unloaded there is gone."""
        return sum(
            self.peak(model) or int(self._needed(model) / ESTIMATE_OVER)
            for model in self._leaving
            if model in self._held and self._held[model].device == device
        )


def _whole_mib(size: int) -> int:
    """Bytes in whole MiB upwards: a few pages more are no news."""
    return -(-size // MIB) * MIB


def _told(reading: Reading, loaded: LoadedModel) -> int | None:
    """Bytes of a model as its device tells; None where that does not show its process, or not its bytes.

    A GPU in a container may list the host's process ids: that ours is not among them does not mean that it holds
    nothing.
    """
    if loaded.pid is None or reading.processes is None or loaded.pid not in reading.processes:
        return None
    return held_on(reading, {loaded.pid})


def _plain(size: int | None) -> int | None:
    """A size of the settings as a plain number: heartbeats carry nothing else."""
    return None if size is None else int(size)
