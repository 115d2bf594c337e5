"""Texts that were cut go on, on the real engine: with temperature 0 nobody can tell that they were."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from bench.gateway.spec import Spec
from bench.gateway.tally import Stats
from headrace.errors import ProviderError, ProviderRefused
from processors.generation.attempt import Attempt
from processors.generation.bodies import Bodies
from processors.generation.frames_out import FrameWriter
from processors.generation.providers.base import Done, Finish, Piece, Text
from processors.generation.providers.factory import make_provider
from schemas import control
from schemas.control import Model
from schemas.events import BodyRef, ErrorInfo, GenerateCommand, Routed, Status, Terminal, Usage
from tests.support.backends import MAKERS, Backend
from tests.support.chat import body, fresh, numbers
from tests.support.recorder import Recorder
from tests.support.stacks import NO_TLS
from topics import frames
from topics.cluster import Cluster
from topics.outcomes import Outcomes

Pieces = AsyncIterator[list[Piece]]
TOKENS = 40
ASK = [
    {"role": "system", "content": "You answer in a few sentences."},
    {"role": "user", "content": "Tell me about photosynthesis."},
]
ACCENTS = [
    {"role": "system", "content": "You answer in a few sentences."},
    {"role": "user", "content": "Tell me about photosynthesis, with the words cafe\u0301 and na\u00efve in it."},
]
"""The answer has letters of several tokens, about 80 tokens from its beginning."""


@pytest.fixture(scope="session", params=["llama_cpp", "openai"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    async with MAKERS[request.param]() as made:
        await made.provider.load(made.model)
        yield made


async def generated(backend: Backend, *, emitted: str = "", **fields: object) -> list[Piece]:
    asked = {"messages": ASK, "temperature": 0.0, **fields}
    batches = backend.provider.generate(backend.model, asked, emitted=emitted)
    return [piece async for batch in batches for piece in batch]


def texts(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces if isinstance(piece, Text)]


def ending(pieces: list[Piece]) -> tuple[str, Usage]:
    finish, done = pieces[-2:]
    assert isinstance(finish, Finish) and isinstance(done, Done) and done.usage is not None
    return finish.reason, done.usage


@pytest.mark.parametrize("limit", [TOKENS, 200], ids=["cut short", "to its own end"])
async def test_a_cut_text_goes_on_as_if_it_had_not_been_cut(backend: Backend, limit: int) -> None:
    whole = await generated(backend, max_tokens=limit)
    said, (reason, usage) = texts(whole), ending(whole)
    ends = {1, len(said) - 1}
    cuts = (
        ends | {2, 3, 7, len(said) // 3, len(said) // 2, len(said) - 2} if limit == TOKENS else ends | {len(said) // 2}
    )
    for cut in sorted(cuts):
        emitted = "".join(said[:cut])
        rest = await generated(backend, emitted=emitted, max_tokens=limit - cut)
        assert emitted + "".join(texts(rest)) == "".join(said), f"cut after {cut} tokens: {emitted!r}"
        again, more = ending(rest)
        assert again == reason
        assert more.prompt_tokens + more.completion_tokens == usage.prompt_tokens + usage.completion_tokens, cut


@pytest.mark.parametrize(
    ("how", "added"),
    [("prefill", {}), ("vllm", {"add_generation_prompt": False, "continue_final_message": True})],
)
async def test_a_server_is_asked_to_go_on_in_its_own_way(upstream_url: str, how: str, added: dict[str, bool]) -> None:
    provider = make_provider(control.Provider("p", "openai", upstream_url, options={"continues": how}))
    model = Model(id="m", provider="p", backend_tag="bench")
    spec = Spec(tokens=6, interval_ms=1, id=fresh("way"), keep_body=True)
    emitted = " t0@1 t1@2"
    for said in ("", emitted):
        batches = provider.generate(model, body(spec), emitted=said)
        text = "".join(texts([piece async for batch in batches for piece in batch]))
        assert numbers(text) == list(range(len(numbers(said)), 6))
    await provider.close()
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        stats = await client.get(f"{upstream_url.removesuffix('/v1')}/stats", params={"id": spec.id})
    first, second = (
        msgspec.json.decode(one.body or "") for one in msgspec.json.decode(stats.content, type=Stats).ids[spec.id].tries
    )
    assert second == {**first, **added, "messages": [*first["messages"], {"role": "assistant", "content": emitted}]}


# --- a whole attempt ----------------------------------------------------------------------------------------------


async def attempted(
    backend: Backend, emitted: str, tokens: int, *, small: bool = False, another_engine: bool = False, **fields: object
) -> Recorder:
    """What attempt 2 writes that goes on from `emitted`, whose frames ended at seq 30."""
    asked = msgspec.Raw(msgspec.json.encode({"messages": ASK, "temperature": 0.0, **fields}))
    routed = Routed(
        "0" * 32, "t", "k", "m", "m", "default", 0, BodyRef(0, 0), asked, stream=True, prompt_tokens_estimate=9,
        continuable=True,
    )  # fmt: skip
    command = GenerateCommand(
        1, "b", 2, 3, 0, routed, after_seq=30, emitted=emitted, tokens=tokens, first_token_ms=1_000
    )
    provider, model = backend.small if small else (backend.provider, backend.model)
    await provider.load(model)
    recorder = Recorder()

    def fail(error: BaseException) -> None:
        raise error

    async def engine_again() -> bool:
        return another_engine

    attempt = Attempt(
        command, model, provider, worker="w", writer=FrameWriter(recorder, fail),
        outcomes=Outcomes(recorder, "worker", "w"), bodies=Bodies(Cluster("nowhere")), engine_again=engine_again,
    )  # fmt: skip
    await attempt.run()
    return recorder


def content(terminal: Terminal) -> tuple[str, str | None]:
    [choice] = msgspec.json.decode(terminal.choices)
    return choice["message"]["content"], choice["finish_reason"]


async def test_an_attempt_that_goes_on_tells_the_rest_and_ends_with_the_whole(backend: Backend) -> None:
    whole = await generated(backend, max_tokens=TOKENS)
    said, (reason, usage) = texts(whole), ending(whole)
    emitted = "".join(said[:9])
    wrote = await attempted(backend, emitted, 9, max_tokens=TOKENS)
    told, terminal = wrote.told(), wrote.terminal()
    assert [delta.seq for delta in told] == list(range(31, 31 + len(told)))
    assert {delta.attempt for delta in told} == {2}
    assert emitted + "".join(delta.data for delta in told if delta.kind == frames.Kind.TEXT) == "".join(said)
    assert content(terminal) == ("".join(said), reason)
    assert (terminal.status, terminal.attempt, terminal.epoch) == (Status.COMPLETED, 2, 3)
    assert terminal.last_seq == told[-1].seq - 1, "the last one is the terminal's own"
    assert terminal.usage.prompt_tokens == usage.prompt_tokens
    assert terminal.usage.completion_tokens == usage.completion_tokens
    assert terminal.timings.first_token_ms == terminal.timings.started_ms == 1_000


@pytest.mark.parametrize("cut", [1, 9])
async def test_an_answer_whose_engine_dies_goes_on_on_the_next_one(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    whole = await generated(backend, max_tokens=TOKENS)
    said, (reason, usage) = texts(whole), ending(whole)
    generate = backend.provider.generate

    async def dying(model: Model, body: dict[str, object], *, emitted: str = "", adapter: str = "") -> Pieces:
        given = 0
        async for batch in generate(model, body, emitted=emitted, adapter=adapter):
            for piece in batch:
                if not emitted and given == cut:
                    raise ProviderError("The engine died.")
                given += 1
                yield [piece]

    monkeypatch.setattr(backend.provider, "generate", dying)
    wrote = await attempted(backend, "", 0, another_engine=True, max_tokens=TOKENS)
    told, terminal = wrote.told(), wrote.terminal()
    assert [delta.seq for delta in told] == list(range(31, 31 + len(told))), "one stream, without a gap"
    assert "".join(delta.data for delta in told if delta.kind == frames.Kind.TEXT) == "".join(said)
    assert (terminal.status, content(terminal)) == (Status.COMPLETED, ("".join(said), reason))
    assert terminal.usage.prompt_tokens == usage.prompt_tokens, "the prompt is billed once"
    assert terminal.usage.completion_tokens == usage.completion_tokens
    only = (await attempted(backend, "", 0, another_engine=False, max_tokens=TOKENS)).terminal()
    assert only.status is Status.FAILED and content(only)[0] == "".join(said[:cut]), "what was sent is all there is"


async def test_letters_of_several_tokens_are_counted_whole(backend: Backend) -> None:
    limit = 110
    whole = await generated(backend, messages=ACCENTS, max_tokens=limit)
    said, (reason, usage) = texts(whole), ending(whole)
    assert reason == "length" and len(said) < usage.completion_tokens == limit, "no piece holds more than one token"
    cut = len(said) - 2
    terminal = (await attempted(backend, "".join(said[:cut]), cut, messages=ACCENTS, max_tokens=limit)).terminal()
    assert content(terminal) == ("".join(said), "length")
    assert (terminal.usage.prompt_tokens, terminal.usage.completion_tokens) == (usage.prompt_tokens, limit)
    # Frames count fewer than that, so it is the engine's count that leaves nothing to generate.
    full = (await attempted(backend, "".join(said), len(said), messages=ACCENTS, max_tokens=limit)).terminal()
    assert content(full) == ("".join(said), "length")
    assert full.usage.completion_tokens == limit


async def test_a_stop_text_that_began_before_the_cut_ends_the_attempt(backend: Backend) -> None:
    said = texts(await generated(backend, max_tokens=TOKENS))
    cut = next(at for at in range(5, len(said) - 3) if len(said[at].strip()) > 1)
    emitted = "".join(said[: cut + 1])
    stop = emitted[-2:] + "".join(said[cut + 1 : cut + 3])
    assert stop not in emitted
    terminal = (await attempted(backend, emitted, cut + 1, max_tokens=TOKENS, stop=stop)).terminal()
    assert content(terminal) == (emitted, "stop")
    assert terminal.usage.completion_tokens == cut + 1


async def test_a_text_that_fills_the_context_ends_with_length(backend: Backend) -> None:
    emitted = "sea wave sand wind " * 80
    terminal = (await attempted(backend, emitted, 320, small=True)).terminal()
    assert (terminal.status, terminal.error) == (Status.COMPLETED, None)
    assert content(terminal) == (emitted, "length")
    assert abs(terminal.usage.completion_tokens - 320) <= 1, "a space at the end is a token"
    await backend.provider.load(backend.model)


async def test_what_the_engine_refuses_to_continue_fails_with_what_was_sent(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Templates of models that think refuse a beginning; this model's takes every one.
    def refused(*_: object, **__: object) -> AsyncIterator[list[Piece]]:
        raise ProviderRefused("Assistant response prefill is incompatible with enable_thinking.")

    monkeypatch.setattr(backend.provider, "generate", refused)
    terminal = (await attempted(backend, "one two", 2)).terminal()
    assert terminal.status is Status.FAILED
    assert isinstance(terminal.error, ErrorInfo) and terminal.error.code == "worker_lost"
    assert content(terminal) == ("one two", None)
    assert terminal.usage.completion_tokens == 2 and terminal.usage.prompt_tokens > 0
    assert terminal.last_seq == 30
