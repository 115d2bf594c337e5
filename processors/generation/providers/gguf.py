"""Reads the header of a GGUF file: what a model is and how large its tensors are, without their data.

The `gguf` package reads it too, but makes objects of every token: 3.0 s and 190 MB for a vocabulary of 49,152, and it
brings requests, tqdm and PyYAML. This keeps no long array, and takes 50 ms [measured on a busy core].
The format: ggml-org/ggml, `docs/gguf.md`; versions 2 and 3.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from processors.generation.providers.gguf_types import TENSOR_TYPES

Scalar = int | float | bool | str

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""How a value of each type lies in the file."""
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_KEPT_ARRAY = 4096
"""Arrays of numbers up to this length are kept (one number a layer); longer ones belong to the tokenizer."""
_BUFFER = 1 << 20
_MAX_DIMENSIONS = 8
_MAX_ENTRIES = 1 << 20
_ALIGNMENT = 32
_ENDS = "it ends within its header"


class NotGGUF(ValueError):
    """The file is no GGUF file, or is cut short; the message says which."""


class Tensor(msgspec.Struct, frozen=True):
    """One tensor as the header tells of it."""

    name: str
    type: str
    """`F16`, `Q4_K`, …"""
    elements: int
    bytes: int


class Header(msgspec.Struct, frozen=True):
    """What a GGUF file says before its data."""

    metadata: dict[str, Scalar | tuple[Scalar, ...]]
    """All single values, and arrays of few numbers."""
    lengths: dict[str, int]
    """Elements of every array, the tokenizer's too."""
    tensors: tuple[Tensor, ...]


def read_header(path: Path) -> Header:
    """Read the header of one file. Raises `NotGGUF` when it is none or its data is cut short, and `OSError`."""
    size = path.stat().st_size
    with path.open("rb", buffering=_BUFFER) as file:
        return _Reader(file, size).header()


class _Info(msgspec.Struct, frozen=True):
    name: str
    elements: int
    type: int
    offset: int


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def header(self) -> Header:
        if self._file.read(4) != _MAGIC:
            raise NotGGUF("it does not begin with GGUF")
        version = self._number(_U32)
        if version not in _VERSIONS:
            raise NotGGUF(f"its version is {version}; known are {' and '.join(map(str, _VERSIONS))}")
        tensors, pairs = self._number(_U64), self._number(_U64)
        if max(tensors, pairs) > _MAX_ENTRIES:
            raise NotGGUF(f"it tells of {tensors} tensors and {pairs} values")
        metadata: dict[str, Scalar | tuple[Scalar, ...]] = {}
        lengths: dict[str, int] = {}
        for _ in range(pairs):
            key, kind = self._text(), self._number(_U32)
            if kind != _ARRAY:
                metadata[key] = self._text() if kind == _STRING else self._value(_layout(kind))
                continue
            kind, lengths[key] = self._number(_U32), self._number(_U64)
            if kind == _STRING:
                self._skip_texts(lengths[key])
            elif (values := self._numbers(_layout(kind), lengths[key])) is not None:
                metadata[key] = values
        infos = [self._info() for _ in range(tensors)]
        return Header(metadata, lengths, self._tensors(infos, metadata.get("general.alignment", _ALIGNMENT)))

    def _info(self) -> _Info:
        name, dimensions = self._text(), self._number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            raise NotGGUF(f"tensor {name!r} has {dimensions} dimensions")
        elements = math.prod(self._number(_U64) for _ in range(dimensions))
        return _Info(name, elements, self._number(_U32), self._number(_U64))

    def _tensors(self, infos: Sequence[_Info], alignment: object) -> tuple[Tensor, ...]:
        """The tensors with their sizes; a download that was broken off has the whole header, and less data."""
        if not isinstance(alignment, int) or alignment <= 0:
            raise NotGGUF(f"its alignment is {alignment!r}")
        begin = -(-self._file.tell() // alignment) * alignment
        ends = dict(itertools.pairwise([*sorted({info.offset for info in infos}), self._size - begin]))
        made = [_sized(info, ends[info.offset] - info.offset) for info in infos]
        needed = max((begin + info.offset + one.bytes for info, one in zip(infos, made, strict=True)), default=0)
        if needed > self._size:
            raise NotGGUF(f"it is cut short: {self._size} of at least {needed} bytes are there")
        return tuple(made)

    def _numbers(self, layout: struct.Struct, count: int) -> tuple[Scalar, ...] | None:
        data = self._take(count * layout.size)
        return tuple(value for (value,) in layout.iter_unpack(data)) if count <= _KEPT_ARRAY else None

    def _skip_texts(self, count: int) -> None:
        """Read past `count` texts; a vocabulary has so many that each call counts."""
        read, length_of = self._file.read, _U64.unpack
        for _ in range(count):
            data = read(8)
            if len(data) < 8:
                raise NotGGUF(_ENDS)
            (length,) = length_of(data)
            if length > self._size or len(read(length)) < length:
                raise NotGGUF(_ENDS)

    def _text(self) -> str:
        return self._take(self._number(_U64)).decode("utf-8", "replace")

    def _number(self, layout: struct.Struct) -> int:
        return int(layout.unpack(self._take(layout.size))[0])

    def _value(self, layout: struct.Struct) -> Scalar:
        value: Scalar = layout.unpack(self._take(layout.size))[0]
        return value

    def _take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) < count:
            raise NotGGUF(_ENDS)
        return data


def _layout(kind: int) -> struct.Struct:
    layout = _SCALARS.get(kind)
    if layout is None:
        raise NotGGUF(f"a value is of the unknown type {kind}")
    return layout


def _sized(info: _Info, room: int) -> Tensor:
    """The tensor; one of a type that is not known here takes the bytes up to the next."""
    if info.type not in TENSOR_TYPES:
        return Tensor(info.name, f"type {info.type}", info.elements, max(room, 0))
    name, block, block_bytes = TENSOR_TYPES[info.type]
    return Tensor(info.name, name, info.elements, info.elements // block * block_bytes)
