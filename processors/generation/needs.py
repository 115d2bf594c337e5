"""What a worker's models need: asked of their providers once, then the most that any load was seen to take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import structlog

from headrace.errors import HeadraceError
from processors.generation.providers.base import Provider
from schemas import control
from schemas.events import Need

log = structlog.get_logger(__name__)
T = TypeVar("T")

INSPECT_TIMEOUT_S = 30.0
INSPECT_AGAIN_S = 5.0
"""Until a provider that could not tell of a model is asked again."""
NOBODY_KNOWS = 1
"""Bytes of a model that its provider cannot tell of: it may be loaded, and the load says what is wrong."""


@dataclass(slots=True)
class _Known:
    """A model's need, for as long as its record and its provider's stay the same."""

    model: control.Model
    provider: control.Provider
    need: Need | None = None
    """None while the provider is asked."""
    again_at: float | None = None
    """Loop time after which the provider is asked again; None when it has told, or is being asked."""
    measured: int = 0
    """Most bytes that any load of it took."""


class Needs:
    """The needs of the models that take memory of a worker's devices."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._quietly = Quietly()

    @property
    def told(self) -> list[Need]:
        """As far as it is known yet."""
        return [known.need for known in self._known.values() if known.need is not None]

    def bytes_of(self, model: str) -> int:
        """Bytes that a model needs; 0 where that is not known."""
        known = self._known.get(model)
        return known.need.bytes if known is not None and known.need is not None else 0

    def follow(
        self,
        providers: Mapping[str, tuple[control.Provider, Provider]],
        models: Collection[control.Model],
        held: Collection[str],
        peaks: Mapping[str, int],
    ) -> None:
        """Keep what is known of these models, and ask beside for what is not.

        What is known of `held` models is kept too: one whose record was removed is to be unloaded yet. `peaks` is what
        present loads took.
        """
        now = asyncio.get_running_loop().time()
        fresh = {model: known for model, known in self._known.items() if model in held}
        for model in models:
            record, provider = providers[model.provider]
            known = self._known.get(model.id)
            if known is None or (known.model, known.provider) != (model, record):
                known = _Known(model, record, again_at=now)
            if known.again_at is not None and now >= known.again_at:
                known.again_at = None
                task = asyncio.create_task(self._ask(known, provider))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            known.measured = max(known.measured, peaks.get(model.id, 0))
            if known.need is not None and known.measured:
                known.need.bytes, known.need.measured = known.measured, True  # For the next load too.
            fresh[model.id] = known
        self._known = fresh

    def forget(self, model: str) -> None:
        """The model's provider loads other weights now: it is asked again; what loads took before says nothing."""
        known = self._known.get(model)
        if known is not None:
            known.measured, known.again_at = 0, asyncio.get_running_loop().time()

    async def _ask(self, known: _Known, provider: Provider) -> None:
        trouble = f"provider {known.provider.name} cannot tell of model {known.model.id}"
        facts = await self._quietly(provider.inspect(known.model), trouble, INSPECT_TIMEOUT_S)
        if facts is None:
            known.need = Need(known.model.id, NOBODY_KNOWS)
            known.again_at = asyncio.get_running_loop().time() + INSPECT_AGAIN_S
        else:
            known.need = Need(known.model.id, facts.bytes or NOBODY_KNOWS, facts.load_ms)


class Quietly:
    """Asks providers what they may not be able to tell; what is wrong is logged once, until they have told."""

    def __init__(self, event: str = "memory_unknown") -> None:
        self._event = event
        self._troubles: set[str] = set()

    async def __call__(self, asked: Awaitable[T], trouble: str, patience_s: float) -> T | None:
        """What was asked, or None when it did not answer in time or has an error."""
        try:
            async with asyncio.timeout(patience_s):
                told = await asked
        except (HeadraceError, TimeoutError) as error:
            if trouble not in self._troubles:
                self._troubles.add(trouble)
                log.warning(self._event, trouble=trouble, error=str(error) or "no answer in time")
            return None
        self._troubles.discard(trouble)
        return told
