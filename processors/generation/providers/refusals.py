"""What a provider's refusal means to our caller: the one place that reads error bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import msgspec

from headrace.errors import (
    ContextLengthExceeded,
    HeadraceError,
    ProviderDeclined,
    ProviderError,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
)

MESSAGE_LIMIT = 2000
"""Characters of a provider's message that are passed on."""
RATE_LIMITED_RETRY_S = 10
"""For a provider that does not say how long its limit lasts; most count by the minute."""
UNAVAILABLE_RETRY_S = 5
"""For one that does not say when it can take requests again."""

_RATE_LIMITED = 429
_UNAVAILABLE = (503, 529)
"""529 is the overload of hosted servers that keep 503 for their proxies."""

_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
_CONTEXT_TEXT = re.compile(
    r"maximum context length|context (length|size|window)|exceeds? the (available )?(context|model's)"
    r"|(input|prompt) (length|is) .{0,40}(exceed|too long)|longer than the (maximum )?(model|context)",
    re.IGNORECASE,
)

_SECRETS = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf|org|proj|acct)[-_][\w*-]{4,}"  # keys and accounts of hosted providers
    r"|(?<=\bbearer )\S+"
    r"|\b(?=[a-z]*[0-9])(?=[0-9]*[a-z])[a-z0-9]{24,}\b"
    r"|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b",
    re.IGNORECASE,
)


class Fault(msgspec.Struct):
    """An error object in any of the shapes that servers use."""

    message: str = ""
    code: str = ""
    type: str = ""
    param: str | None = None
    status: int | None = None
    """The error's own HTTP status, where the object holds one."""


def read_fault(body: bytes) -> Fault:
    """The fault in an error body: OpenAI's `{"error": {...}}`, `{"error": "…"}`, vLLM's flat object, FastAPI's detail.

    A body that is none of these becomes its own message.
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Fault(message=body.decode("utf-8", "replace").strip()[:MESSAGE_LIMIT])
    return fault_of(decoded)


def fault_of(decoded: object) -> Fault:
    """The fault in a decoded JSON value."""
    if not isinstance(decoded, dict):
        return Fault(message=_text(decoded))
    inner = decoded.get("error", decoded)
    if not isinstance(inner, dict):
        return Fault(message=_text(inner))
    code = inner.get("code")
    param = inner.get("param")
    return Fault(
        message=_text(inner.get("message") or inner.get("detail") or inner),
        code=str(code) if code is not None else "",
        type=_text(inner.get("type") or ""),
        param=param if isinstance(param, str) else None,
        status=code if isinstance(code, int) and 400 <= code < 600 else None,
    )


def is_context_fault(fault: Fault) -> bool:
    """Whether a 4xx fault says that the prompt does not fit the context."""
    if fault.code in _CONTEXT_CODES or fault.type in _CONTEXT_CODES:
        return True
    return bool(_CONTEXT_TEXT.search(fault.message))


def is_transient(status: int) -> bool:
    """Whether asking again may help."""
    return status in (408, 425, 429) or (status >= 500 and status != 501)


def from_answer(where: str, status: int, headers: Mapping[bytes, bytes], body: bytes) -> HeadraceError:
    """The error for an answer that is not 2xx; `where` names the provider in texts that operators read."""
    fault = read_fault(body)
    if 300 <= status < 400:
        target = headers.get(b"location", b"").decode("latin-1")
        return ProviderError(f"{where} redirects to {target!r}: set base_url to its final address")
    return from_fault(where, status, fault, retry_after_s(headers))


def retry_after_s(headers: Mapping[bytes, bytes]) -> int | None:
    """Seconds that an answer asks to wait, from either form of `Retry-After`; None where it does not say.

    A date is taken as the server's clock counts it, from its own `Date`.
    """
    after = headers.get(b"retry-after", b"").strip()
    if after.isdigit():
        return int(after)
    try:
        until, now = (parsedate_to_datetime(value.decode("latin-1")) for value in (after, headers[b"date"]))
        return max(0, round((until - now).total_seconds()))
    except (KeyError, ValueError, TypeError):
        return None


def from_fault(where: str, status: int, fault: Fault, after_s: int | None = None) -> HeadraceError:
    """The error for a fault with its status, from an answer or from the first event of a stream.

    `after_s` is how long the provider asked to wait.
    """
    if status in (401, 403, 407):
        # The text of such answers can hold a part of our key: it is the operator's, not the caller's.
        return ProviderError(f"{where} refused our credentials (HTTP {status}): check the provider's api_key_env")
    said = _SECRETS.sub("…", fault.message) or "it gave no reason"
    if status == 404:
        return ProviderDeclined(f"{where} knows no such path or model: check base_url and backend_tag ({said})")
    if status == _RATE_LIMITED:
        wait_s = RATE_LIMITED_RETRY_S if after_s is None else after_s
        return ProviderRateLimited(f"{where} has a limit that is used up (HTTP {status}): {said}", retry_after_s=wait_s)
    if status in _UNAVAILABLE:
        wait_s = UNAVAILABLE_RETRY_S if after_s is None else after_s
        return ProviderUnavailable(f"{where} takes no requests now (HTTP {status}): {said}", retry_after_s=wait_s)
    if is_transient(status) or not 400 <= status < 500:
        return ProviderError(f"{where} answered HTTP {status}: {said}", retry_after_s=after_s)
    if is_context_fault(fault):
        return ContextLengthExceeded(said, param=fault.param or "messages")
    return ProviderRefused(said, param=fault.param)


def _text(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:MESSAGE_LIMIT]
