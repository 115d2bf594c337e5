"""Frames: how tokens travel. One Kafka record on a reply partition carries many deltas of many requests.

MessagePack arrays, by msgspec: this path sees every token. A frame is read by every ingress that owns the
partition, so a delta names its request and its attempt, and readers apply the fence rule of `StreamView`.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Kind(IntEnum):
    """What a delta carries in `data`."""

    TEXT = 0
    """a piece of the content of choice `index`."""
    CHOICES = 1
    """a JSON array of OpenAI stream choices as the provider gave it (tool deltas, logprobs)."""
    FINISH = 2
    """the finish reason of choice `index`."""
    TERMINAL = 3
    """the JSON of the `Terminal` record, already acknowledged in `inference.log`."""
    FENCE = 4
    """Empty: frames of attempts below `attempt` that come after this one are void."""
    MOVED = 5
    """The JSON of `Moved`: this request was asked twice, and its frames are on another partition."""
    MODEL = 6
    """The id of the model that the router gave this request to, where that is not the one that it names."""

    OPENED = 7
    """The JSON of `Opened`: a direct publisher wants this request's frames, from here on, on its app's topic."""


class Opened(msgspec.Struct):
    """What the chunks to a direct publisher say of their request, before the first of its frames."""

    tenant: str
    created_ms: int
    model: str
    """The model's name in the chunks."""


class Moved(msgspec.Struct):
    """Where the frames of a request that was asked twice really are."""

    partition: int | None
    """None where it has ended: its result is in the request log."""
    since_ms: int


class Delta(msgspec.Struct, array_like=True, gc=False):
    """One step of one request's answer."""

    rid: bytes
    """16 bytes of the request id."""
    attempt: int
    seq: int
    """Position in the request's stream, from 1, going on across attempts."""
    kind: int
    index: int
    """Choice, for TEXT and FINISH."""
    data: str
    tokens: int = 0
    """Completion tokens that this delta holds, as far as the provider's pieces tell."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Delta])


def encode(deltas: list[Delta]) -> bytes:
    """The record value of a batch of deltas."""
    return _encoder.encode(deltas)


def decode(value: bytes) -> list[Delta]:
    """The deltas of a record value. Raises `msgspec.DecodeError` or `msgspec.ValidationError` on garbage."""
    return _decoder.decode(value)


class StreamView:
    """One reader's view of one request's frames: says of each delta, in partition order, whether it counts.

    The rule: an attempt's frames count until a fence of a higher attempt; repeated `seq` are dropped, so a frame
    that was produced twice is seen once.
    """

    __slots__ = ("attempt", "done", "seq")

    def __init__(self, attempt: int = 1, seq: int = 0) -> None:
        self.attempt = attempt
        self.seq = seq
        self.done = False

    def accept(self, delta: Delta) -> bool:
        """Whether `delta` counts; moves the view on when it does."""
        if self.done or delta.attempt < self.attempt or delta.kind in (Kind.MOVED, Kind.MODEL, Kind.OPENED):
            return False
        if delta.kind == Kind.FENCE:
            self.attempt = delta.attempt
            return False
        if delta.seq <= self.seq:
            return False
        self.attempt = delta.attempt
        self.seq = delta.seq
        if delta.kind == Kind.TERMINAL:
            self.done = True
        return True
