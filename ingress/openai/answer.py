"""The answer to a chat request: an ASGI response that waits for the first frame before it sends a status."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from headrace import metrics
from headrace.errors import Unavailable
from ingress.http_errors import error_response
from ingress.openai.render import KEEP_ALIVE, ChunkRenderer, completion
from ingress.replies import replay
from ingress.services import Services
from ingress.streams import Stream
from schemas.control import Key
from schemas.events import ErrorInfo, Status, Terminal
from schemas.ids import PublicId
from schemas.openai import ChatCompletionRequest
from topics.frames import Delta, Kind, Moved, StreamView

log = structlog.get_logger(__name__)

DROPPED_GRACE_S = 30.0
LOST_AFTER_SILENCES = 3
"""Silences after which frames that a stream misses are taken for lost."""

DIRECT_SEND = "headrace.send"
"""The server's own `send` in the scope: the body of a stream need not pass each middleware a token."""

_terminal = msgspec.json.Decoder(Terminal)


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
        after: tuple[int, int] | None = None,
    ) -> None:
        """`after` is the (attempt, seq) of the last event that a resuming caller has seen; (1, 0) for none."""
        super().__init__()
        self._services = services
        self._tenant = key.app
        self._ticket = ticket
        self._streamed = bool(body.stream)
        self._alias = body.model
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._after = after
        self._choices = body.n or 1
        self._stream = Stream(bytes.fromhex(ticket.public.request_id), StreamView(seq=after[1] if after else 0))
        self._attached = False
        self._replaying: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._ended: Terminal | None = None
        """The end of the request, as frames or log told it."""
        self._terminal: Terminal | None = None
        """The same, once the stream has all that comes before it."""
        self._seq = after[1] if after else 0
        """Last step of the answer that was rendered."""
        self._catching_up = False
        self._began = time.monotonic()
        self._log = log.bind(request_id=ticket.public.request_id)

    # --- attaching --------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Take part in the reply partition from now on; before the request is published, so that no frame is missed."""
        self._services.replies.attach(self._stream)
        self._attached = True

    def detach(self) -> None:
        """Leave the reply partition."""
        if self._attached:
            self._services.replies.detach(self._stream)
            self._attached = False
        if self._replaying is not None:
            self._replaying.cancel()
            self._replaying = None

    def _replay(self, partition: int, since_ms: int) -> None:
        """Read the frames from their partition's past, wherever that is, instead of from our own reader."""
        self.detach()
        self._stream.moved = None

        async def feed() -> None:
            bootstrap = self._services.settings.kafka_bootstrap
            async with contextlib.aclosing(replay(bootstrap, partition, since_ms, self._stream.rid)) as batches:
                async for batch in batches:
                    for delta in batch:
                        self._stream.push(delta)

        self._replaying = asyncio.create_task(feed())
        self._replaying.add_done_callback(self._replay_ended)

    def _replay_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("replay_failed", error=repr(error))

    # --- answering --------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the caller."""
        request_id = self._ticket.public.request_id
        shared = not self._ticket.first or self._ticket.listed
        if not self._ticket.first:
            await self._join()
        if shared:
            await self._services.attachments.attach(request_id, origin_listed=self._ticket.listed)
        watcher = asyncio.create_task(self._watch(receive))
        self._services.replies.opened(self._stream)
        try:
            if self._streamed:
                # A task of its own: a token then wakes this one coroutine, not the dozen of the web framework above it.
                await asyncio.create_task(self._send_stream(scope, receive, send))
            else:
                await self._send_whole(scope, receive, send)
        finally:
            watcher.cancel()
            self._services.replies.closed(self._stream)
            self.detach()
            if shared:
                await self._services.attachments.detach(request_id)
            elif self._terminal is None:
                await self._services.attachments.origin_left(request_id)
            if self._terminal is None:
                self._leave()

    async def _join(self) -> None:
        """Attach to a request that was published before: to its frames, or to its result if it has one.

        A caller that resumes wants the frames themselves, after the one that it saw last.
        """
        found = await self._ask_log() if self._after is None else None
        if found is None:
            self._replay(self._ticket.public.reply_partition, self._ticket.public.created_ms - 5_000)
            return
        self._terminal = found
        if self._streamed:
            self._stream.pending = whole_deltas(found)

    async def _watch(self, receive: Receive) -> None:
        while True:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                self._gone.set()
                self._stream.wake()
                return

    def _leave(self) -> None:
        """The caller went, or we dropped it, before the end."""
        grace: float = self._ticket.resume_s
        if self._stream.dropped:
            metrics.CALLERS_DROPPED.inc()
            grace = max(grace, DROPPED_GRACE_S)
        if self._services.draining.is_set() and not self._gone.is_set():
            return  # It was told to resume elsewhere; the request runs on.
        self._services.attachments.left(self._ticket.public.request_id, self._tenant, grace)

    async def _no_deltas(self, silence: int) -> int:
        """The stream woke without deltas: because the frames are elsewhere, the process stops, or nothing came.

        On silence the log is asked for the result; `silence` counts the waits in vain so far, and the new count is
        returned.
        """
        if self._gone.is_set() or self._services.draining.is_set() or self._stream.dropped:
            return silence
        if self._stream.moved is not None:
            moved = msgspec.json.decode(self._stream.moved, type=Moved)
            self._replay(moved.partition, moved.since_ms - 5_000)
            return silence
        if self._ended is not None:
            if silence >= LOST_AFTER_SILENCES:
                self._give_up(self._ended)
        elif _asks_log(silence) and (found := await self._ask_log()) is not None:
            self._ended = found
            self._settle()
            return 0
        return silence + 1

    def _settle(self) -> bool:
        """Let the stream end if the request has and nothing is missing, else see to what is; whether it ends.

        The log may be ahead of our reader of frames, when that had to connect anew.
        """
        ended = self._ended
        if ended is None or (self._catching_up and self._seq < ended.last_seq):
            return False
        if not self._streamed or self._seq >= ended.last_seq:
            self._terminal = ended
        elif self._seq == 0 and ended.choices:
            self._terminal = ended
            self._stream.pending = whole_deltas(ended)
        else:
            self._log.warning("frames_missed", seen=self._seq, last=ended.last_seq)
            self._catching_up = True
            self._stream.pending = []  # The replay brings them again.
            self._stream.view = StreamView(seq=self._seq)
            self._replay(ended.reply_partition, self._ticket.public.created_ms - 5_000)
        return self._terminal is not None

    def _give_up(self, ended: Terminal) -> None:
        """Frames that the stream misses are not kept any more."""
        self._log.error("frames_lost", seen=self._seq, last=ended.last_seq)
        path = f"/v1/requests/{self._ticket.public}"
        lost = Unavailable(f"A part of this stream is lost; GET {path} tells how the request ended.")
        self._terminal = msgspec.structs.replace(ended, status=Status.FAILED, error=lost.info())

    async def _ask_log(self) -> Terminal | None:
        public = self._ticket.public
        try:
            async with asyncio.timeout(10):
                found = await self._services.lookup.terminal(public.request_id, public.created_ms)
        except Exception as error:
            # Best effort: the frames may still come, and the next silence asks again.
            self._log.warning("lookup_failed", error=repr(error))
            return None
        if found is not None:
            self._log.warning("terminal_found_in_log", status=found.status.value)
        return found

    # --- whole ------------------------------------------------------------------------------------------------

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        silence = 0
        while self._terminal is None and not self._gone.is_set():
            if self._services.draining.is_set():
                await error_response(self._stopping(), self._ticket.public.request_id)(scope, receive, send)
                return
            deltas = await self._stream.take()
            silence = 0 if deltas else await self._no_deltas(silence)
            for delta in deltas:
                if delta.kind == Kind.TERMINAL:
                    self._ended = _terminal.decode(delta.data)
                    self._settle()
        terminal = self._terminal
        if terminal is None:
            return
        self._observe(terminal)
        if terminal.error is not None:
            await error_response(terminal.error, terminal.request_id)(scope, receive, send)
            return
        public = self._ticket.public
        content = completion(str(public), public.created_ms // 1000, self._alias, terminal)
        headers = self._id_headers()
        await Response(content, media_type="application/json", headers=headers)(scope, receive, send)

    # --- streamed ---------------------------------------------------------------------------------------------

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        public = self._ticket.public
        renderer = ChunkRenderer(str(public), public.created_ms // 1000, self._alias, include_usage=self._include_usage)
        if self._after is not None and self._after[1] > 0:
            renderer.opened(set(range(self._choices)))
        direct: Send = scope.get(DIRECT_SEND, send)
        self._stream.abort = _abort_of(direct)
        clock = asyncio.get_running_loop().time
        begun = False
        silence = tokens = 0
        first_status_at = self._began + self._services.settings.first_status_timeout
        while not self._gone.is_set():
            if self._services.draining.is_set() or self._stream.dropped:
                await self._break_off(scope, receive, send, renderer, begun)
                return
            deltas = await self._stream.take() if self._terminal is None else []
            silence = 0 if deltas or self._terminal is not None else await self._no_deltas(silence)
            if self._terminal is not None:
                # A result that was found whole is all in `pending`: nothing more will wake us.
                deltas = self._stream.pending
            if not deltas and self._terminal is None:
                if self._gone.is_set() or self._services.draining.is_set() or self._stream.dropped:
                    continue
                if not begun and time.monotonic() < first_status_at:
                    continue
                if not begun:
                    begun = await self._begin(send)
                await direct({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                continue
            events = bytearray()
            for delta in deltas:
                if delta.kind == Kind.TERMINAL:
                    self._ended = _terminal.decode(delta.data)
                else:
                    events += renderer.delta(delta)
                    tokens += delta.tokens
                    self._seq = delta.seq
            if self._terminal is None and self._settle():
                for delta in self._stream.pending:
                    events += renderer.delta(delta)
            if (terminal := self._terminal) is not None:
                self._observe(terminal)
                if not begun and terminal.error is not None and not events:
                    await error_response(terminal.error, terminal.request_id)(scope, receive, send)
                    return
                events += renderer.end(terminal)
            if not begun:
                begun = await self._begin(send)
                metrics.TTFT.observe(time.monotonic() - self._began)
            self._stream.writing_since = clock()
            await direct({"type": "http.response.body", "body": bytes(events), "more_body": self._terminal is None})
            self._stream.writing_since = 0.0
            if self._terminal is not None:
                metrics.TOKENS_OUT.inc(tokens)
                return

    async def _begin(self, send: Send) -> bool:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._id_headers(),
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
        why = "The caller read too slowly" if self._stream.dropped else "This ingress is stopping"
        path = f"/v1/chat/completions/{self._ticket.public}/stream"
        return Unavailable(f"{why}; resume with GET {path} and Last-Event-ID.", retry_after_s=1).info()

    def _id_headers(self) -> dict[str, str]:
        return {"x-request-id": self._ticket.public.request_id, "x-hr-stream-id": str(self._ticket.public)}

    def _observe(self, terminal: Terminal) -> None:
        metrics.REQUEST_SECONDS.labels(status=terminal.status.value).observe(time.monotonic() - self._began)


def _abort_of(send: Send) -> Callable[[], None]:
    """How to cut the connection under the server's `send`: ASGI cannot, and a full socket never closes itself."""
    cycle = getattr(send, "__self__", None)  # uvicorn's RequestResponseCycle
    abort: Callable[[], None] | None = getattr(getattr(cycle, "transport", None), "abort", None)
    return abort if abort is not None else lambda: None


def _asks_log(silence: int) -> bool:
    """Whether the log is asked after so many silences before this one: soon at first, then once a minute."""
    return silence in (0, 2, 5) or silence % 12 == 11


def whole_deltas(terminal: Terminal) -> list[Delta]:
    """The answer that a terminal holds, as one delta a choice: for a caller that comes when the frames are gone."""
    rid = bytes.fromhex(terminal.request_id)
    choices = msgspec.json.decode(terminal.choices) if terminal.choices else []
    deltas = []
    for seq, choice in enumerate(choices, start=1):
        chunk = {
            "index": choice["index"],
            "delta": {name: value for name, value in choice["message"].items() if name != "role" and value is not None},
            "logprobs": choice.get("logprobs"),
            "finish_reason": choice["finish_reason"],
        }
        data = msgspec.json.encode([chunk]).decode()
        deltas.append(Delta(rid, terminal.attempt, seq, Kind.CHOICES, 0, data))
    return deltas
