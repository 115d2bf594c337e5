"""One attempt at a request: generate, write frames, then one terminal; its frame only when the terminal is durable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
import structlog

from headrace import metrics
from headrace.asked import images_of
from headrace.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    HeadraceError,
    InvalidRequest,
    ProviderDeclined,
    ProviderError,
    WorkerLost,
)
from processors.generation import continuation
from processors.generation.answer import Answer
from processors.generation.bodies import Bodies
from processors.generation.frames_out import FrameWriter
from processors.generation.providers.base import Done, Finish, Piece, Provider
from schemas.control import Model
from schemas.events import (
    MAX_EMITTED_BYTES,
    CancelCommand,
    ErrorInfo,
    GenerateCommand,
    Stage,
    Status,
    Terminal,
    Timings,
    Usage,
)
from topics.catalogue import MAX_RESULT_BYTES
from topics.outcomes import Outcomes, now_ms, terminal_delta

log = structlog.get_logger(__name__)

COUNT_TIMEOUT_S = 2.0
"""How long an engine may take to count a prompt whose usage it did not report."""


class Attempt:
    """Runs one `GenerateCommand`. `run` never raises what the provider raises: that becomes the terminal."""

    def __init__(
        self,
        command: GenerateCommand,
        model: Model,
        provider: Provider,
        *,
        worker: str,
        writer: FrameWriter,
        outcomes: Outcomes,
        bodies: Bodies,
        engine_again: Callable[[], Awaitable[bool]],
        loads: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`engine_again` says, once that is settled, whether the engine died since and the model has a new one.

        `loads` says from when to when this worker loaded the model (Unix ms).
        """
        self.command = command
        self._model = model
        self._provider = provider
        self._worker = worker
        self._writer = writer
        self._outcomes = outcomes
        self._bodies = bodies
        self._engine_again = engine_again
        self._loads = loads
        self._answer = _answer(command)
        self.answered = False
        """Whether the generation ended by itself: with an answer, or with `failure`."""
        self.failure: HeadraceError | None = None
        self._cancel: CancelCommand | None = None
        self._left = False
        self._generating: asyncio.Task[None] | None = None
        self._started_ms = 0
        self._first_token_ms = command.first_token_ms
        self._emitted = command.emitted
        """What was generated before the engine that generates now: it goes on from there."""
        self._size = len(command.emitted)
        self._urgent = command.request.stream
        """Whether a caller waits for the next piece: it goes out at once."""
        self._log = log.bind(
            request_id=command.request.request_id, attempt=command.attempt, epoch=command.epoch, model=model.id
        )

    @property
    def tokens(self) -> int:
        """Completion tokens so far."""
        return self._answer.tokens

    @property
    def goes_on(self) -> bool:
        """Whether another attempt could go on from here; with room to spare, as this one has not stopped yet."""
        return self._may_go_on and self._size < MAX_EMITTED_BYTES // 4

    @property
    def _may_go_on(self) -> bool:
        may = self.command.request.continuable and self._provider.can_continue
        return may and self.tokens > 0 and self._answer.plain and not self._answer.finished

    def cancel(self, command: CancelCommand) -> None:
        """End the generation at once; the terminal says why and holds what was generated."""
        if self._cancel is None:
            self._cancel = command
            self._halt()

    def leave(self) -> None:
        """End the generation at once and write no terminal: another worker is to go on from the frames so far."""
        self._left = True
        self._halt()

    def _halt(self) -> None:
        if self._generating is not None and (self._left or self._cancel is not None):
            self._generating.cancel()

    async def run(self) -> None:
        """Generate to the end and write the terminal. Raises `KafkaError` when that could not be written."""
        self._started_ms = now_ms()
        request = self.command.request
        self._outcomes.event(
            request.request_id, request.tenant, Stage.STARTED,
            at_ms=self._started_ms, attempt=self.command.attempt, epoch=self.command.epoch,
            detail={"worker": self._worker, "provider": self._provider.name},
        )  # fmt: skip
        status, error, body = Status.COMPLETED, None, None
        try:
            if self._cancel is None:
                body = await self._body()
                self._generating = asyncio.create_task(self._generate(body))
                self._halt()  # where that was asked for while the body was read
                await self._generating
                self.answered = True
            else:
                status, error = self._cancelled(self._cancel)
        except asyncio.CancelledError:
            if self._cancel is None:
                if not self._left:
                    raise
                await self._writer.settle(request.reply_partition)
                self._log.info("generation_left", tokens=self._answer.tokens)
                return
            status, error = self._cancelled(self._cancel)
        except HeadraceError as failure:
            status = Status.REJECTED if isinstance(failure, InvalidRequest) else Status.FAILED
            error = failure.info()
            if self._generating is not None:
                self.answered, self.failure = True, failure
            if status is Status.FAILED:
                metrics.PROVIDER_ERRORS.labels(provider=self._provider.name, code=error.code).inc()
            self._log.warning("generation_failed", code=error.code, error=error.message, tokens=self._answer.tokens)
        await self._finish(status, error, body)

    @staticmethod
    def _cancelled(wish: CancelCommand) -> tuple[Status, ErrorInfo]:
        if wish.status is Status.EXPIRED:
            late = DeadlineExceeded("The deadline passed before the answer was complete; what was generated was sent.")
            return Status.EXPIRED, late.info()
        return Status.CANCELLED, ErrorInfo(499, "cancelled", wish.reason)

    async def _body(self) -> dict[str, Any]:
        request = self.command.request
        raw = bytes(request.body) if request.body else await self._bodies.fetch(request.ref)
        body: dict[str, Any] = msgspec.json.decode(raw)
        body.pop("service_tier", None)  # it has become the request's priority
        if request.max_tokens is not None and "max_tokens" not in body and "max_completion_tokens" not in body:
            body["max_tokens"] = request.max_tokens
        return body

    async def _generate(self, body: dict[str, Any]) -> None:
        try:
            await self._stream(body)
        except ProviderError as failure:
            # Once: a request that is itself what ends its engine must not go on doing so.
            begun = self._answer.seq > self.command.after_seq
            if (begun and not self._may_go_on) or not await self._engine_again():
                raise
            self._log.info("generation_again", error=failure.message, tokens=self.tokens)
            if begun:
                self._emitted = self._answer.go_on()
            await self._stream(body)

    async def _stream(self, body: dict[str, Any]) -> None:
        adapter = self.command.request.adapter
        if self._emitted:
            await self._continue(body)
        else:
            async with contextlib.aclosing(self._provider.generate(self._model, body, adapter=adapter)) as batches:
                async for batch in batches:
                    self._give(batch)
        if self._answer.done is None:
            raise ProviderError("The provider's stream ended in the middle of the answer.")

    async def _continue(self, body: dict[str, Any]) -> None:
        """Go on from what was emitted before. Raises `WorkerLost` where the provider cannot."""
        emitted, provider = self._emitted, self._provider
        if not provider.can_continue:
            raise _not_continued(f"provider {provider.name!r} cannot")
        seam = continuation.Seam(emitted, continuation.stops_of(body))
        try:
            await self._count_emitted(body)
            if (rest := continuation.remaining(body, self._answer.tokens)) is None:
                self._give([Finish(0, "length"), Done(None)])
                return
            adapter = self.command.request.adapter
            stream = provider.generate(self._model, rest, emitted=emitted, adapter=adapter)
            async with contextlib.aclosing(stream) as batches:
                async for batch in batches:
                    self._give(seam.feed(batch))
                    if self._answer.done is not None:
                        return
        except ContextLengthExceeded:
            # The prompt did fit: the text so far fills the context, which is where the answer ends.
            self._give([Finish(0, "length"), Done(None)])
        except InvalidRequest as refusal:
            # The request itself was taken before.
            raise _not_continued(refusal.message) from refusal

    async def _count_emitted(self, body: dict[str, Any]) -> None:
        """Have the engine count what was emitted, where it can; frames count a token a piece at least."""
        whole = await self._provider.count_prompt(self._model, body, emitted=self._emitted)
        prompt = await self._provider.count_prompt(self._model, body)
        if whole is not None and prompt is not None:
            self._answer.recount(whole - prompt)

    def _give(self, batch: list[Piece]) -> None:
        """Fold pieces and write their frames. Raises `ProviderError` when the answer becomes too large."""
        answer, request = self._answer, self.command.request
        for piece in batch:
            delta = answer.add(piece)
            if delta is not None:
                self._size += len(delta.data)
                self._writer.add(request.reply_partition, delta, urgent=self._urgent, coarse=not request.stream)
        if batch:
            self._urgent = False
        if self._first_token_ms == 0 and answer.started:
            self._first_token()
        if self._size > MAX_RESULT_BYTES:
            raise ProviderDeclined(f"The answer is over {MAX_RESULT_BYTES} bytes; ask for fewer tokens.")

    def _first_token(self) -> None:
        self._first_token_ms = now_ms()
        request = self.command.request
        self._outcomes.event(
            request.request_id, request.tenant, Stage.FIRST_TOKEN,
            at_ms=self._first_token_ms, attempt=self.command.attempt, epoch=self.command.epoch,
        )  # fmt: skip

    async def _finish(self, status: Status, error: ErrorInfo | None, body: dict[str, Any] | None) -> None:
        answer, command, request = self._answer, self.command, self.command.request
        usage = answer.usage(await self._prompt_tokens(body))
        terminal = _terminal(command, self._worker, answer, status, error, usage)
        terminal.provider = self._provider.name
        terminal.system_fingerprint = answer.done.system_fingerprint if answer.done is not None else None
        # An attempt that goes on starts after the first token; the request did not.
        started_ms = min(self._started_ms, self._first_token_ms or self._started_ms)
        terminal.timings.started_ms, terminal.timings.first_token_ms = started_ms, self._first_token_ms
        terminal.timings.load_ms = overlap_ms(request.accepted_ms, started_ms, self._loads)
        if body is not None and terminal.usage.prompt_tokens:
            terminal.usage.images = images_of(body)
        metrics.GENERATED_TOKENS.labels(model=self._model.id).inc(terminal.usage.completion_tokens)
        if request.stream:
            await self._writer.settle(request.reply_partition)
        await self._outcomes.terminal(terminal)
        self._writer.add(request.reply_partition, terminal_delta(terminal, command.attempt), urgent=True)
        await self._writer.settle(request.reply_partition)
        self._log.info("generation_ended", status=status.value, tokens=terminal.usage.completion_tokens)

    async def _prompt_tokens(self, body: dict[str, Any] | None) -> int:
        """The caller's prompt where the provider did not report it: counted by the engine, else estimated.

        0 where `Answer.usage` has it from what the provider reported. Where that said nothing and the engine counts, it
        counts the answer as well, of which a piece may hold several tokens.
        """
        command, done = self.command, self._answer.done
        reported = done is not None and done.usage is not None
        if not self._answer.started or (reported and not self._emitted):
            return 0
        if body is None:
            return command.request.prompt_tokens_estimate
        counted = await self._counted(body)
        if counted is None:
            return 0 if reported else command.request.prompt_tokens_estimate
        if not reported and (text := self._answer.only_text()):
            whole = await self._counted(body, text)
            self._answer.tokens = max(self._answer.tokens, (whole or 0) - counted)
        return counted

    async def _counted(self, body: dict[str, Any], emitted: str = "") -> int | None:
        """Tokens by the engine's own count; None where it cannot, or does not in time."""
        with contextlib.suppress(TimeoutError, HeadraceError):
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                return await self._provider.count_prompt(self._model, body, emitted=emitted)
        return None


