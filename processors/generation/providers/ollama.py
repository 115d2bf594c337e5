"""Ollama as a provider, through its official client.

Ollama cuts a prompt that is too long without a word, and drops its beginning while it generates beyond the context.
Neither happens here: a prompt that cannot be proven to fit by its bytes is counted by the server first (one token of
answer; the real request then finds the prompt in the server's cache), and `num_predict` never goes beyond the context.
Servers from 0.12 on take `truncate: false`, which the official client (0.6) cannot send.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import httpx
import msgspec
from ollama import AsyncClient, ChatResponse, ListResponse, ShowResponse

from headrace import units
from headrace.errors import ContextLengthExceeded, ProviderError
from processors.generation.providers import ollama_body, ollama_facts, parameters
from processors.generation.providers.base import (
    DIGEST_DIGITS,
    BackendModel,
    Choices,
    DeviceKind,
    Done,
    Finish,
    LoadedModel,
    ModelFacts,
    Piece,
    Provider,
    Text,
)
from processors.generation.providers.chat import choices_of
from processors.generation.providers.fanout import fan_out
from processors.generation.providers.ollama_errors import CLIENT_ERRORS, may_retry, translate, translated
from processors.generation.providers.pool import BACKOFF_S, Pool
from schemas.control import Model
from schemas.events import Usage

KEEP = -1
"""keep_alive: for ever; leases decide when a model goes, not the server's clock."""
UNLOAD_TIMEOUT_S = 30.0
POLL_S = 0.05
LOGPROBS_SINCE = (0, 12, 11)

Progress = Callable[[str, int, int], None]
"""Called with a status text, bytes done and bytes in all (0 where unknown)."""


