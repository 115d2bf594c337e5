"""The machine's GPUs as devices, through NVIDIA's management library (NVML)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pynvml
import structlog

from processors.generation.devices.reading import Reading

log = structlog.get_logger(__name__)
T = TypeVar("T")

START_AGAIN_S = 30.0
"""While a GPU is away, NVML is started anew this often: a session never shows what came back under it. Starting takes
up to seconds where no persistence daemon keeps the driver awake, so not at each reading."""

Listed = Sequence[tuple[int, int | None]]
"""Processes as NVML lists them: id, and bytes or None."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A GPU's answers as NVML gave them. Sizes are bytes, `busy` is a percentage; None where it does not tell."""

    index: int
    uuid: str
    name: str
    total: int
    free: int
    busy: int | None
    compute: Listed | None
    graphics: Listed | None


def reading(raw: Raw) -> Reading:
    """The reading that a GPU's answers make. What the driver keeps for itself counts as used."""
    return Reading(
        id=raw.uuid,
        kind="gpu",
        name=raw.name,
        total=raw.total,
        used=raw.total - raw.free,
        free=raw.free,
        processes=None if raw.compute is None else by_process(raw.compute, raw.graphics or ()),
        index=raw.index,
        utilisation=None if raw.busy is None else min(max(raw.busy / 100, 0.0), 1.0),
    )


def by_process(compute: Listed, graphics: Listed) -> Mapping[int, int | None]:
    """Bytes by process id. One that does both is in both lists with the same bytes; one that works on two instances of
    a GPU is twice in a list. Zero bytes is what drivers say of processes in containers: they cannot tell.
    """
    first, second = _sums(compute), _sums(graphics)
    merged: dict[int, int | None] = {}
    for pid in first.keys() | second.keys():
        most = max(first.get(pid) or 0, second.get(pid) or 0)
        merged[pid] = most or None
    return merged


def chosen(found: Sequence[Raw], visible: str | None) -> list[Raw]:
    """The GPUs that engines started from here can use: what `CUDA_VISIBLE_DEVICES` names, which NVML itself ignores.

    As CUDA reads it: indices, or UUIDs that may be cut short, up to the first that it does not know; all when unset.
    """
    if visible is None:
        return list(found)
    picked: list[Raw] = []
    for name in (part.strip() for part in visible.split(",")):
        match = [raw for raw in found if name == str(raw.index) or (name[:4] == "GPU-" and raw.uuid.startswith(name))]
        if len(match) != 1:
            break
        picked += match
    return [raw for raw in found if raw in picked]


def _sums(listed: Listed) -> dict[int, int | None]:
    sums: dict[int, int | None] = {}
    for pid, size in listed:
        known = sums.get(pid, 0)
        sums[pid] = None if known is None or not size else known + size
    return sums


class Nvml:
    """A session with NVML. Not for several threads at once; each call may block for long when a GPU is sick."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, visible: str | None = None) -> None:
        self.trouble = ""
        """Why no GPU can be read at all, in NVML's words; empty when it answers."""
        self.installed = True
        """Whether NVIDIA's library is on this machine."""
        self.away: dict[str, str] = {}
        """Why a GPU is not in the readings, by UUID, or by index when it never told its UUID. Each is logged once."""
        self._clock = clock
        self._visible = visible
        self._driver: str | None = None
        self._running = False
        self._start_at = 0.0
        self._names: dict[str, str] = {}
        """Every GPU seen so far, by its UUID."""
        self._at: dict[int, str] = {}
        """UUIDs by index in this session."""
        self._without: set[str] = set()
        """GPUs without memory of their own."""

    def read(self) -> list[Reading]:
        """Read all GPUs that answer, in NVML's order. Those that do not are left out, and logged once.

        NVML's errors are never raised: they end in the log, and in `trouble` when no GPU can be read.
        """
        if self.away and self._clock() >= self._start_at:
            self._stop()
        failures: dict[str, str] = {}
        try:
            try:
                found = self._look(failures)
            except pynvml.NVMLError_Uninitialized:
                log.warning("nvml_restarted")
                self._stop()
                failures.clear()
                found = self._look(failures)
        except pynvml.NVMLError as error:
            self._stop()
            self._explain(error)
            found = []
        else:
            self.trouble = ""
            self.installed = True
        self._account(found, failures)
        return [reading(raw) for raw in found]

    def _look(self, failures: dict[str, str]) -> list[Raw]:
        if not self._running:
            pynvml.nvmlInit()
            self._running = True
            self._start_at = self._clock() + START_AGAIN_S
            driver = _optional(pynvml.nvmlSystemGetDriverVersion)
            if driver != self._driver:
                log.info("nvml_started", driver=driver)
            self._driver = driver
        found: list[Raw] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                raw = self._gpu(index)
            except pynvml.NVMLError_Uninitialized:
                raise
            except pynvml.NVMLError as error:
                failures[self._at.get(index, f"index {index}")] = str(error)
            else:
                found += [raw] if raw is not None else []
        return chosen(found, self._visible)

    def _gpu(self, index: int) -> Raw | None:
        """One GPU's answers; None for one that shares the machine's memory. Raises `NVMLError`."""
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = self._at[index] = str(pynvml.nvmlDeviceGetUUID(handle))
        name = str(pynvml.nvmlDeviceGetName(handle))
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError_NotSupported:
            if uuid not in self._without:
                self._without.add(uuid)
                log.info("gpu_without_memory", uuid=uuid, name=name)
            return None
        rates = _optional(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
        return Raw(
            index=index,
            uuid=uuid,
            name=name,
            total=int(memory.total),
            free=int(memory.free),
            busy=None if rates is None else int(rates.gpu),
            compute=_optional(lambda: _listed(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
            graphics=_optional(lambda: _listed(pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle))),
        )

    def _account(self, found: Iterable[Raw], failures: Mapping[str, str]) -> None:
        """Log which GPUs have gone and which are back."""
        seen = {raw.uuid: raw.name for raw in found}
        self._names |= seen
        away = dict.fromkeys(self._names.keys() - seen.keys(), self.trouble or "no longer listed")
        # In a new session, a failure that has no UUID is most likely that of a GPU known to be away.
        away |= {uuid: why for uuid, why in failures.items() if uuid in self._names or not away}
        for uuid in away.keys() - self.away.keys():
            log.error("gpu_gone", uuid=uuid, name=self._names.get(uuid), reason=away[uuid])
        for uuid in self.away.keys() & seen.keys():
            log.info("gpu_back", uuid=uuid, name=seen[uuid])
        self.away = away

    def _explain(self, error: pynvml.NVMLError) -> None:
        """NVML itself does not answer: say so once, until the reason changes."""
        told, self.trouble = self.trouble, str(error)
        self.installed = error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        if told == self.trouble:
            return
        if not self.installed:
            log.info("no_gpus", reason=self.trouble)
        else:
            log.warning("nvml_unusable", reason=self.trouble)

    def _stop(self) -> None:
        """End the session, as far as the driver still knows it; the next reading starts another."""
        if self._running:
            self._running = False
            self._at.clear()
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.info("nvml_not_ended", reason=str(error))


def _listed(processes: Iterable[pynvml.c_nvmlProcessInfo_t]) -> Listed:
    return [(int(one.pid), one.usedGpuMemory) for one in processes]


def _optional(ask: Callable[[], T]) -> T | None:
    """An answer that not every GPU or driver gives. Raises `NVMLError` when the GPU or the session is lost."""
    try:
        return ask()
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_Uninitialized):
        raise
    except pynvml.NVMLError:
        return None
