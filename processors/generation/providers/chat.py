"""A streamed chat over HTTP: what every provider that speaks OpenAI's wire shares."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

import msgspec

from headrace.errors import InvalidRequest, ProviderError
from processors.generation.providers.base import Piece
from processors.generation.providers.chat_stream import ChatStream
from processors.generation.providers.pool import Pool
from processors.generation.providers.wire import WireError

PATH = "/chat/completions"


class _Counted(msgspec.Struct):
    input_tokens: int


def choices_of(body: Mapping[str, object]) -> int:
    """The number of choices that a body asks for. Raises `InvalidRequest` when `n` is not a positive number."""
    n = body.get("n")
    if n is None:
        return 1
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InvalidRequest("n must be a positive whole number", param="n")
    return n


def streamed(body: Mapping[str, object], tag: str) -> dict[str, object]:
    """The body as the backend gets it: its own model tag, streamed, with usage."""
    options = body.get("stream_options")
    wanted = {**options} if isinstance(options, Mapping) else {}
    return {**body, "model": tag, "stream": True, "stream_options": {**wanted, "include_usage": True}}


def continued(body: Mapping[str, object], emitted: str) -> Mapping[str, object]:
    """The body with the answer so far as a last message of the assistant; as it is where there is none."""
    if not emitted:
        return body
    messages = body.get("messages")
    given = messages if isinstance(messages, list) else []
    return {**body, "messages": [*given, {"role": "assistant", "content": emitted}]}


async def count_tokens(pool: Pool, body: Mapping[str, object]) -> int:
    """Tokens of a chat's prompt, by llama-server's own call. Raises as `Pool.open` does, or `msgspec.DecodeError`."""
    answer = await pool.call("POST", f"{PATH}/input_tokens", msgspec.json.encode(body))
    return msgspec.json.decode(answer, type=_Counted).input_tokens


async def stream_chat(pool: Pool, where: str, body: Mapping[str, object]) -> AsyncGenerator[list[Piece], None]:
    """Send a streamed chat and give its pieces, a batch a wake-up; closing the generator closes the connection.

    Raises what `Provider.generate` names.
    """
    parser = ChatStream(where, choices_of(body))
    connection = await pool.open("POST", PATH, msgspec.json.encode(body), accept="text/event-stream")
    held = True
    try:
        kind = connection.headers.get(b"content-type", b"")
        if not kind.lower().startswith(b"text/event-stream"):
            raise ProviderError(f"{where} answered a streamed request with {kind.decode('latin-1') or 'no type'!r}")
        receive, feed = connection.receive, parser.feed
        while data := await receive():
            batch = feed(data)
            if parser.failure is not None:
                yield batch
                raise parser.failure
            if parser.done:
                held = False
                pool.release_soon(connection)
                yield batch
                return
            if batch:
                yield batch
        raise parser.truncated()
    except WireError as problem:
        raise ProviderError(f"{where} broke off in the middle of the answer: {problem}") from problem
    finally:
        if held:
            pool.drop(connection)
