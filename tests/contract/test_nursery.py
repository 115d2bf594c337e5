"""Children of the nursery are the supervisor's as any other, and do not need it once they are there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deploy.embedded.child import ChildSpec
from deploy.embedded.supervisor import OneShotFailed, Supervisor
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux alone")


def spec(name: str, what: str, *, nice: int = 0) -> ChildSpec:
    code = f"import sys; from tests.support.nursling import main; sys.exit(main('{what}'))"
    return ChildSpec(
        name, (sys.executable, "-c", code), call=("tests.support.nursling:main", what), env={"NURSLING": name},
        nice=nice,
    )  # fmt: skip


class Family:
    """A supervisor with its nursery, and what its children said."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.reports: list[str] = []
        self.supervisor = Supervisor(logs, lambda: None, self.reports.append)

    async def said(self, name: str, times: int = 1) -> dict[str, object]:
        """The last of `times` lines of a child."""

        def lines() -> list[str]:
            with suppress(FileNotFoundError):
                found = (self.logs / f"{name}.log").read_text().splitlines()
                return found if len(found) >= times else []
            return []

        found: dict[str, object] = json.loads((await until(lines, f"{name} speaks"))[-1])
        return found

    def nursery(self) -> psutil.Process:
        """The nursery's process."""
        return next(
            child for child in psutil.Process().children() if "deploy.embedded.forking" in " ".join(child.cmdline())
        )


def no_orphan_comes() -> None:
    """What is left behind goes to whoever takes it here, and not to this process, which would not bury it."""
    code = "import subprocess; print(subprocess.Popen(('sleep', '1'), stdout=subprocess.DEVNULL).pid)"
    orphan = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert orphan not in [child.pid for child in psutil.Process().children()]


@pytest.fixture
async def family(tmp_path: Path) -> AsyncIterator[Family]:
    before = psutil.Process().children()
    made = Family(tmp_path)
    made.supervisor.open()
    await made.supervisor.open_nursery()
    yield made
    await made.supervisor.close()
    assert psutil.Process().children() == before, "no child is left, and no zombie"
    no_orphan_comes()


async def test_a_child_is_the_supervisors_with_a_session_environment_and_title_of_its_own(family: Family) -> None:
    family.supervisor.start(spec("one", "sleep", nice=3))
    family.supervisor.start(spec("two", "sleep"))
    one, two = await family.said("one"), await family.said("two")
    for said in (one, two):
        assert (said["parent"], said["session"]) == (os.getpid(), said["pid"])
    assert (one["env"], two["env"]) == ("one", "two")
    assert int(str(one["nice"])) - int(str(two["nice"])) == 3
    assert one["made"] != two["made"], "what is random is so in each"
    title = " ".join(psutil.Process(int(str(one["pid"]))).cmdline())
    assert title.startswith("python") and "nursling" in title and "forking" not in title


async def test_exit_codes_and_signals_are_told(family: Family) -> None:
    with pytest.raises(OneShotFailed, match="once ended with 7"):
        await family.supervisor.run_once(spec("once", "code"))
    family.supervisor.start(spec("killed", "sleep"))
    os.kill(int(str((await family.said("killed"))["pid"])), signal.SIGKILL)
    again = await family.said("killed", times=2)
    assert again["parent"] == os.getpid()
    assert any("killed was killed by signal 9" in line for line in family.reports)
    assert family.supervisor.restarts("killed") == 1


async def test_what_a_killed_child_had_started_is_ended_and_buried(family: Family) -> None:
    family.supervisor.start(spec("parent", "parent"))
    said = await family.said("parent")
    os.kill(int(str(said["pid"])), signal.SIGKILL)
    await family.said("parent", times=2)
    await until(lambda: not psutil.pid_exists(int(str(said["own"]))), "its child is gone, and no zombie")


async def test_children_outlive_the_nursery_and_another_one_comes(family: Family) -> None:
    family.supervisor.start(spec("first", "sleep"))
    first = await family.said("first")
    before = family.nursery()
    before.kill()
    family.supervisor.start(spec("meanwhile", "sleep"))
    assert (await family.said("meanwhile"))["parent"] == os.getpid()
    await until(lambda: any("another one is started" in line for line in family.reports), "its end is seen")
    await until(lambda: family.nursery().pid != before.pid, "there is another one")
    family.supervisor.start(spec("later", "sleep"))
    assert (await family.said("later"))["parent"] == os.getpid()
    assert psutil.pid_exists(int(str(first["pid"])))


async def test_children_die_with_the_supervisor(tmp_path: Path) -> None:
    code = f"""
import asyncio, time
from pathlib import Path
from deploy.embedded.supervisor import Supervisor
from tests.contract.test_nursery import spec
async def main():
    supervisor = Supervisor(Path({str(tmp_path)!r}), lambda: None, print)
    supervisor.open()
    await supervisor.open_nursery()
    supervisor.start(spec("child", "sleep"))
    await asyncio.sleep(60)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.DEVNULL)
    try:
        said = await Family(tmp_path).said("child")
        assert said["parent"] == process.pid
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
    finally:
        process.kill()
        await process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 5)
    assert not alive
