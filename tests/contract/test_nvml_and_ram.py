"""Devices as a process sees them: the real NVML binding on a fake driver whose state changes under it, and real RAM."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from processors.generation.devices import host
from processors.generation.devices.cgroups import memory_groups
from processors.generation.devices.evidence import lists, still_holding
from processors.generation.devices.reading import RAM, Reading
from tests.support.fake_nvml.driver import FakeGpu, FakeNvml
from tests.support.stacks import HEADRACE
from tests.support.waiting import until

GIB = 1024**3
MIB = 1024**2
PATIENCE_S = 1.0
LIB_RM_VERSION_MISMATCH = 18


class Reader:
    """A process that reads its devices when told to (`fake_nvml/reader.py`), and its log."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        self._log = log
        self._env = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | env
        self.process: asyncio.subprocess.Process
        self.said: dict[str, Any] = {}
        """The last answer besides its readings."""

    async def start(self) -> None:
        command = [sys.executable, "-m", "tests.support.fake_nvml.reader", str(PATIENCE_S)]
        pipe = asyncio.subprocess.PIPE
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=log, env=self._env
            )

    async def read(self, *pids: int, later_s: float = 0.0) -> list[Reading]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"pids": pids, "later_s": later_s}).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), 20)
        assert line, self._log.read_text()
        self.said = json.loads(line)
        readings = [Reading(**one) for one in self.said.pop("readings")]
        return [_with_numbers(one) for one in readings]

    async def gpus(self, later_s: float = 0.0) -> list[Reading]:
        return [one for one in await self.read(later_s=later_s) if one.kind == "gpu"]

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    async def end(self) -> None:
        """Close its standard input and wait until it has ended by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            raise


def _with_numbers(one: Reading) -> Reading:
    """JSON makes text of the process ids."""
    return replace(one, processes=one.processes and {int(pid): size for pid, size in one.processes.items()})


@pytest.fixture
def nvml(tmp_path: Path) -> FakeNvml:
    made = FakeNvml(tmp_path)
    made.add(24 * GIB)
    made.add(80 * GIB, "NVIDIA Fake 80GB")
    made.save()
    return made


@pytest.fixture
async def reader(nvml: FakeNvml, tmp_path: Path) -> AsyncIterator[Reader]:
    made = Reader(tmp_path / "log", nvml.env)
    await made.start()
    yield made
    nvml.hang = False
    nvml.save()
    await made.end()


@pytest.fixture
def first(nvml: FakeNvml) -> FakeGpu:
    return nvml.gpus[0]


@pytest.fixture
def second(nvml: FakeNvml) -> FakeGpu:
    return nvml.gpus[1]


# --- what a healthy driver says -----------------------------------------------------------------------------------


async def test_every_gpu_and_the_ram_are_read(nvml: FakeNvml, reader: Reader, first: FakeGpu, second: FakeGpu) -> None:
    first.take(4711, 6 * GIB)
    first.busy = 40
    second.busy, second.lists = None, False
    nvml.save()
    one, two, ram = await reader.read()
    assert (one.id, one.index, one.name, one.kind) == (first.uuid, 0, "NVIDIA Fake 24GB", "gpu")
    assert (one.total, one.used, one.free) == (24 * GIB, 6 * GIB, 18 * GIB)
    assert (one.utilisation, one.processes, one.stale) == (0.4, {4711: 6 * GIB}, False)
    assert (two.id, two.index, two.total, two.utilisation, two.processes) == (second.uuid, 1, 80 * GIB, None, None)
    assert (ram.id, ram.kind) == (RAM, "ram")
    assert reader.said["complete"] and not reader.said["trouble"]
    assert [line["driver"] for line in reader.logged("nvml_started")] == [nvml.driver]


async def test_each_reading_shows_the_present(nvml: FakeNvml, reader: Reader, first: FakeGpu) -> None:
    assert (await reader.gpus())[0].free == 24 * GIB
    first.take(1, GIB)
    first.take(2, 3 * GIB)
    first.processes[1].bytes = None
    first.processes[1].kind = "G"
    nvml.save()
    now = (await reader.gpus())[0]
    assert (now.free, now.processes) == (20 * GIB, {1: GIB, 2: None})


async def test_more_processes_than_the_binding_first_makes_room_for(
    nvml: FakeNvml, reader: Reader, first: FakeGpu
) -> None:
    for pid in range(1, 31):
        first.take(pid, MIB)
    nvml.save()
    assert (await reader.gpus())[0].processes == dict.fromkeys(range(1, 31), MIB)


async def test_memory_can_outlive_its_process(nvml: FakeNvml, reader: Reader, first: FakeGpu) -> None:
    engine = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        first.take(engine.pid, 5 * GIB)
        nvml.save()
        readings = await reader.read(engine.pid)
        listed = lists(readings, first.uuid, [engine.pid])
        assert listed and still_holding(readings, first.uuid, [engine.pid], listed=listed)
    finally:
        engine.kill()
        await engine.wait()
    readings = await reader.read(engine.pid)
    assert not still_holding(readings, RAM, [engine.pid], listed=True)
    assert still_holding(readings, first.uuid, [engine.pid], listed=listed), "the driver still has it"
    first.give_back(engine.pid)
    nvml.save()
    readings = await reader.read(engine.pid)
    assert not still_holding(readings, first.uuid, [engine.pid], listed=listed)
    assert readings[0].free == 24 * GIB


async def test_a_gpu_that_shares_the_machines_memory_is_no_device(
    nvml: FakeNvml, reader: Reader, first: FakeGpu, second: FakeGpu
) -> None:
    first.total = first.free = 0
    nvml.save()
    for _ in range(2):
        assert [one.id for one in await reader.gpus(later_s=31)] == [second.uuid]
    assert [line["uuid"] for line in reader.logged("gpu_without_memory")] == [first.uuid]
    assert not reader.logged("gpu_gone")


async def test_only_what_cuda_may_use(nvml: FakeNvml, tmp_path: Path, second: FakeGpu) -> None:
    reader = Reader(tmp_path / "log", nvml.env | {"CUDA_VISIBLE_DEVICES": second.uuid})
    await reader.start()
    try:
        assert [one.id for one in await reader.gpus()] == [second.uuid]
    finally:
        await reader.end()


# --- and a sick one -----------------------------------------------------------------------------------------------


async def test_a_gpu_that_fell_off_the_bus_is_gone_until_nvml_is_started_again(
    nvml: FakeNvml, reader: Reader, first: FakeGpu, second: FakeGpu
) -> None:
    assert len(await reader.gpus()) == 2
    first.fall_off_the_bus()
    nvml.save()
    for later_s in (0, 0, 31, 31):  # a new session does not find it either
        assert [one.id for one in await reader.gpus(later_s=later_s)] == [second.uuid]
    assert [line["uuid"] for line in reader.logged("gpu_gone")] == [first.uuid]
    first.come_back()
    nvml.save()
    assert len(await reader.gpus(later_s=1)) == 1, "an old session never shows it again"
    back = await reader.gpus(later_s=31)
    assert [one.id for one in back] == [first.uuid, second.uuid]
    assert [line["uuid"] for line in reader.logged("gpu_back")] == [first.uuid]
    first.fall_off_the_bus()
    nvml.save()
    assert len(await reader.gpus()) == 1
    assert len(reader.logged("gpu_gone")) == 2


async def test_a_gpu_that_was_pulled_out_changes_the_others_index_and_not_their_id(
    nvml: FakeNvml, reader: Reader, first: FakeGpu, second: FakeGpu
) -> None:
    await reader.gpus()
    nvml.gpus.remove(first)
    nvml.save()
    assert [(one.id, one.index) for one in await reader.gpus()] == [(second.uuid, 1)]
    assert [(one.id, one.index) for one in await reader.gpus(later_s=31)] == [(second.uuid, 0)]
    assert [line["uuid"] for line in reader.logged("gpu_gone")] == [first.uuid]


async def test_a_gpu_that_was_lost_from_the_start(
    nvml: FakeNvml, reader: Reader, first: FakeGpu, second: FakeGpu
) -> None:
    first.fall_off_the_bus()
    nvml.save()
    for _ in range(2):
        assert [one.id for one in await reader.gpus()] == [second.uuid]
    assert [line["uuid"] for line in reader.logged("gpu_gone")] == ["index 0"]
    first.come_back()
    nvml.save()
    assert len(await reader.gpus(later_s=31)) == 2


async def test_a_driver_that_was_restarted_is_used_again_at_once(nvml: FakeNvml, reader: Reader) -> None:
    before = await reader.gpus()
    nvml.restarts += 1
    nvml.save()
    assert await reader.gpus() == before
    assert len(reader.logged("nvml_restarted")) == 1


async def test_a_driver_that_does_not_come_back_leaves_no_gpus(nvml: FakeNvml, reader: Reader) -> None:
    assert len(await reader.gpus()) == 2
    nvml.restarts += 1
    nvml.init = LIB_RM_VERSION_MISMATCH
    nvml.save()
    for _ in range(3):
        assert await reader.gpus() == []
    assert "mismatch" in reader.said["trouble"]
    assert len(reader.logged("nvml_unusable")) == 1
    assert {line["uuid"] for line in reader.logged("gpu_gone")} == {gpu.uuid for gpu in nvml.gpus}
    nvml.init = 0
    nvml.save()
    assert len(await reader.gpus()) == 2
    assert not reader.said["trouble"]


async def test_a_driver_that_hangs_makes_gpus_stale_and_holds_up_nothing(
    nvml: FakeNvml, reader: Reader, first: FakeGpu
) -> None:
    await reader.gpus()
    nvml.hang = True
    first.free = GIB
    nvml.save()
    for _ in range(3):
        *gpus, ram = await reader.read(reader.process.pid)
        assert [(one.free, one.stale) for one in gpus] == [(24 * GIB, True), (80 * GIB, True)]
        assert not ram.stale and (ram.processes or {})[reader.process.pid]
        assert reader.said["took_s"] < PATIENCE_S + 0.5
        assert reader.said["threads"] == 1, "threads pile up"
    assert len(reader.logged("device_reading_late")) == 1
    nvml.hang = False
    nvml.save()
    assert [(one.free, one.stale) for one in await reader.gpus()] == [(GIB, False), (80 * GIB, False)]
    assert len(reader.logged("device_reading_in_time")) == 1


async def test_a_driver_that_hangs_from_the_start_is_known_to_be_unknown_and_keeps_nobody_from_ending(
    nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.hang = True
    nvml.save()
    reader = Reader(tmp_path / "log", nvml.env)
    await reader.start()
    assert [one.id for one in await reader.read()] == [RAM]
    assert not reader.said["complete"]
    await reader.end()


async def test_a_machine_without_a_driver_says_so_once(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "log", {"LD_LIBRARY_PATH": ""})
    await reader.start()
    try:
        for _ in range(2):
            gpus = await reader.gpus()
        if not reader.said["trouble"]:
            pytest.skip("this machine has an NVIDIA driver")
        assert gpus == [] and reader.said["complete"]
        assert [line["level"] for line in reader.logged("no_gpus")] == ["info"]
    finally:
        await reader.end()


# --- headrace doctor ----------------------------------------------------------------------------------------------


def doctor(nvml: FakeNvml, directory: Path) -> list[str]:
    """The lines on devices of `headrace doctor`."""
    command = [HEADRACE, "doctor", "--data-dir", str(directory / "data")]
    env = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | nvml.env
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    *findings, summary = run.stdout.splitlines()
    assert "broken" in summary and not run.stderr
    assert all(line.startswith(("ok      ", "BROKEN  ")) for line in findings)
    return [line for line in findings if "GPU" in line or "memory" in line]


def test_doctor_says_which_devices_it_sees(nvml: FakeNvml, tmp_path: Path, first: FakeGpu, second: FakeGpu) -> None:
    first.take(1, 6 * GIB)
    second.fall_off_the_bus()
    nvml.save()
    seen, memory, lost = doctor(nvml, tmp_path)
    assert seen == f"ok      GPU 0: NVIDIA Fake 24GB, 24.0 GiB, 18.0 GiB free, {first.uuid}"
    assert memory.startswith("ok      memory: ") and memory.endswith("GiB free")
    assert lost.startswith("BROKEN  GPU index 1: GPU is lost: ") and "dmesg" in lost


def test_doctor_says_why_no_gpu_can_be_used(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.init = LIB_RM_VERSION_MISMATCH
    nvml.save()
    _, trouble = doctor(nvml, tmp_path)
    assert trouble.startswith("BROKEN  GPUs: ") and "version mismatch" in trouble and "nvidia-smi" in trouble


# --- RAM ----------------------------------------------------------------------------------------------------------

HOLDER = """
import mmap, subprocess, sys
block = bytearray(b"x" * (64 << 20))
with open(sys.argv[1], "rb") as file:
    model = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(model[at] for at in range(0, len(model), 4096))
