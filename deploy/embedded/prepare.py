"""`python -m deploy.embedded.prepare`: topics, tables and the configuration of a stack, in one process as it starts.

The same as `headrace topics apply`, `headrace migrate` and `headrace apply`, but the interpreter and its libraries are
loaded once, and while Kafka and ClickHouse still start.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial

from clickhouse_connect.driver.exceptions import ClickHouseError

from clickhouse.errors import sentence
from clickhouse.migrate import MigrationError, migrate
from deploy.embedded import probes
from headrace.api_keys import find_admin_key
from headrace.apply import apply_config
from headrace.config import ConfigError, load_config
from headrace.errors import HeadraceError
from headrace.parent import watch_parent
from headrace.settings import Settings, settings
from topics.apply import ApplyError, apply_all

_PART_SECONDS = 120.0
_CONTROL_SECONDS = 60.0


async def prepare(conf: Settings, workers: list[str]) -> None:
    """Do all three and say so. Raises what any of them raises."""
    config = load_config(
        conf.config, ollama_models=conf.ollama_models, ollama_base_url=conf.ollama_base_url
    )  # A wrong file is told at once.
    await asyncio.gather(_topics(conf, workers), _tables(conf))
    for line in await apply_config(conf, config, admin_key=find_admin_key(conf), timeout=_CONTROL_SECONDS):
        print(line, flush=True)


async def _topics(conf: Settings, workers: list[str]) -> None:
    if not await probes.until(partial(probes.kafka_answers, conf.kafka_bootstrap), _PART_SECONDS):
        raise ApplyError(f"Kafka does not answer at {conf.kafka_bootstrap}")
    for line in await apply_all(conf, workers=workers):
        print(line, flush=True)


async def _tables(conf: Settings) -> None:
    address = conf.clickhouse_url.rpartition("@")[2].removeprefix("http://")
    if not await probes.until(partial(probes.http_answers, f"http://{address}/ping"), _PART_SECONDS):
        raise MigrationError(f"ClickHouse does not answer at {address}")
    for step in (await asyncio.to_thread(migrate, conf)).apply:
        print(f"applied {step.number:04} {step.name}", flush=True)


def main(*workers: str) -> int:
    """Prepare the stack that HEADRACE_* names; returns the exit code."""
    watch_parent()
    try:
        asyncio.run(prepare(settings(), list(workers)))
    except (ApplyError, MigrationError, ConfigError, HeadraceError, ClickHouseError, OSError) as error:
        print(sentence(error) if isinstance(error, ClickHouseError) else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
