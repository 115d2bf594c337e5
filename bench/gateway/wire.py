"""OpenAI's chat bodies as bytes: what the mock upstream reads and writes.

Everything that is the same for all tokens of a stream is rendered once a request; a token then costs one `%`.
"""

from __future__ import annotations

import re
import time

import msgspec

from bench.gateway.spec import MARK, Spec, parse

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
GARBAGE = b'data: {"choices":[{"delta":{"content":"\xff\xfe\n\n'
TOKEN = re.compile(r" t(\d+)@\d+")
LOGPROBS = '{"content":[{"token":" t","logprob":-0.5,"bytes":null,"top_logprobs":[]}],"refusal":null}'
"""Of every token, where a caller asks for them."""
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class Part(msgspec.Struct):
    """One part of a message's content."""

    type: str = "text"
    text: str | None = None


class Message(msgspec.Struct):
    """A chat message, as far as the upstream reads it."""

    role: str = "user"
    content: str | list[Part] | None = None

    def text(self) -> str:
        """Its text, parts joined."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.text)
        return self.content or ""


class StreamOptions(msgspec.Struct):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class Chat(msgspec.Struct):
    """A chat completion request, as far as the upstream reads it."""

    messages: list[Message]
    model: str = "bench"
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    n: int | None = 1
    logprobs: bool | None = False

    def spec(self, default: Spec) -> Spec:
        """The spec of the last message, else of `metadata.bench`, else of `user`. Raises SpecError.

        An answer that has begun (a last message of the assistant) goes on after its last token.
        """
        asked = self.messages[:-1] if self.begun() else self.messages
        text = asked[-1].text() if asked else ""
        if MARK not in text and self.metadata and "bench" in self.metadata:
            text = f"{MARK} {self.metadata['bench']}"
        if MARK not in text and self.user:
            text = self.user
        spec = parse(text, default)
        if tokens := TOKEN.findall(self.begun()):
            after = int(tokens[-1]) + 1
            left = spec.seq + spec.tokens - after
            # The prompt now holds what was said, as it does for an engine.
            prompt = None if spec.prompt_tokens is None else spec.prompt_tokens + len(tokens)
            spec = msgspec.structs.replace(spec, seq=after, tokens=left, prompt_tokens=prompt)
        return spec

    def begun(self) -> str:
        """What the assistant has said of the answer."""
        last = self.messages[-1] if self.messages else Message()
        return last.text() if last.role == "assistant" else ""

    def limit(self) -> int | None:
        """The most tokens that the caller allows, None if it does not say."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def words(self) -> int:
        """Words in all messages: the prompt size that is reported when the spec gives none."""
        return sum(len(message.text().split()) for message in self.messages)


chat_decoder = msgspec.json.Decoder(Chat)


class Rendering:
    """The bytes of one answer: role chunk, tokens, finish, usage, or the whole body when not streamed.

    A stream may have several choices, which all have the same tokens.
    """

    __slots__ = ("_calls", "_choices", "_fixed", "_id", "_model", "_others", "_prefix", "_suffix", "created")

    def __init__(
        self,
        number: int,
        model: str,
        filler: int = 0,
        *,
        choices: int = 1,
        logprobs: bool = False,
        calls: bool = False,
    ) -> None:
        """`filler`: dots after each token. `calls`: tokens are the arguments of a call."""
        self.created = int(time.time())
        self._id = f"chatcmpl-bench{number}"
        self._model = msgspec.json.encode(model).decode()
        self._calls = calls
        self._choices = range(choices)
        begin, end = (
            ('{"tool_calls":[{"index":0,"function":{"arguments":"', '"}}]}') if calls else ('{"content":"', '"}')
        )
        self._prefix, *self._others = (self._event(f"{begin} t", index).encode() for index in self._choices)
        rest = f'{end},"logprobs":{LOGPROBS if logprobs else "null"},"finish_reason":null}}]}}\n\n'
        self._suffix = b"." * filler + rest.encode()
        self._fixed = len(self._prefix) + len(self._suffix)

    def _event(self, delta: str, index: int) -> str:
        return (
            f'data: {{"id":"{self._id}","object":"chat.completion.chunk","created":{self.created},'
            f'"model":{self._model},"choices":[{{"index":{index},"delta":{delta}'
        )

    def _events(self, delta: str, reason: str = "null") -> bytes:
        """A delta of every choice, as one HTTP chunk."""
        rest = f'{delta},"logprobs":null,"finish_reason":{reason}}}]}}\n\n'
        return chunked("".join([self._event(rest, index) for index in self._choices]).encode())

    def role(self) -> bytes:
        """The first chunk, which names the role."""
        return self._events('{"role":"assistant","content":""}')

    def opening(self) -> bytes:
        """What comes right before the first token: the name of the function, where tokens are its arguments."""
        if not self._calls:
            return b""
        function = '"function":{"name":"count","arguments":""}'
        return self._events(f'{{"tool_calls":[{{"index":0,"id":"call-{self._id}","type":"function",{function}}}]}}')

    def token(self, number: int, now: int) -> bytes:
        """Token `number` of every choice, sent at `now` (CLOCK_MONOTONIC, nanoseconds); an HTTP chunk each."""
        text = b"%d@%d" % (number, now)
        first = b"%x\r\n%b%b%b\r\n" % (self._fixed + len(text), self._prefix, text, self._suffix)
        if not self._others:
            return first
        return first + b"".join([chunked(prefix + text + self._suffix) for prefix in self._others])

    def finish(self, reason: str) -> bytes:
        """The last choice chunk, which says why generation ended."""
        return self._events("{}", '"tool_calls"' if self._calls and reason == "stop" else f'"{reason}"')

    def usage(self, prompt: int, tokens: int) -> bytes:
        """The chunk that `stream_options.include_usage` asks for, of so many tokens in each choice."""
        completion = tokens * len(self._choices)
        return chunked(
            f'data: {{"id":"{self._id}","object":"chat.completion.chunk","created":{self.created},'
            f'"model":{self._model},"choices":[],"usage":{_usage(prompt, completion)}}}\n\n'.encode()
        )

    def whole(self, text: str, reason: str, prompt: int, completion: int) -> bytes:
        """The body of an answer that is not streamed."""
        return (
            f'{{"id":"{self._id}","object":"chat.completion","created":{self.created},"model":{self._model},'
            f'"choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}","refusal":null}},'
            f'"logprobs":null,"finish_reason":"{reason}"}}],"usage":{_usage(prompt, completion)}}}'
        ).encode()


def _usage(prompt: int, completion: int) -> str:
    return f'{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{prompt + completion}}}'


def chunked(body: bytes) -> bytes:
    """`body` as one chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def response(status: int, body: bytes) -> bytes:
    """A whole HTTP response with a JSON body."""
    reason = REASONS.get(status, "Error")
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def error(status: int, message: str) -> bytes:
    """A whole HTTP response with an error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return response(status, msgspec.json.encode(body))
