"""Writes small GGUF files: headers with any metadata, and whole models of zeros that the real engine can load."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float] | Sequence[bool]
Shape = tuple[int, ...]
F32, Q4_0 = 0, 2
BYTES = {F32: (1, 4), Q4_0: (32, 18)}
ALIGNMENT = 32


class Signed(int):
    """A number that the format has as int32; others are uint32."""


def text(given: str) -> bytes:
    data = given.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(given: str | bool | int | float) -> tuple[int, bytes]:
    """The format's number of a value's type, and the value."""
    if isinstance(given, str):
        return 8, text(given)
    if isinstance(given, bool):
        return 7, struct.pack("<?", given)
    if isinstance(given, Signed):
        return 5, struct.pack("<i", given)
    if isinstance(given, int):
        return 4, struct.pack("<I", given)
    return 6, struct.pack("<f", given)


def pair(key: str, given: Value) -> bytes:
    if isinstance(given, str | bool | int | float):
        kind, data = scalar(given)
        return text(key) + struct.pack("<I", kind) + data
    made = [scalar(one) for one in given]
    return text(key) + struct.pack("<IIQ", 9, made[0][0], len(made)) + b"".join(data for _, data in made)


def size_of(shape: Shape, kind: int) -> int:
    elements = 1
    for side in shape:
        elements *= side
    block, block_bytes = BYTES[kind]
    return elements // block * block_bytes


def gguf(
    metadata: Mapping[str, Value], tensors: Mapping[str, tuple[Shape, int]], *, version: int = 3, data: bool = True
) -> bytes:
    """A file of these tensors, all zeros; without `data` it is cut off behind its header."""
    infos, offset = b"", 0
    for name, (shape, kind) in tensors.items():
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        infos += struct.pack("<IQ", kind, offset)
        offset += -(-size_of(shape, kind) // ALIGNMENT) * ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(pair(key, value) for key, value in metadata.items()) + infos
    head += bytes(-len(head) % ALIGNMENT)
    return head + bytes(offset) if data else head


def write(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[Shape, int]]) -> Path:
    path.write_bytes(gguf(metadata, tensors))
    return path
