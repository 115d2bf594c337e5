"""Settings of every role, read from `HEADRACE_*` environment variables.

One class serves all roles, so that a stack has one vocabulary: the same variable means the same in the ingress
and in a worker. `headrace up` fills these for its children; in production they come from the deployment.
"""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where the parts are and how this process behaves. Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_", extra="ignore")

    kafka_bootstrap: str = "127.0.0.1:9092"
    """Comma-separated `host:port` of Kafka brokers."""
    kafka_replication: int = Field(default=1, ge=1)
    """Replication factor of topics made by `headrace topics apply`; 3 in production."""
    kafka_min_insync: int = Field(default=1, ge=1)
    """`min.insync.replicas` of those topics; 2 in production."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    clickhouse_url: str = "http://127.0.0.1:8123"
    """HTTP endpoint of ClickHouse; user and password may stand in the URL."""
    clickhouse_database: str = "headrace"

    data_dir: Path = Path(".headrace")
    """Where a local stack keeps its data; operating commands find a running stack through it."""
    config: Path | None = None
    """Path of `headrace.toml`; None serves the built-in default model."""
    admin_key: SecretStr | None = None

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    cors_origins: str = ""
    """Comma-separated origins that browsers may call from; empty means none, `*` means all."""
    trusted_proxies: str = ""
    """Comma-separated addresses whose `X-Forwarded-*` headers are believed; empty means none."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """How long a stopping role lets running work finish."""
    request_deadline: float = Field(default=600.0, gt=0)
    """Default limit on a request from acceptance to terminal, unless its caller asks for less."""
    first_status_timeout: float = Field(default=10.0, gt=0)
    """The ingress sends an HTTP status at the latest after this long, even if nothing was generated yet."""

    instance: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """Name of this process among its peers; stable names give Kafka static membership."""
    worker_id: str = "w1"
    """Stable id of a worker; its command topic is `worker.<id>.commands`."""
    worker_providers: str = "*"
    """Comma-separated names of the providers this worker serves; `*` means all."""
    pool: str = "default"
    """Pool of workers that one scheduler serves."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    metrics_port: int | None = None
    """Serve this role's own `/metrics` on this port of `host`; every role also shows through the ingress."""


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
