"""The engine's endpoint: the part of OpenAI's API that the worker's provider uses, as a plain ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeVar

import jinja2
import msgspec

from processors.generation.providers.hf.adapters import Adapters
from processors.generation.providers.hf.answer import Answer, Event
from processors.generation.providers.hf.ask import Ask, Refusal, Writer, conversation, wishes
from processors.generation.providers.hf.engine import Engine
from processors.generation.providers.hf.forms import FormError, Forms
from processors.generation.providers.hf.loading import Loaded
from processors.generation.providers.hf.sampling import Sampler

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Made = TypeVar("Made")

ALIVE_S = 15.0
"""A comment is sent when nothing else was for so long, and the engine does not hang: a long prompt is not to be taken
for a dead engine."""


class App:
    """Serves one loaded model; runs on one event loop, beside the engine's thread."""

    def __init__(
        self, loaded: Loaded, *, alias: str, api_key: str, context: int, slots: int, budget: int, step_s: float
    ) -> None:
        """`step_s` is how long a step of the engine may take; see `Engine.hangs`."""
        self._loaded = loaded
        self._alias = alias
        self._authorization = f"Bearer {api_key}".encode()
        self._context = context
        self._step_s = step_s
        self._vocabulary = int(loaded.model.get_output_embeddings().weight.shape[0])
        self._forms = Forms(loaded.tokenizer, self._vocabulary, loaded.ends)
        self._encoding = threading.Lock()
        self._prepares: dict[object, float] = {}
        """When work on prompts began that threads of their own do now."""
        self._queues: dict[Answer, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.adapters = Adapters(loaded)
        self.adapter_faults: dict[str, str] = {}
        self.engine = Engine(loaded, self.adapters, slots=slots, budget=budget, deliver=self._deliver)
        said = loaded.model.generation_config
        self._defaults = said.to_dict() if said is not None and said.do_sample else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: one HTTP request."""
        if scope["type"] != "http":
            raise ValueError(f"no {scope['type']} is served here")
        self._loop = asyncio.get_running_loop()
        try:
            await self._route(scope, receive, send)
        except Refusal as refusal:
            await _answer(send, refusal.status, refusal.body)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._authorization):
            raise Refusal(401, "invalid_api_key", "the key is wrong")
        match scope["method"], scope["path"].removeprefix("/v1"):
            case "GET", "/health":
                if self._hangs:
                    raise Refusal(503, "engine_hangs", f"one step, or one prompt, takes over {self._step_s:g} s")
                await _answer(send, 200, b'{"status":"ok"}')
            case "GET", "/props":
                await _answer(send, 200, msgspec.json.encode(self._props()))
            case "GET", "/slots":
                busy = self.engine.busy
                slots = [{"id": slot, "is_processing": slot in busy} for slot in range(self.engine.slots)]
                await _answer(send, 200, msgspec.json.encode(slots))
            case "POST", "/chat/completions/input_tokens":
                prompt = await self._apart(self._encode, await _ask(receive))
                await _answer(send, 200, msgspec.json.encode({"input_tokens": len(prompt)}))
            case "POST", "/chat/completions":
                await self._chat(await _ask(receive), receive, send)
            case _:
                raise Refusal(404, "not_found", f"there is no {scope['method']} {scope['path']}")

    @property
    def _hangs(self) -> bool:
        now = time.monotonic()
        return self.engine.hangs(self._step_s) or any(now - began > self._step_s for began in self._prepares.values())

    async def _apart(self, work: Callable[[Ask], Made], ask: Ask) -> Made:
        """Work on a prompt, which takes long for a long one, in a thread of its own."""
        self._prepares[work_id := object()] = time.monotonic()
        try:
            return await asyncio.to_thread(work, ask)
        finally:
            del self._prepares[work_id]

    def _props(self) -> dict[str, object]:
        """What the worker reads at start; the form is llama-server's."""
        return {
            "default_generation_settings": {"n_ctx": self._context},
            "chat_template_caps": {"supports_tools": False},
            "adapter_faults": self.adapter_faults,
        }

    def _encode(self, ask: Ask) -> list[int]:
        """The prompt's tokens. Raises `Refusal` in the template's own words."""
        try:
            with self._encoding:
                return list(
                    self._loaded.tokenizer.apply_chat_template(
                        conversation(ask.messages),
                        add_generation_prompt=not ask.open_ended,
                        continue_final_message=ask.open_ended,
                        tokenize=True,
                        return_dict=False,
                    )
                )
        except (jinja2.TemplateError, ValueError) as problem:
            raise Refusal(400, "invalid_request", f"the model's chat template: {problem}", "messages") from problem

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _prepare(self, ask: Ask) -> Answer:
        """An answer that is ready to run. Raises `Refusal`."""
        if ask.adapter not in self.adapters:
            raise Refusal(400, "invalid_request", f"there is no adapter {ask.adapter!r}", "model")
        prompt = self._encode(ask)
        room = self._context - len(prompt)
        if room <= 0:
            text = f"the prompt has {len(prompt)} tokens, the model's context {self._context}: shorten it"
            raise Refusal(400, "context_length_exceeded", text, "messages")
        try:
            form = self._forms.of(ask.response_format)
        except FormError as problem:
            raise Refusal(400, "invalid_request", f"response_format: {problem}", "response_format") from problem
        return Answer(
            prompt,
            room=room if ask.max_tokens is None else min(room, ask.max_tokens),
            sampler=Sampler(wishes(ask, self._defaults, self._vocabulary), ask.seed),
            ends=self._loaded.ends,
            decode=self._decode,
            stops=ask.stops,
            form=form,
            top_logprobs=ask.top_logprobs if ask.logprobs else None,
            adapter=ask.adapter,
        )

    async def _chat(self, ask: Ask, receive: Receive, send: Send) -> None:
        answer = await self._apart(self._prepare, ask)
        queue = self._queues[answer] = asyncio.Queue()
        gone = asyncio.create_task(_disconnected(receive))
        writing = asyncio.create_task(self._write(answer, queue, send))
        self.engine.submit(answer)
        try:
            await asyncio.wait((gone, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.engine.cancel(answer)
            del self._queues[answer]
            gone.cancel()
            writing.cancel()
            await asyncio.gather(gone, writing, return_exceptions=True)

    async def _write(self, answer: Answer, queue: asyncio.Queue[Event], send: Send) -> None:
        writer = Writer(self._alias, f"chatcmpl-{uuid.uuid4().hex}", lambda: int(time.time()), self._decode)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        while True:
            try:
                async with asyncio.timeout(min(ALIVE_S, self._step_s / 4)):
                    events = [await queue.get()]
            except TimeoutError:
                if self._hangs:
                    continue  # Whoever reads finds that nothing comes, and asks how we are.
                await send({"type": "http.response.body", "body": b": alive\n\n", "more_body": True})
                continue
            while not queue.empty():
                events.append(queue.get_nowait())
            body = b"".join(writer.event(event) for event in events)
            last = events[-1]
            if last.reason is not None:
                body += writer.end(answer, last.reason)
            over = last.reason is not None or last.error is not None
            if body or over:
                await send({"type": "http.response.body", "body": body, "more_body": not over})
            if over:
                return

    def _deliver(self, events: Sequence[tuple[Answer, Event]]) -> None:
        """From the engine's thread: one wake of the loop a step."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: Sequence[tuple[Answer, Event]]) -> None:
        for answer, event in events:
            if (queue := self._queues.get(answer)) is not None:
                queue.put_nowait(event)


async def _ask(receive: Receive) -> Ask:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        return msgspec.json.decode(body, type=Ask)
    except msgspec.DecodeError as problem:
        raise Refusal(400, "invalid_request", str(problem)) from problem


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
