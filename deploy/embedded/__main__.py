"""`python -m deploy.embedded --data-dir D`: Kafka, Valkey and ClickHouse alone, for tests of single roles.

Prints one line of JSON, the HEADRACE_* variables that point at them, and runs until SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deploy.embedded import infra, launch, ports, stack


def main() -> int:
    """Run until a signal; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.embedded", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    data: Path = parser.parse_args().data_dir
    options = launch.StackOptions(
        data_dir=data, host="127.0.0.1", port=0, config=None, replicas={}, admin_key=None, drain_seconds=0.0
    )

    def ready(_url: str) -> None:
        found = stack.discover(data)
        print(json.dumps(found.environment() if found else {}), flush=True)

    try:
        return launch.serve(options, ready=ready, report=lambda line: print(line, file=sys.stderr, flush=True))
    except (infra.StartFailed, stack.StackRunning, ports.NoFreePort) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
