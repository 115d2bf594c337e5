"""A process that reads its devices when it is told to: `python -m tests.support.fake_nvml.reader PATIENCE_S`.

It asks a line of JSON on standard input (`pids`, and `later_s` to move its clock on), and answers with one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from dataclasses import asdict

from headrace.logs import configure
from headrace.settings import Settings
from processors.generation.devices.reader import Devices


async def main(patience_s: float) -> None:
    """Answer each line until standard input ends."""
    ahead_s = 0.0
    devices = Devices(patience_s, clock=lambda: time.monotonic() + ahead_s)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        ahead_s += asked["later_s"]
        began = time.monotonic()
        readings = await devices.read(asked["pids"])
        answer = {
            "readings": [asdict(one) for one in readings],
            "took_s": time.monotonic() - began,
            "complete": devices.complete,
            "trouble": devices.nvml.trouble,
            "threads": sum(thread.name.startswith("read-") for thread in threading.enumerate()),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    configure(Settings(), "reader")
    asyncio.run(main(float(sys.argv[1])))
