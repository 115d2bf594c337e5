"""The answer to a chat request: an ASGI response that waits for the first frame before it sends a status."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from headrace import metrics
from headrace.errors import HeadraceError, Unavailable
from headrace.openai_objects import completion
from ingress.http_errors import error_response
from ingress.openai.following import Following
from ingress.openai.render import KEEP_ALIVE, ChunkRenderer
from ingress.services import Services
from schemas.control import Key
from schemas.events import ErrorInfo, Status, Terminal
from schemas.ids import PublicId
from schemas.openai import ChatCompletionRequest

DROPPED_GRACE_S = 30.0
REVOKED = "The key, its user or its app was revoked."

DIRECT_SEND = "headrace.send"
"""The server's own `send` in the scope: the body of a stream need not pass each middleware a token."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Which request is answered."""

    public: PublicId
    digest: str
    resume_s: int
    first: bool
    """Whether this caller's request is published; otherwise it attaches to one that was."""
    listed: bool
    """Whether the publisher's own caller is listed in Redis from the start: others are expected to attach."""


class ChatAnswer(Response):
    """Streams, or collects, one request's answer to one caller."""

    media_type = None

    def __init__(
        self,
        services: Services,
        key: Key,
        ticket: Ticket,
        body: ChatCompletionRequest,
        *,
        model: str = "",
        after: tuple[int, int] | None = None,
        limits: Mapping[str, str] | None = None,
    ) -> None:
        """`model` is the id of the one that the body names, where it names one and that is known.

        `limits` are the `x-ratelimit-*` headers of its admission.
        `after` is the (attempt, seq) of the last event that a resuming caller has seen; (1, 0) for none.
        """
        super().__init__()
        self._services = services
        self._key = key
        self._tenant = key.app
        self._revoked: ErrorInfo | None = None
        """Why the caller may not have the rest, once that is so."""
        self._ticket = ticket
        self._streamed = bool(body.stream)
        self._alias = body.model
        self._model = model
        """Id of the model that serves, as far as it is known."""
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._after = after
        self._limits = dict(limits or {})
        self._choices = body.n or 1
        self._following = Following(services, ticket.public, seen=after[1] if after else 0, steps=self._streamed)
        self._began = time.monotonic()

    def attach(self) -> None:
        """Take part in the reply partition from now on; before the request is published, so that no frame is missed."""
        self._following.attach()

    def detach(self) -> None:
        """Leave the reply partition."""
        self._following.detach()

    # --- answering --------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the caller."""
        request_id = self._ticket.public.request_id
        shared = not self._ticket.first or self._ticket.listed
        if self._after is not None:
            self._following.replay()  # A caller that resumes wants the steps after the one that it saw last.
        elif not self._ticket.first:
            await self._following.join()
        if shared:
            await self._services.attachments.attach(request_id, origin_listed=self._ticket.listed)
        watcher = asyncio.create_task(self._watch(receive))
        self._services.replies.opened(self._following.stream)
        self._services.revocations.enter(self._key, self._revoke)
        try:
            if self._streamed:
                # A task of its own: a token then wakes this one coroutine, not the dozen of the web framework above it.
                await asyncio.create_task(self._send_stream(scope, receive, send))
            else:
                await self._send_whole(scope, receive, send)
        finally:
            watcher.cancel()
            self._services.revocations.leave(self._key, self._revoke)
            self._services.replies.closed(self._following.stream)
            self.detach()
            ended = self._following.terminal is not None
            if shared:
                await self._services.attachments.detach(request_id)
            elif not ended:
                await self._services.attachments.origin_left(request_id)
            if not ended:
                self._leave()

    async def _watch(self, receive: Receive) -> None:
        while True:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                self._following.leave()
                return

    def _revoke(self, error: HeadraceError) -> None:
        """The caller's key, user or app was revoked: end its answer now."""
        self._revoked = error.info()
        self._following.stream.wake()

    @property
    def _broken_off(self) -> bool:
        """Whether the caller must go before the end."""
        return self._revoked is not None or self._following.broken_off

    async def _told(self, terminal: Terminal) -> Terminal:
        """The end as the caller is told it: what was cancelled since its key was revoked says so."""
        if terminal.status is Status.CANCELLED and self._revoked is None:
            with contextlib.suppress(Unavailable):
                why = await self._services.revocations.why(self._key)
                self._revoked = why.info() if why is not None else None
        if terminal.status is not Status.CANCELLED or self._revoked is None:
            return terminal
        return msgspec.structs.replace(terminal, error=self._revoked)

    def _leave(self) -> None:
        """The caller went, or we dropped it, before the end."""
        grace: float = self._ticket.resume_s
        if self._revoked is not None and self._ticket.first:
            # The scheduler ends all requests of a revoked key too; what is known here is ended sooner.
            self._services.attachments.revoked(self._ticket.public.request_id, self._tenant, REVOKED)
            return
        if self._following.stream.dropped:
            metrics.CALLERS_DROPPED.inc()
            grace = max(grace, DROPPED_GRACE_S)
        if self._services.draining.is_set() and not self._following.gone.is_set():
            return  # It was told to resume elsewhere; the request runs on.
        self._services.attachments.left(self._ticket.public.request_id, self._tenant, grace)

    # --- whole ------------------------------------------------------------------------------------------------

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        following = self._following
        while following.terminal is None and not following.gone.is_set():
            if self._broken_off:
                await error_response(self._stopping(), self._ticket.public.request_id)(scope, receive, send)
                return
            await following.next()
        if following.terminal is None:
            return
        terminal = await self._told(following.terminal)
        self._observe(terminal)
        if terminal.error is not None:
            await error_response(terminal.error, terminal.request_id, self._limits)(scope, receive, send)
            return
        public = self._ticket.public
        self._model = terminal.model
        content = completion(str(public), public.created_ms // 1000, self._shown(), terminal)
        headers = self._answer_headers()
        await Response(content, media_type="application/json", headers=headers)(scope, receive, send)

    # --- streamed ---------------------------------------------------------------------------------------------

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        public = self._ticket.public
        renderer = ChunkRenderer(str(public), public.created_ms // 1000, self._alias, include_usage=self._include_usage)
        if self._after is not None and self._after[1] > 0:
            renderer.opened(set(range(self._choices)))
        direct: Send = scope.get(DIRECT_SEND, send)
        following = self._following
        stream = following.stream
        stream.abort = _abort_of(direct)
        clock = asyncio.get_running_loop().time
        begun = rendered = False
        tokens = 0
        first_status_at = self._began + self._services.settings.first_status_timeout
        while not following.gone.is_set():
            if self._broken_off:
                await self._break_off(scope, receive, send, renderer, begun)
                return
            steps = await following.next()
            terminal = following.terminal
            if not steps and terminal is None:
                if following.gone.is_set() or self._broken_off:
                    continue
                if not begun and time.monotonic() < first_status_at:
                    continue
                if not begun:
                    begun = await self._begin(send)
                await direct({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                continue
            if not rendered:
                self._learn(renderer)
            events = bytearray()
            for step in steps:
                events += renderer.delta(step)
                tokens += step.tokens
            rendered = rendered or bool(steps)
            if terminal is not None:
                terminal = await self._told(terminal)
                self._observe(terminal)
                if not begun and terminal.error is not None and not events:
                    await error_response(terminal.error, terminal.request_id, self._limits)(scope, receive, send)
                    return
                events += renderer.end(terminal)
            if not begun:
                begun = await self._begin(send)
                metrics.TTFT.observe(time.monotonic() - self._began)
            stream.writing_since = clock()
            await direct({"type": "http.response.body", "body": bytes(events), "more_body": terminal is None})
            stream.writing_since = 0.0
            if terminal is not None:
                metrics.TOKENS_OUT.inc(tokens)
                return

    async def _begin(self, send: Send) -> bool:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._answer_headers(),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        return True

    async def _break_off(
        self, scope: Scope, receive: Receive, send: Send, renderer: ChunkRenderer, begun: bool
    ) -> None:
        """End a stream that goes on without this caller, and say how to resume it."""
        error = self._stopping()
        if not begun:
            await error_response(error, self._ticket.public.request_id)(scope, receive, send)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await send({"type": "http.response.body", "body": renderer.error(error), "more_body": False})

    def _stopping(self) -> ErrorInfo:
        if self._revoked is not None:
            return self._revoked
        why = "The caller read too slowly" if self._following.stream.dropped else "This ingress is stopping"
        path = f"/v1/chat/completions/{self._ticket.public}/stream"
        return Unavailable(f"{why}; resume with GET {path} and Last-Event-ID.", retry_after_s=1).info()

    def _learn(self, renderer: ChunkRenderer) -> None:
        """Name the model that serves, once that is known, in all of the stream's chunks.

        The router's frame comes before the first delta; where it was not seen, a result that was found whole tells.
        """
        following = self._following
        found = following.stream.model or (following.terminal.model if following.terminal is not None else "")
        if found and found != self._model:
            self._model = found
            renderer.name(self._shown())

    def _shown(self) -> str:
        """The model's name in the answer: as the caller wrote it if that names the model, else the model's id."""
        with contextlib.suppress(Unavailable):
            served = self._services.registry.snapshot.models.get(self._model)
            if served is not None and self._alias not in (served.id, *served.aliases):
                return served.id
        return self._alias

    def _answer_headers(self) -> dict[str, str]:
        headers = {"x-request-id": self._ticket.public.request_id, "x-hr-stream-id": str(self._ticket.public)}
        return headers | self._limits | ({"x-hr-model": self._model} if self._model else {})

    def _observe(self, terminal: Terminal) -> None:
        metrics.REQUEST_SECONDS.labels(status=terminal.status.value).observe(time.monotonic() - self._began)


def _abort_of(send: Send) -> Callable[[], None]:
    """How to cut the connection under the server's `send`: ASGI cannot, and a full socket never closes itself."""
    cycle = getattr(send, "__self__", None)  # uvicorn's RequestResponseCycle
    abort: Callable[[], None] | None = getattr(getattr(cycle, "transport", None), "abort", None)
    return abort if abort is not None else lambda: None
