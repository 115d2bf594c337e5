"""A worker with memory that this machine has not: it obeys its scheduler, and may go on showing what it unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import time

import msgspec

from headrace.settings import Settings
from schemas.events import Command, Device, LoadCommand, Resident, TermCommand, UnloadCommand, WorkerStatus
from topics.catalogue import WORKER_STATUS, worker_commands
from topics.clients import LogReader, Producer

BEAT_S = 0.3
_command: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)


class SideWorker:
    """One device of `size` bytes; what it loads is there at once."""

    def __init__(self, conf: Settings, name: str, *, pool: str, provider: str, size: int) -> None:
        self.residents: dict[str, Resident] = {}
        self.keeps_showing: str | None = None
        """A model that is shown as `unloading` for ever once it was told to go."""
        self._status = WorkerStatus(
            name, f"{name}-{time.time_ns()}", pool, -1, 0, [provider], devices=[Device("d0", size, [provider])]
        )
        self._reader = LogReader(conf.kafka, name)
        self._producer = Producer(conf.kafka, name)
        self._topic = worker_commands(name)

    async def __aenter__(self) -> SideWorker:
        await self._producer.start()
        await self._reader.start()
        self._reader.assign([self._topic])
        await self._reader.consumer.seek_to_end()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._reader.stop()
        await self._producer.stop()

    async def _run(self) -> None:
        while True:
            for records in (await self._reader.consumer.getmany(timeout_ms=int(BEAT_S * 1000))).values():
                for record in records:
                    self._obey(_command.decode(record.value))
            self._status.at_ms = time.time_ns() // 1_000_000
            self._status.resident = list(self.residents.values())
            await self._producer.send(WORKER_STATUS.name, msgspec.json.encode(self._status), key=self._status.worker)

    def _obey(self, command: Command) -> None:
        match command:
            case TermCommand(term=term, fence=fence):
                self._status.term, self._status.fence = term, fence
            case LoadCommand(epoch=epoch, model=model, device=device):
                self.residents[model.id] = Resident(model.id, epoch, "active", model.bytes, device=device)
            case UnloadCommand(epoch=epoch, model=model):
                if model == self.keeps_showing:
                    self.residents[model].state = "unloading"
                else:
                    self.residents.pop(model, None)