child = subprocess.Popen([sys.executable, "-c", "block = bytearray(b'x' * (48 << 20)); print(1, flush=True); input()"])
input()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with 64 MiB of its own, 32 MiB of a mapped file, and a child with 48 MiB."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"m" * 32 * MIB)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(model)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
        yield process
        process.kill()
    psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=5)


def test_what_a_process_holds_of_the_ram(holder: subprocess.Popen[str]) -> None:
    held = (host.read([holder.pid]).processes or {})[holder.pid]
    assert held is not None
    assert (64 + 32 + 48) * MIB <= held < (64 + 32 + 48 + 40) * MIB


async def test_a_process_that_is_gone_holds_nothing(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    await until(lambda: host.read([holder.pid]).processes == {holder.pid: 0}, "a zombie holds no memory")
    holder.wait()
    assert host.read([holder.pid]).processes == {holder.pid: 0}


def test_taking_memory_makes_less_of_it_free() -> None:
    before = host.read()
    assert 0 < before.free < before.total <= psutil.virtual_memory().total
    assert before.used + before.free == before.total
    with mmap.mmap(-1, 512 * MIB) as block:
        for at in range(0, len(block), mmap.PAGESIZE):
            block[at] = 1
        assert before.free - host.read().free > 256 * MIB


def test_the_groups_of_this_process_are_found() -> None:
    own = Path("/proc/self")
    if not (own / "cgroup").exists():
        pytest.skip("control groups are Linux's")
    groups = memory_groups((own / "cgroup").read_text(), (own / "mountinfo").read_text())
    if not groups:
        pytest.skip("no control group file system is mounted here")
    members = [(Path(group.directory) / "cgroup.procs").read_text().split() for group in groups]
    assert any(str(os.getpid()) in pids for pids in members)
