"""What a body says of how its answer may be made good when its worker dies: pure, and cheap, as every request passes.

An answer is continued from its text. So it must be one text: a single choice, without log probabilities, grammar, calls
or reasoning, whose state would be lost. A conversation that ends with the assistant's own words is left alone: servers
differ in whether these are a beginning.
"""

from __future__ import annotations

import msgspec

from headrace.asked import Asked

_ABSENT = (b"", b"null")


class _Spoken(msgspec.Struct):
    role: str = ""


_messages = msgspec.json.Decoder(list[_Spoken])


def choices(asked: Asked) -> int:
    """How many choices are asked for; 0 where the body does not say it as a number."""
    if bytes(asked.n) in _ABSENT:
        return 1
    try:
        return max(0, msgspec.json.decode(asked.n, type=int))
    except msgspec.MsgspecError:
        return 0


def continuable(asked: Asked) -> bool:
    """Whether the answer may be continued from its text by a provider that can."""
    calls = bool(asked.tools) and bytes(asked.tool_choice) != b'"none"'
    text = asked.response_format is None or asked.response_format.type == "text"
    return (
        choices(asked) == 1
        and bytes(asked.logprobs) in (*_ABSENT, b"false")
        and bytes(asked.reasoning_effort) in (*_ABSENT, b'"none"')
        and not calls
        and text
        and not _assistant_is_last(asked.messages)
    )


def _assistant_is_last(messages: msgspec.Raw) -> bool:
    try:
        said = _messages.decode(messages)
    except msgspec.MsgspecError:
        return True
    return not said or said[-1].role == "assistant"
