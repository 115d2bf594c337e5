"""The `#bench …` line by which a caller steers the mock upstream through any gateway.

A gateway passes a prompt on unchanged, so the prompt itself says what the upstream shall do: how many tokens at which
pace, and which fault. The same class writes the line (load client, tests) and reads it (upstream).
"""

from __future__ import annotations

import msgspec

MARK = "#bench"


class SpecError(ValueError):
    """A `#bench` line has an unknown field or a value of the wrong type; the text says which."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What one request asks of the upstream. Times are milliseconds; a fault of None does not happen."""

    tokens: int = 64
    """Tokens to generate; the request's own `max_tokens` cuts it, with finish reason `length`."""
    interval_ms: float = 50.0
    """Time between two tokens; 0 sends all at once."""
    ttft_ms: float = 20.0
    """Time from the request to its first token."""
    prompt_tokens: int | None = None
    """Reported prompt size; by default the number of words in the prompt."""
    seq: int = 0
    """Number of the first token: callers give each stream its own range, so that a foreign token shows."""
    filler: int = 0
    """Dots after each token, where the text is to be long."""
    calls: bool = False
    """Answer a stream with a call of a function: the tokens are its arguments."""
    id: str = ""
    """Name under which `/stats` counts this request, and by which tries of the same request are told."""
    keep_body: bool = False
    """Whether `/stats` keeps the request body as it arrived, to see what a gateway passed on."""

    status: int | None = None
    """Fault: answer this HTTP status with an OpenAI-shaped error."""
    refuse: bool = False
    """Fault: close the connection without an answer."""
    slow_headers_ms: float = 0.0
    """Fault: hold the response headers back for this long."""
    die_after: int | None = None
    """Fault: close the connection, the answer unfinished, after this many tokens."""
    hang_after: int | None = None
    """Fault: send nothing more after this many tokens, and keep the connection open."""
    garbage_after: int | None = None
    """Fault: send a broken event (bad JSON, bad UTF-8) after this many tokens, then go on."""
    first: int | None = None
    """Faults strike only the first so many tries with this id; None means every try."""
    error_first: int | None = None
    """Short for `status=503 first=N`, or for another `status` if one is given."""

    def line(self) -> str:
        """The `#bench` line that reads back as this spec; only fields that differ from the defaults."""
        parts = [MARK]
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value != getattr(_DEFAULT, name):
                parts.append(f"{name}={int(value) if isinstance(value, bool) else value}")
        return " ".join(parts)

    def for_try(self, number: int) -> Spec:
        """This spec as it applies to try `number` (1 is the first): without faults once `first` tries have had them."""
        status, first = self.status, self.first
        if self.error_first is not None:
            status, first = self.status or 503, self.error_first
        if first is not None and number > first:
            return msgspec.structs.replace(self, status=None, **_FAULTLESS)
        return self if status == self.status else msgspec.structs.replace(self, status=status)


_DEFAULT = Spec()
_FAULTLESS = {
    name: getattr(_DEFAULT, name) for name in ("refuse", "slow_headers_ms", "die_after", "hang_after", "garbage_after")
}


def parse(text: str, default: Spec = _DEFAULT) -> Spec:
    """Read the last `#bench` line of `text`; fields that it does not name come from `default`.

    Text without the mark gives `default`. Raises SpecError for an unknown field or a wrong value.
    """
    start = text.rfind(MARK)
    if start < 0:
        return default
    line = text[start + len(MARK) :].split("\n", 1)[0]
    fields: dict[str, str | int] = {}
    for word in line.split():
        name, _, value = word.partition("=")
        if name not in Spec.__struct_fields__:
            raise SpecError(f"unknown field {name!r} in the {MARK} line")
        fields[name] = value if value else "1"
    try:
        parsed = msgspec.convert(fields, Spec, strict=False)
    except msgspec.ValidationError as error:
        raise SpecError(str(error)) from error
    if default is _DEFAULT:
        return parsed
    return msgspec.structs.replace(default, **{name: getattr(parsed, name) for name in fields})
