"""The bytes of a request's body, bounded while they are read."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from headrace.errors import BodyTooLarge, InvalidRequest
from topics.catalogue import MAX_BODY_BYTES


async def read_body(request: Request) -> bytes:
    """The raw body. Raises `BodyTooLarge` as soon as it is known to be, and `InvalidRequest` when it is cut short."""
    too_large = BodyTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise InvalidRequest("The body ended before its announced length.") from None
    return b"".join(chunks)
