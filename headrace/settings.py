"""Settings of every role, read from `HEADRACE_*` environment variables.

One class serves all roles, so that a stack has one vocabulary: the same variable means the same in the ingress
and in a worker. `headrace up` fills these for its children; in production they come from the deployment.
"""

from __future__ import annotations

import contextlib
import os
import socket
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, ByteSize, Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from topics.cluster import Cluster, SaslMechanism, SecurityProtocol
from topics.signing import Seals

INGRESS_SECRET_FILE = "ingress.secret"  # noqa: S105 - the name of a file
Part = Literal["kafka", "redis", "clickhouse"]


class NoIngressSecret(Exception):
    """What seals the requests of ingresses is not set; the message says how."""


def _also(name: str) -> AliasChoices:
    """The variable of a setting that is read without our prefix too, as people have it from similar stacks."""
    return AliasChoices(f"HEADRACE_{name.upper()}", name.upper())


class Settings(BaseSettings):
    """Where the parts are and how this process behaves. Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_", extra="ignore", hide_input_in_errors=True, populate_by_name=True
    )

    kafka_bootstrap: str = "127.0.0.1:9092"
    """Comma-separated `host:port` of Kafka brokers."""
    kafka_security_protocol: SecurityProtocol = "PLAINTEXT"
    kafka_sasl_mechanism: SaslMechanism = "SCRAM-SHA-512"
    kafka_sasl_username: str | None = None
    kafka_sasl_password: SecretStr | None = None
    kafka_ssl_cafile: FilePath | None = None
    """PEM of those who may sign the brokers' certificates; None for those that the machine trusts."""
    kafka_ssl_certfile: FilePath | None = None
    """PEM of our own certificate, where the brokers ask for one."""
    kafka_ssl_keyfile: FilePath | None = None
    """PEM of its private key, unencrypted; None when it stands in the certificate's file."""
    kafka_replication: int = Field(default=1, ge=1)
    """Replication factor of topics made by `headrace topics apply`; 3 in production."""
    kafka_min_insync: int = Field(default=1, ge=1)
    """`min.insync.replicas` of those topics; 2 in production."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    clickhouse_url: str = "http://127.0.0.1:8123"
    """HTTP endpoint of ClickHouse; user and password may stand in the URL."""
    clickhouse_database: str = "headrace"
    retention_requests_days: int = Field(default=400, ge=1)
    """How long ClickHouse keeps requests and their lifecycle; put into force by `headrace migrate`, as all of these."""
    retention_leases_days: int = Field(default=400, ge=1)
    """How long it keeps leases."""
    retention_audit_days: int = Field(default=400, ge=1)
    """How long it keeps the audit trail; Kafka keeps it for 400 days in any case."""
    retention_minutes_days: int | None = Field(default=None, ge=1)
    """How long it keeps usage by minute; None for ever."""
    retention_usage_days: int | None = Field(default=None, ge=1)
    """How long it keeps usage, which is money; None for ever."""
    retention_usage_days_again: int | None = None
    """The same number once more, without which fewer than 400 days are refused."""

    data_dir: Path = Path(".headrace")
    """Where a local stack keeps its data; operating commands find a running stack through it."""
    config: Path | None = None
    """Path of `headrace.toml`; None serves the built-in default model."""
    admin_key: SecretStr | None = None
    env: Literal["development", "production"] = "development"
    """In `production` a process does not start with a secret that is missing, short or known from examples."""
    open_parts: Annotated[frozenset[Part], NoDecode] = frozenset()
    """Comma-separated parts that production may reach without a password, or unencrypted: `kafka`, `redis`,
    `clickhouse`; for a network of their own."""
    jwt_secret: SecretStr | None = Field(default=None, validation_alias=_also("jwt_secret"))
    """What access tokens are signed with; without one each ingress makes its own, so that
    tokens are good there alone, and until it ends. A local stack has one."""
    admin_email: str | None = Field(default=None, validation_alias=_also("admin_email"))
    """The first owner, whom `headrace apply` makes if there is no such user yet."""
    admin_password: SecretStr | None = None
    ollama_base_url: str | None = Field(default=None, validation_alias=_also("ollama_base_url"))
    """The Ollama server whose models are served where there is no `headrace.toml`."""
    ollama_models: str = Field(default="", validation_alias=_also("ollama_models"))
    """Comma-separated tags of those models; they are pulled if they are not there."""
    ingress_secret: SecretStr | None = None
    """By which routers know requests that an ingress admitted: at least 32 characters, or several such by commas, of
    which the first is used and each is accepted. A local stack makes its own."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    cors_origins: str = ""
    """Comma-separated origins that browsers may call from; empty means none, `*` means all."""
    trusted_proxies: str = ""
    """Comma-separated addresses whose `X-Forwarded-*` headers are believed; empty means none."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """How long a stopping role lets running work finish."""
    request_deadline: float = Field(default=600.0, gt=0, le=86_400)
    """Default limit on a request from acceptance to terminal, unless its caller asks for less."""
    limits_on_outage: Literal["refuse", "allow"] = "refuse"
    """Of requests whose limits cannot be asked because Redis is away: 503, or let through and charged afterwards."""
    limits_default_output: int = Field(default=4096, ge=1)
    """Cap on the completion of requests that count against tokens or money and name none, nor does their model."""
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
    max_wait: float = Field(default=60.0, ge=1, le=3600)
    """W_max of the scheduler, in seconds: a queue waits no longer for its model while others hold the memory."""
    residency_loads: float = Field(default=0.0, ge=0, le=100)
    """An idle model keeps its memory for at least this many of its load times, unless a queue waits for W_max."""
    worker_memory: ByteSize | None = None
    """Most that this worker's models may take of each device, such as `12 GiB`; None leaves all but the reserve."""
    worker_memory_share: float = Field(default=1.0, gt=0, le=1)
    """Part that they may take of what each device has for models, where several workers use it."""
    worker_memory_reserve: ByteSize | None = None
    """What they leave free of each device; None for 5 %, at least 256 MiB."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    metrics_port: int | None = None
    """Serve this role's own `/metrics` on this port of `host`; every role also shows through the ingress."""

    @field_validator("open_parts", mode="before")
    @classmethod
    def _parted(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_say_who_it_is(self) -> Self:
        if self.kafka.sasl and not (self.kafka_sasl_username and self.kafka_sasl_password):
            raise ValueError(
                f"HEADRACE_KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs HEADRACE_KAFKA_SASL_USERNAME "
                "and HEADRACE_KAFKA_SASL_PASSWORD"
            )
        return self

    @property
    def seals(self) -> Seals:
        """The seals of ingresses, by `HEADRACE_INGRESS_SECRET` or the data directory. Raises `NoIngressSecret`."""
        text = self.ingress_secret.get_secret_value() if self.ingress_secret is not None else ""
        if not text:
            with contextlib.suppress(FileNotFoundError):
                text = (self.data_dir / INGRESS_SECRET_FILE).read_text(encoding="utf-8")
        try:
            return Seals([secret.strip() for secret in text.split(",") if secret.strip()])
        except ValueError as error:
            raise NoIngressSecret(
                f"Set HEADRACE_INGRESS_SECRET to what all ingresses, routers and control roles share: {error}."
            ) from None

    @property
    def kafka(self) -> Cluster:
        """The cluster, as clients are told of it."""
        password = self.kafka_sasl_password
        return Cluster(
            self.kafka_bootstrap,
            self.kafka_security_protocol,
            self.kafka_sasl_mechanism,
            self.kafka_sasl_username,
            password.get_secret_value() if password is not None else None,
            self.kafka_ssl_cafile,
            self.kafka_ssl_certfile,
            self.kafka_ssl_keyfile,
        )


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
