"""Two sides of GPUs that are not here: engines that believe in them, and the driver's list of what those hold.

The engine is the real llama.cpp, which computes on the CPU. Only what it says of the hardware is changed, by a module
of its name that comes first in the path: it lists one GPU more. `Driver` plays the other side: it puts each engine's
process into the fake NVML's list of the GPU that the process was told to use, and takes it out when the process ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from tests.support.fake_nvml.driver import FakeGpu, FakeNvml
from tests.support.stacks import Stack
from tests.support.waiting import POLL_S

_SHIM = """
import importlib
import sys
from pathlib import Path

here = str(Path(__file__).parent)
sys.path.remove(here)
del sys.modules["xllamacpp"]
engine = importlib.import_module("xllamacpp")
sys.path.insert(0, here)  # children of this process are to find it too
look = engine.get_device_info


def get_device_info():
    found = look()
    gpu = type(found[0]["type"]).GGML_BACKEND_DEVICE_TYPE_GPU
    return [{**found[0], "name": "CUDA0", "type": gpu}, *found]


engine.get_device_info = get_device_info
"""


def engine_with_gpu(directory: Path) -> dict[str, str]:
    """What to add to a process's environment so that llama.cpp takes itself for one with a GPU."""
    (directory / "xllamacpp.py").write_text(_SHIM)
    return {"PYTHONPATH": str(directory)}


class Driver:
    """Lists the engines of a stack on the GPUs that they were told to use, each with `size` bytes."""

    def __init__(self, stack: Stack, nvml: FakeNvml, size: int) -> None:
        self.lingers = False
        """Whether the memory of processes that end stays taken, until `let_go`."""
        self._stack = stack
        self._nvml = nvml
        self._size = size

    def engines(self) -> dict[int, str]:
        """The GPU that each engine's process was told to use, by process id."""
        found = {}
        for process in self._stack.process.tree():
            with contextlib.suppress(psutil.Error):
                if "llama_child" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process.environ()["CUDA_VISIBLE_DEVICES"]
        return found

    def listed(self, gpu: FakeGpu) -> set[int]:
        """Process ids on a GPU."""
        return {one.pid for one in gpu.processes}

    @contextlib.asynccontextmanager
    async def playing(self) -> AsyncIterator[None]:
        """Follow the processes while the body runs."""
        task = asyncio.create_task(self._play())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _play(self) -> None:
        engines: dict[int, str] = {}
        while True:
            before, engines = engines, await asyncio.to_thread(self.engines)
            for gpu in self._nvml.gpus:
                for pid in [pid for pid, where in engines.items() if where == gpu.uuid]:
                    if pid not in self.listed(gpu):
                        gpu.take(pid, self._size)
                for pid in self.listed(gpu) & (before.keys() - engines.keys()):
                    if not self.lingers:
                        gpu.give_back(pid)
            self._nvml.save()
            await asyncio.sleep(POLL_S)

    def let_go(self) -> None:
        """What lingered is given back."""
        self.lingers = False
        alive = self.engines()
        for gpu in self._nvml.gpus:
            for pid in self.listed(gpu):
                if pid not in alive and not psutil.pid_exists(pid):
                    gpu.give_back(pid)
        self._nvml.save()
