"""What models are: cards told once a change, which of them counts, and what of a record they do not bear out."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Iterator

import msgspec
import pytest

from headrace.errors import ProviderError
from headrace.model_facts import newest, warnings
from processors.generation import cards as cards_module
from processors.generation.cards import Cards, card_of
from processors.generation.providers.base import ModelFacts
from processors.generation.providers.ollama_facts import download
from schemas import control
from schemas.control import Model
from schemas.events import ModelCard
from tests.support.scripted_machine import Engines, Machine

RECORD = control.Provider(name="local", kind="llama_cpp")
MODEL = Model("one", "local", "tag", context_length=4096)
FACTS = ModelFacts(architecture="llama", context_length=8192, capabilities=("chat",), chat_template=True)
CARD = card_of("w1", MODEL, "v1", FACTS)


class Backend(Engines):
    """A provider that tells what the test says."""

    def __init__(self) -> None:
        super().__init__(Machine(ram=1))
        self.facts, self.mark = FACTS, "v1"

    async def version(self, model: Model) -> str:
        if self.trouble is not None:
            raise self.trouble
        return self.mark

    async def inspect(self, model: Model) -> ModelFacts:
        self.inspected.append(model)
        return self.facts


class Desk:
    """Cards of one worker before that backend, and what was told."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.told: builtins.list[tuple[str, ModelCard | None]] = []
        self.changed: builtins.list[str] = []
        self.cards = Cards("w1", self._tell, self.changed.append, lambda: 77)

    async def _tell(self, model: str, card: ModelCard | None) -> None:
        self.told.append((model, card))

    async def look(self, *models: Model, **loads: int) -> builtins.list[ModelCard | None]:
        """What one more look tells."""
        self.told.clear()
        await self.cards.look({"local": (RECORD, self.backend)}, models, loads)
        return [card for _, card in self.told]


@pytest.fixture
def desk() -> Iterator[Desk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards_module, "VERSION_EVERY_S", 0.0)
        yield Desk()


async def test_a_model_is_told_once(desk: Desk) -> None:
    assert await desk.look(MODEL) == [msgspec.structs.replace(CARD, at_ms=77)]
    assert await desk.look(MODEL) == [] and len(desk.backend.inspected) == 1


async def test_other_weights_are_told_and_their_memory_asked_anew(desk: Desk) -> None:
    await desk.look(MODEL)
    desk.backend.mark, desk.backend.facts = "v2", msgspec.structs.replace(FACTS, quantisation="Q8_0")
    [card] = await desk.look(MODEL)
    assert card is not None and (card.version, card.quantisation) == ("v2", "Q8_0")
    assert desk.changed == ["one"]
    assert await desk.look(MODEL) == [] and desk.changed == ["one"]


async def test_a_load_has_the_model_looked_at_once(desk: Desk) -> None:
    await desk.look(MODEL)
    desk.backend.facts = msgspec.structs.replace(FACTS, layers=30)
    [card] = await desk.look(MODEL, one=1)
    assert card is not None and card.layers == 30
    assert await desk.look(MODEL, one=1) == [] and len(desk.backend.inspected) == 2
    await desk.look(MODEL, one=2)
    assert len(desk.backend.inspected) == 3 and desk.changed == [], "a load of the same is no other model"


async def test_what_was_told_stays_while_a_provider_cannot_tell(desk: Desk) -> None:
    await desk.look(MODEL)
    desk.backend.trouble = ProviderError("down")
    assert await desk.look(MODEL) == []
    desk.backend.trouble = None
    assert await desk.look(MODEL) == [], "nothing is new"


async def test_a_model_that_is_gone_has_no_card(desk: Desk) -> None:
    await desk.look(MODEL)
    assert await desk.look() == [None]
    assert await desk.look() == []


async def test_a_provider_without_versions_is_asked_now_and_then(desk: Desk) -> None:
    desk.backend.mark = ""
    assert len(await desk.look(MODEL)) == 1
    desk.backend.facts = msgspec.structs.replace(FACTS, context_length=16_384)
    assert await desk.look(MODEL) == [], "not yet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards_module, "INSPECT_EVERY_S", 0.0)
        assert len(await desk.look(MODEL, one=1)) == 1, "a load makes it new"
        desk.backend.facts = FACTS
        await asyncio.sleep(0)
        assert len(await desk.look(MODEL, one=1)) == 1


def test_the_card_told_last_counts_and_none_of_another_backend() -> None:
    early, late = (msgspec.structs.replace(CARD, worker=worker, at_ms=at) for worker, at in (("w1", 1), ("w2", 2)))
    other = msgspec.structs.replace(CARD, backend_tag="before", at_ms=3)
    unknown = msgspec.structs.replace(CARD, model="gone", at_ms=4)
    assert newest([late, other, unknown, early], {"one": MODEL}) == {"one": late}


@pytest.mark.parametrize(
    ("record", "card", "said"),
    [
        ({}, {}, []),
        ({"context_length": 8193}, {}, ["context_length is 8193, more than the 8192 tokens"]),
        ({"context_length": 8193}, {"context_length": 0}, []),
        ({"capabilities": ("chat", "tools")}, {}, ["'tools', which its chat template does not offer"]),
        ({"capabilities": ("chat", "tools")}, {"capabilities": ["chat", "tools"]}, []),
        ({"capabilities": ("tools",)}, {"chat_template": False}, ["'tools', which it has no chat template for"]),
        ({"capabilities": ("vision",)}, {}, ["'vision', which its provider does not serve"]),
        ({"capabilities": ("vision", "tools", "code")}, {"architecture": ""}, []),
    ],
)
def test_what_a_record_says_too_much(record: dict[str, object], card: dict[str, object], said: list[str]) -> None:
    found = warnings(msgspec.structs.replace(MODEL, **record), msgspec.structs.replace(CARD, **card))
    assert len(found) == len(said)
    assert all(part in warning for part, warning in zip(said, found, strict=True)), found


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert warnings(msgspec.structs.replace(MODEL, context_length=10**9), None) == []


def test_a_download_is_told_in_few_words() -> None:
    assert download("pulling manifest", 0, 0) == "pulling manifest"
    assert download("pulling b179c9523d0e", 25 * 2**20, 100 * 2**20) == "downloading: 25 % of 100.0 MiB"
