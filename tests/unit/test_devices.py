"""Devices without I/O: what raw answers and the kernel's texts become, budgets, and evidence that memory is free."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from processors.generation.devices import host
from processors.generation.devices.budget import Steady, budget
from processors.generation.devices.cgroups import Group, Limit, limit, memory_groups
from processors.generation.devices.evidence import given_back, lists, still_holding
from processors.generation.devices.nvml import Raw, by_process, chosen, reading
from processors.generation.devices.reading import RAM, Reading, held
from processors.generation.devices.single import Single

GIB = 1024**3
MOUNTS_V2 = (
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
)
MOUNTS_V1 = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro master:17 - cgroup cgroup rw,memory\n"


def gpu(free: int = 20 * GIB, processes: dict[int, int | None] | None = None, stale: bool = False) -> Reading:
    return Reading("GPU-1", "gpu", "card", 24 * GIB, 24 * GIB - free, free, processes or {}, stale=stale)


def raw(index: int = 0, uuid: str = "GPU-1", busy: int | None = 30) -> Raw:
    return Raw(index, uuid, "card", 24 * GIB, 20 * GIB, busy, [(7, GIB)], None)


# --- GPUs ---------------------------------------------------------------------------------------------------------


def test_a_gpus_answers_become_a_reading() -> None:
    made = reading(raw(index=3))
    assert (made.id, made.kind, made.index, made.utilisation) == ("GPU-1", "gpu", 3, 0.3)
    assert (made.total, made.used, made.free) == (24 * GIB, 4 * GIB, 20 * GIB)
    assert made.processes == {7: GIB}
    assert reading(raw(busy=None)).utilisation is None
    assert reading(Raw(0, "GPU-1", "card", GIB, GIB, None, None, [(7, GIB)])).processes is None


def test_processes_of_both_lists_and_of_unknown_size() -> None:
    merged = by_process([(1, 100), (2, None), (3, 0), (4, 10), (4, 20)], [(1, 100), (5, 7), (2, 9)])
    assert merged == {1: 100, 2: 9, 3: None, 4: 30, 5: 7}


def test_what_is_held_is_unknown_when_one_size_is() -> None:
    assert held(gpu(processes={1: 5, 2: 6, 3: None}), [1, 2, 2, 9]) == 11
    assert held(gpu(processes={1: 5, 3: None}), [1, 3]) is None
    assert held(replace(gpu(), processes=None), [1]) is None


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [0, 2]),
        ("GPU-b", [1]),
        ("GPU-bb, 2", [1, 2]),
        ("GPU-", []),
        ("0,-1,2", [0]),
        ("NoDevFiles", []),
    ],
)
def test_only_gpus_that_cuda_may_use(visible: str | None, indices: list[int]) -> None:
    found = [raw(0, "GPU-aa"), raw(1, "GPU-bb"), raw(2, "GPU-cc")]
    assert [one.index for one in chosen(found, visible)] == indices


# --- control groups -----------------------------------------------------------------------------------------------


def paths(*names: str, version: int = 2) -> list[Group]:
    return [Group(PurePosixPath(name), version) for name in names]


def test_the_groups_of_a_process_up_to_the_root() -> None:
    found = memory_groups("0::/system.slice/headrace.service\n", MOUNTS_V2)
    assert found == paths(
        "/sys/fs/cgroup/system.slice/headrace.service", "/sys/fs/cgroup/system.slice", "/sys/fs/cgroup"
    )


def test_a_container_that_sees_its_own_group_only() -> None:
    assert memory_groups("0::/\n", MOUNTS_V2) == paths("/sys/fs/cgroup")
    assert memory_groups("0::/../other\n", MOUNTS_V2) == paths("/sys/fs/cgroup")
    point = "/sys/fs/cgroup/memory"
    assert memory_groups("4:memory:/docker/abc\n", MOUNTS_V1) == paths(point, version=1)
    assert memory_groups("4:memory:/docker/abc/job\n", MOUNTS_V1) == paths(f"{point}/job", point, version=1)
    assert memory_groups("4:memory:/elsewhere\n", MOUNTS_V1) == paths(point, version=1)


def test_both_hierarchies_at_once_and_names_with_blanks() -> None:
    mounts = MOUNTS_V1.replace("/docker/abc", "/") + "41 31 0:38 / /mnt/c\\040g rw - cgroup2 cgroup2 rw\n"
    found = memory_groups("4:cpu,memory:/a\n1:name=systemd:/x\n0::/b\n", mounts)
    assert found == [
        *paths("/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory", version=1),
        *paths("/mnt/c g/b", "/mnt/c g"),
    ]


def test_limits_of_version_2() -> None:
    files = {"memory.max": "max\n", "memory.high": "max\n", "memory.current": "900\n", "memory.stat": "anon 1\n"}
    assert limit(2, files) is None
    assert limit(2, files | {"memory.high": "1000\n"}) == Limit(1000, 900)
    assert limit(2, files | {"memory.high": "2000\n", "memory.max": "1500\n"}) == Limit(1500, 900)
    assert limit(2, {"memory.stat": ""}) is None


def test_cache_that_nobody_maps_is_free_and_a_mapped_model_is_not() -> None:
    def used(stat: str) -> int:
        found = limit(2, {"memory.max": "1000", "memory.current": "900", "memory.stat": stat})
        assert found is not None
        return found.used

    assert used("inactive_file 600\nactive_file 100\nfile_mapped 0\n") == 300
    assert used("inactive_file 600\nactive_file 100\nfile_mapped 500\n") == 700
    assert used("inactive_file 600\nactive_file 0\nfile_mapped 650\n") == 900


def test_limits_of_version_1_count_the_whole_tree() -> None:
    stat = "inactive_file 1\nmapped_file 1\ntotal_inactive_file 400\ntotal_active_file 0\ntotal_mapped_file 100\n"
    files = {"memory.limit_in_bytes": "1000\n", "memory.usage_in_bytes": "700\n", "memory.stat": stat}
    assert limit(1, files) == Limit(1000, 400)


# --- RAM ----------------------------------------------------------------------------------------------------------


def test_meminfo_without_what_is_mapped() -> None:
    text = "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    600 kB\nMapped:   150 kB\nHugePages_Total:  0\n"
    assert host.machine(text) == host.Machine(1000 * 1024, 450 * 1024)


def test_ram_is_what_the_tightest_level_leaves() -> None:
    machine = host.Machine(64 * GIB, 50 * GIB)
    open_field = host.ram(machine, [], {})
    assert (open_field.id, open_field.kind, open_field.total, open_field.free) == (RAM, "ram", 64 * GIB, 50 * GIB)
    # Its own group has plenty left, but the one above is filled by a neighbour.
    limits = [Limit(16 * GIB, 2 * GIB), Limit(32 * GIB, 29 * GIB), Limit(2**63, 40 * GIB)]
    inside = host.ram(machine, limits, {5: 1})
    assert (inside.total, inside.used, inside.free, inside.processes) == (16 * GIB, 13 * GIB, 3 * GIB, {5: 1})
    assert host.ram(machine, [Limit(GIB, 2 * GIB)], {}).free == 0


# --- budgets ------------------------------------------------------------------------------------------------------


def test_the_budget_is_what_others_leave() -> None:
    assert budget(gpu(free=24 * GIB), 0, GIB) == 23 * GIB
    assert budget(gpu(free=14 * GIB), 10 * GIB, GIB) == 23 * GIB, "what we hold ourselves does not make it smaller"
    assert budget(gpu(free=10 * GIB), 10 * GIB, GIB) == 19 * GIB, "what others hold does"
    assert budget(gpu(free=24 * GIB), 5 * GIB, GIB) == 23 * GIB, "never more than the device has"
    assert budget(gpu(free=24 * GIB), 0, GIB, cap=8 * GIB) == 8 * GIB
    assert budget(gpu(free=GIB), 0, 2 * GIB) == 0
    assert budget(gpu(), 0, 0, cap=0) == 0


def test_a_budget_shrinks_at_once_and_grows_when_it_is_worth_it() -> None:
    steady = Steady()
    assert [steady.follow(size) for size in (10_000, 9_950, 10_400, 9_900)] == [10_000] * 4
    assert steady.follow(9_899) == 9_899
    assert steady.follow(10_390) == 9_899
    assert steady.follow(10_394) == 10_394
    assert [steady.follow(size) for size in (0, 1, 0)] == [0, 1, 0]


# --- evidence -----------------------------------------------------------------------------------------------------


def test_a_gpus_memory_is_free_when_a_process_that_it_showed_is_gone() -> None:
    assert lists([gpu(processes={7: None})], "GPU-1", [7])
    assert still_holding([gpu(processes={7: None})], "GPU-1", [7, 8], listed=True)
    assert not still_holding([gpu(processes={9: 5})], "GPU-1", [7, 8], listed=True)


def test_silence_of_a_gpu_is_no_evidence() -> None:
    gone = gpu(processes={})
    assert still_holding([gone], "GPU-1", [7], listed=False), "it never showed our process ids"
    assert still_holding([], "GPU-1", [7], listed=True), "it fell off the bus"
    assert still_holding([gpu(stale=True)], "GPU-1", [7], listed=True), "it hangs"
    assert still_holding([replace(gpu(), processes=None)], "GPU-1", [7], listed=True), "it lists nobody"
    assert lists([gpu(processes={7: 1}, stale=True)], "GPU-1", [7]), "that it shows our process ids was seen before"


def test_ram_is_free_when_every_process_was_looked_for_and_is_gone() -> None:
    def ram(processes: dict[int, int | None]) -> list[Reading]:
        return [Reading(RAM, "ram", "RAM", 10, 5, 5, processes)]

    assert not still_holding(ram({7: 0, 8: 0}), RAM, [7, 8], listed=False)
    assert still_holding(ram({7: 0, 8: 4}), RAM, [7, 8], listed=False)
    assert still_holding(ram({7: 0}), RAM, [7, 8], listed=False), "nobody looked for one of them"
    assert still_holding(ram({7: None}), RAM, [7], listed=False), "it may not be looked at"


def test_free_memory_that_rose_is_evidence_too() -> None:
    before = gpu(free=10 * GIB)
    assert given_back(before, [gpu(free=14 * GIB)], 4 * GIB)
    assert not given_back(before, [gpu(free=13 * GIB)], 4 * GIB)
    assert not given_back(before, [gpu(free=14 * GIB, stale=True)], 4 * GIB)
    assert not given_back(before, [], 4 * GIB)


# --- work that blocks ---------------------------------------------------------------------------------------------


async def test_callers_at_once_get_results_of_work_that_began_after_they_asked() -> None:
    single: Single[int] = Single("test")
    begun: list[int] = []

    def work() -> int:
        begun.append(threading.get_ident())
        return len(begun)

    answers = await asyncio.wait_for(asyncio.gather(*(single.latest(work, 5.0) for _ in range(5))), 10)
    assert [fresh for _, fresh in filter(None, answers)] == [True] * 5
    assert threading.get_ident() not in begun


async def test_one_work_at_a_time_and_the_last_result_while_it_hangs() -> None:
    single: Single[int] = Single("test")
    go, running = threading.Semaphore(0), threading.Semaphore(0)
    at_work: list[int] = []

    def work() -> int:
        at_work.append(1)
        running.release()
        go.acquire()
        at_work.pop()
        return len(at_work)

    assert await single.latest(work, 0.0) is None, "nothing has come yet"
    await asyncio.to_thread(running.acquire)
    assert await single.latest(work, 0.01) is None
    go.release()
    go.release()
    assert await single.latest(work, 5.0) == (0, True), "not the result of the work that had hung, but of the next"
    assert await single.latest(work, 0.01) == (0, False)
    assert len(at_work) == 1, "a second one runs beside the one that hangs"
    go.release()


async def test_work_that_fails_is_told_and_tried_again() -> None:
    single: Single[float] = Single("test")
    with pytest.raises(ZeroDivisionError):
        await single.latest(lambda: 1 / 0, 5.0)
    assert await single.latest(lambda: 1.0, 5.0) == (1.0, True)
