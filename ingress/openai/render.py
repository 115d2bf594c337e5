"""The chunks of a stream as OpenAI writes them, as bytes of server-sent events. Pure."""

from __future__ import annotations

import msgspec

from headrace.openai_objects import error_object, usage_object
from schemas.events import ErrorInfo, Terminal
from topics.frames import Delta, Kind

_json = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"


class ChunkRenderer:
    """Turns the deltas of one request into server-sent events. Ids are `attempt:seq`."""

    __slots__ = ("_after", "_before", "_created", "_id", "_include_usage", "_roles")

    def __init__(self, public_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._id = public_id.encode()
        self._created = created
        self.name(model)
        self._after = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage = include_usage
        self._roles: set[int] = set()

    def name(self, model: str) -> None:
        """Let the chunks to come bear this name of a model."""
        self._before = (
            b'{"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":null,"choices":'
            % (self._id, self._created, _json.encode(model))
        )

    def _event(self, delta: Delta, choices: bytes) -> bytes:
        if not delta.seq:  # Nobody can resume after it.
            return b"data: %b%b%b" % (self._before, choices, self._after)
        return b"id: %d:%d\ndata: %b%b%b" % (delta.attempt, delta.seq, self._before, choices, self._after)

    def _role(self, delta: Delta, index: int) -> bytes:
        """The chunk that opens a choice. It bears no id: a resumed stream cannot begin between it and its text."""
        if index in self._roles:
            return b""
        self._roles.add(index)
        return (
            b'data: %b[{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,'
            b'"finish_reason":null}]%b' % (self._before, index, self._after)
        )

    def opened(self, indexes: set[int]) -> None:
        """Take it that the caller has had the role chunks of these choices (it resumes)."""
        self._roles |= indexes

    def delta(self, delta: Delta) -> bytes:
        """The events of a TEXT, CHOICES or FINISH delta."""
        if delta.kind == Kind.TEXT:
            event = self._event(
                delta,
                b'[{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]'
                % (delta.index, _json.encode(delta.data)),
            )
            return event if delta.index in self._roles else self._role(delta, delta.index) + event
        if delta.kind == Kind.FINISH:
            return self._role(delta, delta.index) + self._event(
                delta,
                b'[{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}]'
                % (delta.index, _json.encode(delta.data)),
            )
        choices = msgspec.json.decode(delta.data)
        roles = b"".join(self._role(delta, choice.get("index", 0)) for choice in choices)
        return roles + self._event(delta, delta.data.encode())

    def end(self, terminal: Terminal) -> bytes:
        """The last events: usage if it was asked for and `[DONE]`, or the error that ended the stream."""
        if terminal.error is not None:
            return self.error(terminal.error)
        if not self._include_usage:
            return DONE
        usage = b'data: %b[],"usage":%b}\n\n' % (self._before, _json.encode(usage_object(terminal.usage)))
        return usage + DONE

    def error(self, error: ErrorInfo) -> bytes:
        """An error in the middle of a stream; OpenAI's clients raise it."""
        return b"data: %b\n\n" % _json.encode(error_object(error))
