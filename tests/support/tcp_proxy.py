"""A TCP proxy that can be cut: it resets and refuses, or accepts and lets nothing through."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from enum import StrEnum
from types import TracebackType

PIECE = 1 << 16
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of a socket whose close is a reset."""


class Cut(StrEnum):
    """How a proxy is cut."""

    REFUSED = "refused"
    """Connections are reset, new ones too."""
    SILENT = "silent"
    """Connections stay, new ones are accepted, and nothing is read or written: a half-open network."""


class TcpProxy:
    """Forwards connections from `port` to `target`, both on loopback."""

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self._target = target
        self._cut: Cut | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=PIECE)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self._reset_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, how: Cut) -> None:
        """Nothing goes through from here on."""
        self._cut = how
        self._open.clear()
        if how is Cut.REFUSED:
            self._reset_all()

    def heal(self) -> None:
        """All goes through again, also what silent connections held back."""
        self._cut = None
        self._open.set()

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut is Cut.REFUSED:
            _reset(writer)
            return
        await self._open.wait()
        there, back = await asyncio.open_connection("127.0.0.1", self._target, limit=PIECE)
        self._writers |= {writer, back}
        pumps = [asyncio.create_task(self._pump(reader, back)), asyncio.create_task(self._pump(there, writer))]
        self._tasks.update(pumps)
        for pump in pumps:
            pump.add_done_callback(self._tasks.discard)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for one in (writer, back):
            self._writers.discard(one)
            _reset(one)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE):
                await self._open.wait()
                writer.write(piece)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    if (connection := writer.get_extra_info("socket")) is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
