"""One answer of the mock upstream: a state machine that the timer wheel wakes, token by token.

It is handed only bytes to write and knows nothing of sockets, so its schedule and its faults are tested without I/O.
"""

from __future__ import annotations

from typing import Protocol

from bench.gateway.spec import Spec
from bench.gateway.tally import Try
from bench.gateway.wire import DONE, GARBAGE, STREAM_HEAD, Rendering, chunked, response

MS = 1_000_000


class Caller(Protocol):
    """Where an answer goes: the connection that asked for it."""

    def send(self, data: bytes) -> None:
        """Write bytes to the caller."""

    def finished(self, outcome: str) -> None:
        """The answer is complete; the connection may take the next request."""

    def drop(self, outcome: str) -> None:
        """Close the connection after what was written, with the answer unfinished."""


class Answer:
    """What streamed and whole answers share: the plan of one request and its end."""

    __slots__ = ("_attempt", "_caller", "_prompt", "_reason", "_rendering", "_spec", "_total", "closed")

    def __init__(
        self, caller: Caller, spec: Spec, attempt: Try, rendering: Rendering, prompt: int, limit: int | None
    ) -> None:
        self._caller = caller
        self._spec = spec
        self._attempt = attempt
        self._rendering = rendering
        self._prompt = prompt
        self._total = spec.tokens if limit is None else min(spec.tokens, limit)
        self._reason = "stop" if self._total == spec.tokens else "length"
        self.closed = False
        """Set when the caller has gone; a closed answer never writes again."""


class StreamedAnswer(Answer):
    """Server-sent events at the pace of the spec: head and role chunk, tokens, finish, usage, `[DONE]`."""

    __slots__ = ("_include_usage", "_interval", "_next", "_open", "_sent", "_start", "_step")

    def __init__(
        self,
        caller: Caller,
        spec: Spec,
        attempt: Try,
        rendering: Rendering,
        *,
        prompt: int,
        limit: int | None,
        include_usage: bool,
    ) -> None:
        super().__init__(caller, spec, attempt, rendering, prompt, limit)
        self._include_usage = include_usage
        self._interval = int(spec.interval_ms * MS)
        self._start = attempt.received_ns + int(max(spec.ttft_ms, spec.slow_headers_ms) * MS)
        self._open = False
        self._sent = 0
        faults = (spec.die_after, spec.hang_after, spec.garbage_after)
        self._step = min((at for at in faults if at is not None), default=self._total)
        """Tokens until something other than a token is to be done."""

    def first_due(self) -> int:
        """When to wake first: for the head of the response."""
        return self._attempt.received_ns + int(self._spec.slow_headers_ms * MS)

    def fire(self, now: int) -> int:
        """Write what is due; return when to be woken next, or 0 for never."""
        if self.closed:
            return 0
        if not self._open:
            self._open = True
            self._caller.send(STREAM_HEAD + self._rendering.role())
            if self._start > now:
                return self._start
        if self._interval and self._sent < self._step:
            sent = self._sent
            token = self._rendering.token(self._spec.seq + sent, now)
            self._caller.send(token if sent else self._rendering.opening() + token)
            self._sent = self._attempt.tokens = sent + 1
            if sent + 1 < self._step:
                return self._start + (sent + 1) * self._interval
        elif not self._interval:
            self._burst(now)
        return self._special()

    def _burst(self, now: int) -> None:
        """Write all tokens up to the next step in one go."""
        numbers = range(self._spec.seq + self._sent, self._spec.seq + self._step)
        if numbers:
            opening = b"" if self._sent else self._rendering.opening()
            self._caller.send(opening + b"".join([self._rendering.token(number, now) for number in numbers]))
        self._sent = self._attempt.tokens = max(self._sent, self._step)

    def _special(self) -> int:
        """Do what stands at this step: a fault, or the end. Returns when to be woken next."""
        spec, sent = self._spec, self._sent
        if spec.die_after is not None and sent >= spec.die_after:
            self._caller.drop("died")
            return 0
        if spec.hang_after is not None and sent >= spec.hang_after:
            self._attempt.outcome = "hanging"
            return 0
        if spec.garbage_after is not None and sent == spec.garbage_after and self._step == sent:
            self._caller.send(chunked(GARBAGE))
            later = (at for at in (spec.die_after, spec.hang_after) if at is not None)
            self._step = min([self._total, *later])
            if sent < self._step:
                return self._start + sent * self._interval
        tail = self._rendering.finish(self._reason)
        if self._include_usage:
            tail += self._rendering.usage(self._prompt, sent)
        self._caller.send(tail + DONE)
        self._caller.finished("finished")
        return 0


class WholeAnswer(Answer):
    """One JSON body after the time that its tokens take."""

    __slots__ = ()

    def first_due(self) -> int:
        """When to wake: once all tokens, or those before the fault, would have been generated."""
        spec = self._spec
        faults = [at for at in (spec.die_after, spec.hang_after) if at is not None]
        gaps = max(min([self._total, *faults]) - 1, 0)
        return self._attempt.received_ns + int((max(spec.ttft_ms, spec.slow_headers_ms) + gaps * spec.interval_ms) * MS)

    def fire(self, now: int) -> int:
        """Write the body, or the fault in its place; never asks to be woken again."""
        spec, total = self._spec, self._total
        if self.closed:
            return 0
        if spec.die_after is not None:
            self._caller.drop("died")
        elif spec.hang_after is not None:
            self._attempt.outcome = "hanging"
        else:
            dots = "." * spec.filler
            text = "".join([f" t{number}@{now}{dots}" for number in range(spec.seq, spec.seq + total)])
            body = self._rendering.whole(text, self._reason, self._prompt, total)
            self._attempt.tokens = total
            self._caller.send(response(200, body if spec.garbage_after is None else GARBAGE))
            self._caller.finished("finished")
        return 0
