"""Logging of every role: structlog, one line of JSON an event, with ids and never with secrets or prompts."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import structlog

from headrace.settings import Settings

_NOISY = ("aiokafka", "faust", "mode", "httpx", "uvicorn.access", "clickhouse_connect")
_MAX_MESSAGES = 1000
"""Different messages that are remembered, so that one with a number in its template cannot fill the memory."""


class Repeats(logging.Filter):
    """Lets each message of a library through once in `every_s` seconds, and says how often it was held back.

    While the brokers are away, a Kafka client would say so a hundred times a second. Our own events are not touched:
    they do not come through the standard library's loggers.
    """

    def __init__(self, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._every_s = every_s
        self._clock = clock
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write this record."""
        key = (record.name, str(record.msg))
        now = self._clock()
        since, held_back = self._seen.get(key, (float("-inf"), 0))
        if now - since < self._every_s:
            self._seen[key] = (since, held_back + 1)
            return False
        if len(self._seen) > _MAX_MESSAGES:
            self._seen.clear()
        self._seen[key] = (now, 0)
        if held_back:
            record.msg = f"{record.msg} (and {held_back} times more since)"
        return True


def configure(settings: Settings, role: str) -> None:
    """Set up logging of this process; the role and instance stand in every line."""
    level = getattr(logging, settings.log_level.upper())
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Repeats())
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    structlog.contextvars.bind_contextvars(role=role, instance=settings.instance)
