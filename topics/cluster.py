"""A Kafka cluster: its brokers, how to be let in, and the one place where clients get their arguments from."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, TypedDict

from aiokafka import AIOKafkaConsumer
from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

KNOCK_MS = 5_000
"""How long one broker may take to let us in, or not, when it is only asked that."""

FETCHER_WAKES_MS = 1_000
"""How often a consumer that waits looks whether there is something else to fetch.

All that matters wakes it anyway. The library's own 200 ms are 80 wake-ups a second in a stack where nothing happens.
"""

ASK_AGAIN_S = 0.1
"""How long a client that could not learn where its topics are waits before it asks again."""

_REFUSALS = (AuthenticationFailedError, SaslAuthenticationFailed, UnsupportedSaslMechanismError, IllegalSaslStateError)


class AccessRefused(KafkaError):  # type: ignore[misc]  # aiokafka has no types
    """The brokers are there and do not let us in; asking again unchanged is of no use. The text says what to check."""

    def __str__(self) -> str:
        return str(self.args[0])


class Security(TypedDict):
    """What every connection takes: how to be let in."""

    security_protocol: SecurityProtocol
    ssl_context: ssl.SSLContext | None
    sasl_mechanism: SaslMechanism
    sasl_plain_username: str | None
    sasl_plain_password: str | None


class ClientOptions(Security):
    """What every aiokafka client takes."""

    bootstrap_servers: str


class ConsumerOptions(ClientOptions):
    """What every aiokafka consumer takes."""

    consumer_timeout_ms: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """Brokers, and the credentials and certificates for them. What its protocol does not use is not looked at."""

    bootstrap: str
    """Comma-separated `host:port`."""
    protocol: SecurityProtocol = "PLAINTEXT"
    mechanism: SaslMechanism = "SCRAM-SHA-512"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    cafile: Path | None = None
    """PEM of those who may sign the brokers' certificates; None for those that the machine trusts."""
    certfile: Path | None = None
    """PEM of our own certificate, where the brokers ask for one."""
    keyfile: Path | None = None
    """PEM of its private key; None when it stands in `certfile`."""

    @property
    def sasl(self) -> bool:
        """Whether we say who we are by name and password."""
        return self.protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS settings; None where the protocol has no TLS. Raises `AccessRefused` when a file is not as needed."""
        if self.protocol not in ("SSL", "SASL_SSL"):
            return None
        return _ssl_context(self.cafile, self.certfile, self.keyfile)

    def options(self) -> ClientOptions:
        """The arguments of an aiokafka producer or admin client. Raises as `ssl_context` does."""
        return {"bootstrap_servers": self.bootstrap, **self.security()}

    def consumer_options(self) -> ConsumerOptions:
        """The arguments of an aiokafka consumer. Raises as `ssl_context` does."""
        return {**self.options(), "consumer_timeout_ms": FETCHER_WAKES_MS}

    def security(self) -> Security:
        """The arguments of a single connection. Raises as `ssl_context` does."""
        return {
            "security_protocol": self.protocol,
            "ssl_context": self.ssl_context,
            "sasl_mechanism": self.mechanism,
            "sasl_plain_username": self.username if self.sasl else None,
            "sasl_plain_password": self.password if self.sasl else None,
        }

    def addresses(self) -> Iterator[tuple[str, int]]:
        """Host and port of each broker. Raises `ValueError` where one is not `host:port`."""
        for address in self.bootstrap.split(","):
            host, _, port = address.strip().rpartition(":")
            yield host.strip("[]"), int(port)


@lru_cache(maxsize=8)
def _ssl_context(cafile: Path | None, certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext:
    """Made once a process: reading the trusted certificates takes longer than a look-up may."""
    try:
        context = ssl.create_default_context(cafile=cafile)
        if certfile is not None:
            # An empty password: without one, OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        files = ", ".join(str(file) for file in (cafile, certfile, keyfile) if file is not None)
        raise AccessRefused(f"the certificates for Kafka cannot be used ({files}): {error}") from error
    return context


async def knock(cluster: Cluster) -> str | None:
    """Why no broker lets us in now; None when one does. It logs nothing, where a client would log each attempt.

    Raises `AccessRefused` when a broker refuses our credentials, or its certificate is not trusted.
    """
    security = cluster.security()
    reason, refusal = "", None
    for host, port in cluster.addresses():
        try:
            connection = await create_conn(host, port, client_id="headrace", request_timeout_ms=KNOCK_MS, **security)
        except (*_REFUSALS, ssl.SSLError, ValueError) as error:
            # A `ValueError` is SCRAM's: the broker could not prove that it knows our password.
            reason, refusal = f"{host}:{port}: {_why(error)}", error
        except (OSError, KafkaError, TimeoutError) as error:
            reason = f"{host}:{port}: {_why(error)}"
        else:
            connection.close()
            return None
    if refusal is not None:
        raise AccessRefused(_advice(cluster, reason, refusal)) from refusal
    return reason


def _advice(cluster: Cluster, reason: str, error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (
            f"no TLS connection to Kafka ({cluster.protocol}) at {reason}: check HEADRACE_KAFKA_SSL_CAFILE, and "
            "whether that port speaks TLS"
        )
    return (
        f"Kafka does not let {cluster.username!r} in ({cluster.protocol}, {cluster.mechanism}) at {reason}: check "
        "HEADRACE_KAFKA_SASL_USERNAME, HEADRACE_KAFKA_SASL_PASSWORD and HEADRACE_KAFKA_SASL_MECHANISM"
    )


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


class Client(Protocol):
    """An aiokafka client of any kind."""

    async def start(self) -> None: ...


async def start_client(cluster: Cluster, client: Client) -> None:
    """Start a client of a cluster.

    Raises `AccessRefused` when the brokers do not let us in, and `KafkaConnectionError` when none answers.
    """
    try:
        await client.start()
    except KafkaConnectionError:
        await knock(cluster)  # The client only says that it could not connect.
        raise


def pace(consumer: AIOKafkaConsumer) -> None:
    """Have a consumer wait before it asks again where its topics are.

    A consumer of aiokafka 0.14 that is assigned a topic while the brokers are away, or do not know it, asks as fast
    as it is refused: thousands of times a second, for as long as that lasts. Nothing it takes sets a pause.
    """
    client = consumer._client
    ask = client._metadata_update

    async def ask_and_rest(cluster: ClusterMetadata, topics: Collection[str] | None) -> bool:
        known: bool = await ask(cluster, topics)
        if not known or any(cluster.partitions_for_topic(topic) is None for topic in topics or ()):
            await asyncio.sleep(ASK_AGAIN_S)
        return known

    client._metadata_update = ask_and_rest
