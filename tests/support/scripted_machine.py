"""Hardware that is absent: devices that a test fills and empties, and a provider whose engines take memory of them."""

from __future__ import annotations

import asyncio
import builtins
import itertools
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.errors import ProviderError
from headrace.settings import Settings
from processors.generation.devices.reader import Devices
from processors.generation.devices.reading import RAM, Reading
from processors.generation.memory import Held, Memory
from processors.generation.providers.base import (
    BackendModel,
    DeviceKind,
    LoadedModel,
    ModelFacts,
    Piece,
    Provider,
)
from schemas import control
from schemas.control import Model

_pids = itertools.count(1000)


@dataclass
class Part:
    """One device: change what you like, the next reading shows it. Sizes are bytes."""

    total: int
    held: dict[int, int] = field(default_factory=dict)
    """By process id; a GPU's memory may outlive its process."""
    lists: bool = True
    """Whether its driver lists processes at all."""
    foreign_ids: bool = False
    """Whether it lists them by other ids than theirs here, as in a container."""
    stale: bool = False
    gone: bool = False


class Machine(Devices):
    """Devices by id; `ram` is main memory, every other one a GPU."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.parts = {id: Part(size) for id, size in sizes.items()}
        self.answers = True
        """Whether the GPUs' driver has answered once."""
        self.trouble: OSError | None = None

    @property
    def complete(self) -> bool:
        return self.answers

    async def read(self, pids: Collection[int] = ()) -> list[Reading]:
        if self.trouble is not None:
            raise self.trouble
        return [self._reading(id, part, pids) for id, part in self.parts.items() if self._shows(id, part)]

    def _shows(self, id: str, part: Part) -> bool:
        return not part.gone and (self.answers or id == RAM)

    def _reading(self, id: str, part: Part, pids: Collection[int]) -> Reading:
        used = sum(part.held.values())
        processes: dict[int, int | None] | None = dict(part.held)
        if id == RAM:
            processes = {pid: part.held.get(pid, 0) for pid in pids}
        elif not part.lists:
            processes = None
        elif part.foreign_ids:
            processes = {pid + 100_000: size for pid, size in part.held.items()}
        kind = "ram" if id == RAM else "gpu"
        return Reading(id, kind, id, part.total, used, part.total - used, processes, stale=part.stale)  # type: ignore[arg-type]


class Engines(Provider):
    """A provider whose models are a process each, with memory of a machine."""

    def __init__(self, machine: Machine, name: str = "local", kind: DeviceKind = "gpu") -> None:
        self.name = name
        self.takes: dict[str, int] = {}
        """Bytes that a model's process takes when it is loaded next."""
        self.expects: dict[str, int] = {}
        """Bytes that are expected of a model."""
        self.lingers = False
        """Whether a GPU keeps the memory of processes that end."""
        self.trouble: ProviderError | None = None
        self.inspected: builtins.list[Model] = []
        self.pids: dict[str, int] = {}
        self._machine = machine
        self._kind = kind
        self._devices: dict[str, str] = {}

    async def device_kind(self, gpus: Sequence[str]) -> DeviceKind:
        return "ram" if self._kind == "gpu" and not gpus else self._kind

    async def inspect(self, model: Model) -> ModelFacts:
        self.inspected.append(model)
        if self.trouble is not None:
            raise self.trouble
        return ModelFacts(bytes=self.expects[model.id], load_ms=700)

    async def load(self, model: Model, device: str = "") -> LoadedModel:
        pid = self.pids[model.id] = next(_pids)
        self._devices[model.id] = device
        if device in self._machine.parts:
            self._machine.parts[device].held[pid] = self.takes[model.id]
        return await self._loaded(model.id)

    async def unload(self, model: Model) -> None:
        pid, device = self.pids.pop(model.id), self._devices.pop(model.id)
        if device in self._machine.parts and not (self.lingers and device != RAM):
            del self._machine.parts[device].held[pid]

    async def resident(self) -> builtins.list[LoadedModel]:
        if self.trouble is not None:
            raise self.trouble
        return [await self._loaded(model) for model in self.pids]

    async def _loaded(self, model: str) -> LoadedModel:
        own = self._kind == "own"
        return LoadedModel(model, model, self.takes[model] if own else 0, None if own else self.pids[model])

    async def health(self) -> None:
        raise NotImplementedError

    async def list(self) -> builtins.list[BackendModel]:
        raise NotImplementedError

    async def count_prompt(self, model: Model, body: Mapping[str, object], *, emitted: str = "") -> int | None:
        raise NotImplementedError

    def generate(
        self, model: Model, body: Mapping[str, object], *, emitted: str = ""
    ) -> AsyncGenerator[builtins.list[Piece], None]:
        raise NotImplementedError

    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class Node:
    """A worker's memory with its providers and models; holds models as a worker does."""

    def __init__(self, machine: Machine, *engines: Engines, settings: Settings | None = None) -> None:
        self.memory = Memory(settings or Settings(), machine)
        self.providers: dict[str, tuple[control.Provider, Provider]] = {
            one.name: (control.Provider(name=one.name, kind="llama_cpp"), one) for one in engines
        }
        self.models: dict[str, Model] = {}
        self.held: dict[str, Held] = {}
        self._loaded: dict[str, Model] = {}

    def add(self, name: str, provider: Engines, *, expects: int, takes: int | None = None) -> Model:
        """A model of a provider; it takes what is expected unless said otherwise."""
        provider.expects[name], provider.takes[name] = expects, expects if takes is None else takes
        self.models[name] = Model(name, provider.name, name)
        return self.models[name]

    async def look(self) -> None:
        await self.memory.look(self.providers, list(self.models.values()), self.held)

    async def settle(self) -> None:
        """Look until the providers have told what they were asked."""
        await self.look()
        for _ in range(20):
            await asyncio.sleep(0)
        await self.look()

    async def load(self, name: str, device: str) -> None:
        """As `Worker._bring` does it. Raises `ProviderError`."""
        model = self.models[name]
        provider = self.providers[model.provider][1]
        await self.memory.check_room(name, device)
        self.held[name], self._loaded[name] = Held(device, provider), model
        await self.memory.loaded(provider, device, await provider.load(model, device))

    async def unload(self, name: str) -> None:
        """As `Worker._give_back` does it."""
        held = self.held[name]
        await self.memory.unload(self._loaded[name], held.provider, held.device)
        del self.held[name]

    @property
    def budgets(self) -> dict[str, int]:
        """What the heartbeat says that models may take of each device."""
        return {device.id: device.bytes for device in self.memory.devices}

    @property
    def needs(self) -> dict[str, int]:
        """What it says that models need."""
        return {need.model: need.bytes for need in self.memory.needs}