class Ollama(Provider):
    """A server that somebody else runs, and that may load and evict for others too."""

    def __init__(
        self,
        name: str,
        client: AsyncClient,
        pool: Pool,
        *,
        memory_bytes: int | None = None,
        parallel: int = 1,
        pull: bool = False,
    ) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        """Memory that the server's machine gives to models; None when leases are not about it."""
        self._parallel = parallel
        self._pulls = pull
        self._pulling: dict[str, str] = {}
        """Models that are being downloaded -> how far."""
        self._client = client
        self._pool = pool
        self._where = f"provider {name!r} ({pool.endpoint})"
        self._loaded: dict[str, Model] = {}
        self._margins: dict[str, tuple[int, int]] = {}
        self._has_logprobs: bool | None = None

    async def health(self) -> None:
        """Return when the server tells its version. Raises `ProviderError`."""
        await self._version()

    async def list(self) -> builtins.list[BackendModel]:
        """The models that the server has on disk. Raises `ProviderError`."""
        with translated(self._where):
            listed = await self._client.list()
        return [BackendModel(tag=one.model or "", bytes=int(one.size or 0)) for one in listed.models]

    async def device_kind(self, gpus: Sequence[str]) -> DeviceKind:
        """`own` when its machine's memory for models is set; the worker's devices are never its."""
        return "none" if self.memory_bytes is None else "own"

    async def inspect(self, model: Model) -> ModelFacts:
        """What the server tells of the model, and the memory it will take there. Raises `ProviderError`."""
        with translated(self._where):
            shown = await self._client.show(model.backend_tag)
        listed = await self._listed(model.backend_tag)
        size = int(listed.size or 0) if listed is not None else 0
        found = ollama_facts.facts(shown, size, model.context_length, self._parallel)
        return found if self.memory_bytes is not None else msgspec.structs.replace(found, bytes=0)

    async def version(self, model: Model) -> str:
        """The digest that the server tells of the model's manifest. Raises `ProviderError` when it is not there."""
        listed = await self._listed(model.backend_tag)
        if listed is None:
            raise ProviderError(f"{self._where} has no model {model.backend_tag!r}")
        return (listed.digest or "")[:DIGEST_DIGITS]

    def progress(self, model: Model) -> str:
        """How far a download is."""
        return self._pulling.get(model.id, "")

    async def load(self, model: Model, device: str = "") -> LoadedModel:
        """Bring the model into the server's memory and keep it there; it is downloaded before, with the option `pull`.

        Raises `ProviderError`, also after a download when the model takes more than was granted: it can be loaded now
        that its size is known.
        """
        if self._pulls and await self._listed(model.backend_tag) is None:
            await self._download(model)
        with translated(self._where):
            shown = await self._client.show(model.backend_tag)
            longest = ollama_body.trained_context(shown.modelinfo)
            if longest is not None and longest < model.context_length:
                raise ProviderError(
                    f"{self._where}: {model.backend_tag!r} holds {longest} tokens, less than the context_length of"
                    f" {model.context_length} of model {model.id!r}: lower context_length"
                )
            self._margins[model.id] = _margins(shown)
            await self._client.generate(model.backend_tag, keep_alive=KEEP, options=_size(model))
        size = _held(await self._running(), model.backend_tag)
        if size is None:
            raise ProviderError(f"{self._where} did not keep {model.backend_tag!r} in memory: is it too large?")
        self._loaded[model.id] = model
        return LoadedModel(model=model.id, tag=model.backend_tag, bytes=size)

    async def unload(self, model: Model) -> None:
        """Ask the server to drop the model and return when it is gone. Raises `ProviderError` if it stays.

        Models with the same tag are one in the server: it goes with the last of them.
        """
        self._loaded.pop(model.id, None)
        if self._in_use(model.backend_tag) or not await self._holds(model.backend_tag):
            return
        with translated(self._where):
            await self._client.generate(model.backend_tag, keep_alive=0)
        try:
            async with asyncio.timeout(UNLOAD_TIMEOUT_S):
                while await self._holds(model.backend_tag):  # noqa: ASYNC110  (the server tells no event)
                    await asyncio.sleep(POLL_S)
        except TimeoutError as problem:
            raise ProviderError(f"{self._where} still holds {model.backend_tag!r}: its memory is not free") from problem

    async def resident(self) -> builtins.list[LoadedModel]:
        """What the server holds, with its bytes on the GPU, or in memory where there is none.

        Several models with the same tag are one in the server: each is told with all its bytes.
        """
        running = await self._running()
        ours = [(one, _held(running, one.backend_tag)) for one in self._loaded.values()]
        return [
            *(LoadedModel(one.id, one.backend_tag, size) for one, size in ours if size is not None),
            *(LoadedModel("", tag, size) for tag, size in running.items() if not self._in_use(tag)),
        ]

    def same_backend_model(self, tag: str, other: str) -> bool:
        """Whether two tags mean one model; one without a version means the latest."""
        return ollama_body.same_model(tag, other)

    async def count_prompt(self, model: Model, body: Mapping[str, object], *, emitted: str = "") -> int | None:
        """Exact prompt tokens, by generating one token; raises `ContextLengthExceeded` where the server would cut.

        None with `emitted`: the server ends what the assistant has said, which adds tokens that are no part of it.
        """
        if emitted:
            return None
        return await self._count(model, await self._prepare(model, body))

    def generate(
        self, model: Model, body: Mapping[str, object], *, emitted: str = "", adapter: str = ""
    ) -> AsyncGenerator[builtins.list[Piece], None]:
        """See `Provider.generate`; `ollama_body` says which parameters are honoured. `emitted` is always empty."""
        return self._generate(model, body)

    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """One vector a text; a text over the context is refused, not cut."""
        with translated(self._where):
            answer = await self._client.embed(
                model.backend_tag, texts, truncate=False, keep_alive=KEEP, options=_size(model)
            )
        return [builtins.list(vector) for vector in answer.embeddings]

    async def on_dead(self, model: Model) -> bool:
        """Whether the server no longer holds a model that was loaded: it restarted, or evicted it for another."""
        return model.id in self._loaded and not await self._holds(model.backend_tag)

    async def close(self) -> None:
        """Close every connection; models stay as they are."""
        await self._pool.close()
        await self._client.close()  # type: ignore[no-untyped-call]

    async def pull(self, tag: str, progress: Progress) -> None:
        """Download a model to the server. Raises `ProviderError`."""
        with translated(self._where):
            async for step in await self._client.pull(tag, stream=True):
                progress(step.status or "", step.completed or 0, step.total or 0)

    async def _download(self, model: Model) -> None:
        def told(status: str, done: int, total: int) -> None:
            self._pulling[model.id] = ollama_facts.download(status, done, total)

        told("pulling", 0, 0)
        try:
            await self.pull(model.backend_tag, told)
        finally:
            del self._pulling[model.id]
        takes = (await self.inspect(model)).bytes
        if takes > model.bytes > 0:
            raise ProviderError(
                f"{self._where}: {model.backend_tag!r} was downloaded; it takes {units.size(takes)} and"
                f" {units.size(model.bytes)} were granted, so that it is loaded anew"
            )

    async def create(self, tag: str, gguf: Path, progress: Progress) -> None:
        """Make a model on the server out of a GGUF file. Raises `ProviderError`."""
        digest = f"sha256:{await asyncio.to_thread(_sha256, gguf)}"
        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
            # A server that has the file answers without reading it, which the client takes for a broken connection.
            await self._client.create_blob(gguf)
        with translated(self._where):
            async for step in await self._client.create(tag, files={gguf.name: digest}, stream=True):
                progress(step.status or "", step.completed or 0, step.total or 0)

    async def _generate(self, model: Model, body: Mapping[str, object]) -> AsyncGenerator[builtins.list[Piece], None]:
        choices = choices_of(body)
        request = await self._prepare(model, body)
        request.options["num_predict"] = await self._room(model, request, parameters.max_tokens(body))
        streams = [self._choice(model, ollama_body.for_choice(request, index)) for index in range(choices)]
        async with contextlib.aclosing(fan_out(streams)) as stream:
            async for batch in stream:
                yield batch

    async def _choice(self, model: Model, request: ollama_body.Request) -> AsyncGenerator[builtins.list[Piece], None]:
        calls = 0
        async with contextlib.aclosing(self._parts(model, request)) as parts:
            async for part in parts:
                batch: builtins.list[Piece] = []
                said, found = part.message, part.message.tool_calls or ()
                if said.thinking or found or part.logprobs:
                    made = [{"name": one.function.name, "arguments": one.function.arguments} for one in found]
                    logprobs = [one.model_dump(exclude_none=True) for one in part.logprobs or ()]
                    choice = ollama_body.delta(said.content, said.thinking, made, logprobs, calls)
                    calls += len(made)
                    batch.append(Choices(msgspec.json.encode([choice]), max(1, len(logprobs))))
                elif said.content:
                    batch.append(Text(0, said.content))
                if part.done:
                    yield [*batch, *self._end(model, part, called=calls > 0)]
                    return
                if batch:
                    yield batch
        raise ProviderError(f"{self._where} ended its stream in the middle of the answer: its runner probably died")

    def _end(self, model: Model, part: ChatResponse, *, called: bool) -> builtins.list[Piece]:
        reason = ollama_body.REASONS.get(part.done_reason or "")
        if reason is None:
            raise ProviderError(f"{self._where} ended the answer for a reason of its own: {part.done_reason!r}")
        prompt, completion = part.prompt_eval_count or 0, part.eval_count or 0
        if prompt >= model.context_length:
            raise self._too_long(model)
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        return [Finish(0, "tool_calls" if called and reason == "stop" else reason), Done(usage)]

    async def _parts(self, model: Model, request: ollama_body.Request) -> AsyncGenerator[ChatResponse, None]:
        """The stream's parts; failures before the first one are retried where that is safe."""
        for pause in (*BACKOFF_S, None):
            begun = False
            try:
                stream = await self._client.chat(
                    model.backend_tag,
                    request.messages,
                    tools=request.tools,
                    stream=True,
                    logprobs=request.logprobs,
                    top_logprobs=request.top_logprobs,
                    format=request.format,
                    options=request.options,
                    keep_alive=KEEP,
                )
                async with contextlib.aclosing(cast(AsyncGenerator[ChatResponse, None], stream)):
                    async for part in stream:
                        begun = True
                        yield part
                return
            except CLIENT_ERRORS as problem:
                if begun or pause is None or not may_retry(problem):
                    raise translate(self._where, problem) from problem
                await asyncio.sleep(pause)

    async def _prepare(self, model: Model, body: Mapping[str, object]) -> ollama_body.Request:
        if self._has_logprobs is None:
            self._has_logprobs = await self._version() >= LOGPROBS_SINCE
        return ollama_body.prepare(body, model.context_length, has_logprobs=self._has_logprobs)

    async def _room(self, model: Model, request: ollama_body.Request, wanted: int | None) -> int:
        """Tokens that the answer may have. Raises `ContextLengthExceeded` when the prompt leaves none."""
        if wanted is not None and self._at_most(model, request) + wanted <= model.context_length:
            return wanted
        room = model.context_length - await self._count(model, request)
        return room if wanted is None else min(room, wanted)

    async def _count(self, model: Model, request: ollama_body.Request) -> int:
        without = ollama_body.without_first(request)
        shorter = None
        if without is not None and self._at_most(model, request) > model.context_length:
            shorter = await self._evaluated(model, without)
        count = await self._evaluated(model, request)
        if count >= model.context_length or count == shorter:
            raise self._too_long(model)
        return count

    async def _evaluated(self, model: Model, request: ollama_body.Request) -> int:
        """Prompt tokens that the server evaluates, after whatever it cuts."""
        with translated(self._where):
            answer = await self._client.chat(
                model.backend_tag,
                request.messages,
                tools=request.tools,
                options={**request.options, "num_predict": 1},
                keep_alive=KEEP,
            )
        if answer.prompt_eval_count is None:
            raise ProviderError(f"{self._where} does not say how many tokens it read: its prompts cannot be checked")
        return answer.prompt_eval_count

    def _at_most(self, model: Model, request: ollama_body.Request) -> int:
        """A bound on the prompt's tokens: its bytes, and the template's own, once and for each message."""
        once, each = self._margins.get(model.id, (model.context_length, 0))
        return request.bytes + once + each * len(request.messages)

    def _too_long(self, model: Model) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"the prompt does not fit the {model.context_length} tokens of model {model.id!r}: shorten it",
            param="messages",
        )

    async def _listed(self, tag: str) -> ListResponse.Model | None:
        """What the server tells of a model that it has on disk."""
        with translated(self._where):
            listed = await self._client.list()
        return next((one for one in listed.models if ollama_body.same_model(one.model or "", tag)), None)

    async def _holds(self, tag: str) -> bool:
        return _held(await self._running(), tag) is not None

    def _in_use(self, tag: str) -> bool:
        return any(ollama_body.same_model(tag, one.backend_tag) for one in self._loaded.values())

    async def _running(self) -> dict[str, int]:
        """Bytes of every model that the server holds, by its full name."""
        with translated(self._where):
            held = await self._client.ps()
        return {one.model or "": int(one.size_vram or 0) or int(one.size or 0) for one in held.models}

    async def _version(self) -> tuple[int, ...]:
        answer = await self._pool.call("GET", "/api/version")
        try:
            text = msgspec.json.decode(answer, type=dict[str, str])["version"]
        except (msgspec.DecodeError, KeyError) as problem:
            raise ProviderError(f"{self._where} is not an Ollama server") from problem
        return tuple(int(part) for part in text.split("-")[0].split("+")[0].split(".") if part.isdigit())


def _held(running: Mapping[str, int], tag: str) -> int | None:
    return next((size for name, size in running.items() if ollama_body.same_model(name, tag)), None)


def _size(model: Model) -> dict[str, int]:
    return {"num_ctx": model.context_length}


def _margins(shown: ShowResponse) -> tuple[int, int]:
    """Bytes that template and system prompt can add to a prompt: once, and for each message."""
    licence = shown.license if isinstance(shown.license, str) else "".join(shown.license or ())
    once = len((shown.modelfile or "").encode()) - len(licence.encode())
    each = len((shown.template or "").encode())
    return max(once, each), each


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
