"""What models are, as providers tell: asked when a model, its backend or its load is new, and told once a change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

import msgspec

from processors.generation.needs import INSPECT_TIMEOUT_S, Quietly
from processors.generation.providers.base import ModelFacts, Provider
from schemas import control
from schemas.events import ModelCard

VERSION_EVERY_S = 10.0
"""How often a provider is asked whether it would load other weights now."""
INSPECT_EVERY_S = 60.0
"""How often one that cannot tell is asked for everything."""

Tell = Callable[[str, ModelCard | None], Awaitable[None]]
"""Makes a model's card known, or that there is none any more; returns when that is durable."""


@dataclass(slots=True)
class _Known:
    """A model as it was when its provider was asked last."""

    model: control.Model
    provider: control.Provider
    load: int | None = None
    version: str = ""
    again_at: float = 0.0
    """Loop time after which its provider is asked again."""
    told: ModelCard | None = None


class Cards:
    """The cards of one worker's models. `changed` is called with a model whose backend loads other weights now."""

    def __init__(self, worker: str, tell: Tell, changed: Callable[[str], None], now_ms: Callable[[], int]) -> None:
        self._worker = worker
        self._tell = tell
        self._changed = changed
        self._now_ms = now_ms
        self._known: dict[str, _Known] = {}
        self._quietly = Quietly("model_unknown")

    async def look(
        self,
        providers: Mapping[str, tuple[control.Provider, Provider]],
        models: Collection[control.Model],
        loads: Mapping[str, int],
    ) -> None:
        """Ask for what is new, and tell it. `loads` has a number for each model in memory, another after each load.

        Never raises what a provider raises: what it told before stays. Raises what `tell` does.
        """
        served = {model.id: model for model in models if model.provider in providers}
        for gone in self._known.keys() - served.keys():
            if self._known.pop(gone).told is not None:
                await self._tell(gone, None)
        # All at once: one provider that hangs delays no other's models.
        asked = (self._follow(model, *providers[model.provider], loads.get(model.id)) for model in served.values())
        await asyncio.gather(*asked)

    async def _follow(
        self, model: control.Model, record: control.Provider, provider: Provider, load: int | None
    ) -> None:
        now = asyncio.get_running_loop().time()
        known = self._known.get(model.id)
        if known is None or (known.model, known.provider) != (model, record):
            known = self._known[model.id] = _Known(model, record, told=known.told if known is not None else None)
        loaded = load is not None and load != known.load
        if now < known.again_at and not loaded:
            return
        trouble = f"provider {record.name} cannot tell of model {model.id}"
        version = await self._quietly(provider.version(model), trouble, INSPECT_TIMEOUT_S)
        known.again_at = now + (VERSION_EVERY_S if version or version is None else INSPECT_EVERY_S)
        if version is None or (version and version == known.version and not loaded):
            return
        facts = await self._quietly(provider.inspect(model), trouble, INSPECT_TIMEOUT_S)
        if facts is None:
            return
        if known.version and version != known.version:
            self._changed(model.id)
        known.version, known.load = version, load if loaded else known.load
        card = card_of(self._worker, model, version, facts)
        if known.told is None or card != msgspec.structs.replace(known.told, at_ms=0):
            card.at_ms = self._now_ms()
            await self._tell(model.id, card)
            known.told = card


def card_of(worker: str, model: control.Model, version: str, facts: ModelFacts) -> ModelCard:
    """The card of a model, at no time yet."""
    return ModelCard(
        worker=worker,
        model=model.id,
        provider=model.provider,
        backend_tag=model.backend_tag,
        at_ms=0,
        version=version,
        architecture=facts.architecture,
        parameters=facts.parameters,
        quantisation=facts.quantisation,
        context_length=facts.context_length,
        layers=facts.layers,
        chat_template=facts.chat_template,
        template_digest=facts.template_digest,
        capabilities=list(facts.capabilities),
        weight_bytes=facts.weight_bytes,
    )