def overlap_ms(begin_ms: int, end_ms: int, spans: Iterable[tuple[int, int]]) -> int:
    """How long of a time lies in spans that do not overlap."""
    return sum(max(0, min(end_ms, until) - max(begin_ms, since)) for since, until in spans)


def _answer(command: GenerateCommand) -> Answer:
    """The answer as far as earlier attempts came."""
    return Answer(
        command.request.request_id, command.attempt, command.after_seq, emitted=command.emitted, tokens=command.tokens
    )


def _not_continued(why: str) -> WorkerLost:
    return WorkerLost(
        f"What generated this answer died in the middle of it, and it could not be continued ({why}); what was sent is"
        " all there is. Send the request again."
    )


def unable(command: GenerateCommand, worker: str, error: HeadraceError) -> Terminal:
    """The terminal of an attempt that could not begin; it holds what earlier ones emitted."""
    answer = _answer(command)
    usage = answer.usage(command.request.prompt_tokens_estimate if command.emitted else 0)
    terminal = _terminal(command, worker, answer, Status.FAILED, error.info(), usage)
    terminal.timings.first_token_ms = command.first_token_ms
    return terminal


def _terminal(
    command: GenerateCommand, worker: str, answer: Answer, status: Status, error: ErrorInfo | None, usage: Usage
) -> Terminal:
    request = command.request
    return Terminal(
        request_id=request.request_id,
        tenant=request.tenant,
        attempt=command.attempt,
        epoch=command.epoch,
        status=status,
        key_id=request.key_id,
        user_id=request.user_id,
        model=request.model,
        alias=request.alias,
        pool=request.pool,
        worker=worker,
        stream=request.stream,
        reply_partition=request.reply_partition,
        usage=usage,
        error=error,
        choices=answer.choices(),
        timings=Timings(
            accepted_ms=request.accepted_ms,
            routed_ms=request.routed_ms,
            assigned_ms=command.assigned_ms,
            finished_ms=now_ms(),
        ),
        price=request.price,
        last_seq=answer.seq,
    )
