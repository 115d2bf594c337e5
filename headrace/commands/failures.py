"""What an operating command says and exits with when it cannot do its work: one sentence, exit code 1."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import typer
from aiokafka.errors import KafkaError
from clickhouse_connect.driver.exceptions import ClickHouseError
from redis.exceptions import RedisError

from clickhouse.errors import sentence
from clickhouse.migrate import MigrationError
from headrace.local import NoStack
from topics.cluster import AccessRefused


@contextmanager
def plain_failures(*expected: type[Exception]) -> Iterator[None]:
    """Turn what a stack that is away, or wrong input, raises into a sentence on stderr; other errors are bugs."""
    _quieten()
    wrong: tuple[type[Exception], ...] = (NoStack, MigrationError, AccessRefused, *expected)
    try:
        yield
    except wrong as error:
        raise stop(str(error)) from None
    except KafkaError as error:
        raise stop(f"Kafka does not answer as expected: {error}") from None
    except RedisError as error:
        raise stop(f"Redis does not answer as expected: {error}") from None
    except (ClickHouseError, OSError) as error:
        raise stop(sentence(error)) from None


def _quieten() -> None:
    """Keep what the drivers log about failures off the terminal: the sentence says it."""
    for name in ("aiokafka", "asyncio", "clickhouse_connect"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def stop(message: str) -> typer.Exit:
    """Say why and give the exit to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)
