"""What a provider's refusal means to our caller: the one place that reads error bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from headrace.errors import (
    ContextLengthExceeded,
    HeadraceError,
    ProviderError,
    ProviderRefused,
)

MESSAGE_LIMIT = 2000
"""Characters of a provider's message that are passed on."""

_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
_CONTEXT_TEXT = re.compile(
    r"maximum context length|context (length|size|window)|exceeds? the (available )?(context|model's)"
    r"|(input|prompt) (length|is) .{0,40}(exceed|too long)|longer than the (maximum )?(model|context)",
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
    after = headers.get(b"retry-after", b"")
    retry_after_s = int(after) if after.isdigit() else None
    if 300 <= status < 400:
        target = headers.get(b"location", b"").decode("latin-1")
        return ProviderError(f"{where} redirects to {target!r}: set base_url to its final address")
    return from_fault(where, status, fault, retry_after_s)


def from_fault(where: str, status: int, fault: Fault, retry_after_s: int | None = None) -> HeadraceError:
    """The error for a fault with its status, from an answer or from the first event of a stream."""
    said = fault.message or "it gave no reason"
    if status in (401, 403, 407):
        # The text of such answers can hold a part of our key: it is the operator's, not the caller's.
        return ProviderError(f"{where} refused our credentials (HTTP {status}): check the provider's api_key_env")
    if status == 404:
        return ProviderError(f"{where} knows no such path or model: check base_url and backend_tag ({said})")
    if is_transient(status) or not 400 <= status < 500:
        return ProviderError(f"{where} answered HTTP {status}: {said}", retry_after_s=retry_after_s)
    if is_context_fault(fault):
        return ContextLengthExceeded(said, param=fault.param or "messages")
    return ProviderRefused(said, param=fault.param)


def _text(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:MESSAGE_LIMIT]
