"""Bodies of HTTP requests and answers in pieces of bounded size: length or chunks, and content encodings."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Protocol, cast

PIECE = 1 << 18
"""Bytes read, or decoded, at a time."""


class BodyError(Exception):
    """The body cannot be read as its headers say."""

    code = 6
    name = "CANNOT_PARSE_TEXT"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Code: {self.code}. DB::Exception: {reason} ({self.name})")


class Stream(Protocol):
    """The part of a binary stream that a body needs."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


class Headers(Protocol):
    """The headers of a request."""

    def get(self, name: str, /) -> str | None: ...


class Compressor(Protocol):
    """Packs an answer piece by piece."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def raw_body(headers: Headers, stream: Stream) -> Iterator[bytes]:
    """The bytes of a request's body as sent, by Content-Length or in chunks; ends at once if it has neither."""
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        yield from _chunks(stream)
        return
    length = headers.get("Content-Length") or "0"
    if not length.isdigit():
        raise BodyError(f"Content-Length {length!r} is not a number")
    yield from _exactly(stream, int(length))


def _exactly(stream: Stream, left: int) -> Iterator[bytes]:
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise ConnectionResetError("the caller left in the middle of a body")
        left -= len(piece)
        yield piece


def _chunks(stream: Stream) -> Iterator[bytes]:
    while True:
        line = stream.readline(1024)
        if not line:
            raise ConnectionResetError("the caller left in the middle of a body")
        try:
            size = int(line.split(b";", 1)[0].strip(), 16)
        except ValueError:
            raise BodyError("a chunk of the body has no size") from None
        if size == 0:
            while stream.readline(65_536) not in (b"\r\n", b"\n", b""):
                pass
            return
        yield from _exactly(stream, size)
        if stream.readline(3) not in (b"\r\n", b"\n"):
            raise BodyError("a chunk of the body is longer than its size")


def decoded(body: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """The body without its Content-Encoding. Raises BodyError for one that is not known, or broken data."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        yield from body
    elif name in ("gzip", "deflate"):
        yield from _inflated(body)
    elif name == "lz4":
        yield from _unpacked_lz4(body)
    elif name == "zstd":
        yield from _unpacked_zstd(body)
    else:
        raise BodyError(f"Content-Encoding {encoding!r} is not supported: use gzip, deflate, lz4 or zstd")


def _inflated(body: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever the data says
    for piece in body:
        left = piece
        while left:
            try:
                yield unpacker.decompress(left, PIECE)
            except zlib.error as error:
                raise BodyError(f"the body is not gzip or deflate: {error}") from None
            left = unpacker.unconsumed_tail
    if not unpacker.eof:
        raise BodyError("the compressed body ends too early")


def _unpacked_lz4(body: Iterator[bytes]) -> Iterator[bytes]:
    from lz4.frame import LZ4FrameDecompressor  # type: ignore[import-untyped]

    unpacker = LZ4FrameDecompressor()
    for piece in body:
        left = piece
        while left or not (unpacker.needs_input or unpacker.eof):
            if unpacker.eof:
                left = (unpacker.unused_data or b"") + left
                unpacker = LZ4FrameDecompressor()
            try:
                yield cast("bytes", unpacker.decompress(left, max_length=PIECE))
            except (RuntimeError, EOFError) as error:
                raise BodyError(f"the body is not lz4: {error}") from None
            left = b""
    if not unpacker.eof:
        raise BodyError("the compressed body ends too early")


def _unpacked_zstd(body: Iterator[bytes]) -> Iterator[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    unpacker = zstd.ZstdDecompressor()
    for piece in body:
        left = piece
        while left or not (unpacker.needs_input or unpacker.eof):
            if unpacker.eof:
                left = unpacker.unused_data + left
                unpacker = zstd.ZstdDecompressor()
            try:
                yield unpacker.decompress(left, PIECE)
            except (zstd.ZstdError, EOFError) as error:
                raise BodyError(f"the body is not zstd: {error}") from None
            left = b""
    if not unpacker.eof:
        raise BodyError("the compressed body ends too early")


def compressor(accept: str) -> tuple[str, Compressor | None]:
    """The content encoding to answer with, and its packer; an empty name if the caller accepts none of ours."""
    accepted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    if "gzip" in accepted:
        return "gzip", zlib.compressobj(3, wbits=31)
    if "deflate" in accepted:
        return "deflate", zlib.compressobj(3)
    return "", None
