"""What the nursery's tests have it fork: writes what it is, and ends as it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from schemas.ids import new_request_id


def main(what: str) -> int:
    """`code`: end with 7; `parent`: start another process; else sleep. Says who it is before."""
    own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid if what == "parent" else None
    print(
        json.dumps(
            {
                "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "made": new_request_id(),
                "env": os.environ.get("NURSLING"), "own": own, "nice": os.nice(0),
            }
        ),
        flush=True,
    )  # fmt: skip
    if what == "code":
        return 7
    time.sleep(60)
    return 0
