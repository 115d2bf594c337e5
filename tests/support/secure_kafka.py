"""A broker that lets nobody in unknown, by password or certificate, and lets nobody but the roles do as they like."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from deploy.embedded.ports import PortBook
from headrace.settings import Settings
from tests.support.broker import Broker

USER, PASSWORD = "headrace", "pass-word-of-the-tests"
_JAAS = "listener.name.{}.{}.sasl.jaas.config"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


@dataclass(frozen=True)
class SecureKafka:
    """Its ports by security protocol, and the files that a client needs."""

    ports: dict[str, int]
    cafile: Path
    certfile: Path
    """A client's certificate and key, in one file."""
    data_dir: Path

    def environment(self, protocol: str, **changes: str) -> dict[str, str]:
        """The `HEADRACE_KAFKA_*` variables of a client that is let in, but for `changes`."""
        own = {"bootstrap": f"127.0.0.1:{self.ports[protocol]}", "security_protocol": protocol}
        if protocol.startswith("SASL"):
            own |= {"sasl_mechanism": "SCRAM-SHA-512", "sasl_username": USER, "sasl_password": PASSWORD}
        if protocol.endswith("SSL"):
            own["ssl_cafile"] = str(self.cafile)
        if protocol == "SSL":
            own["ssl_certfile"] = str(self.certfile)
        return {f"HEADRACE_KAFKA_{name.upper()}": value for name, value in (own | changes).items() if value}

    def settings(self, protocol: str, **changes: str) -> Settings:
        """The same as settings."""
        found = self.environment(protocol, **changes).items()
        named = {name.removeprefix("HEADRACE_").lower(): value for name, value in found}
        return Settings(data_dir=self.data_dir, instance="test", **named)  # type: ignore[arg-type]


@contextmanager
def secure_kafka(home: Path) -> Iterator[SecureKafka]:
    """A broker of its own under `home`; killed at the end."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(home / "ca.pem")
    _store(authority, "127.0.0.1", home / "server.pem")
    _store(authority, "client", home / "client.pem")
    book = PortBook(home / "ports.json")
    ports = {name: book.port(name) for name in ("SASL_PLAINTEXT", "SASL_SSL", "SSL")}
    broker = Broker(
        home,
        book,
        format_flags=("--add-scram", f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"),
        extra=_security(home, ports, book.port("kafka"), book.port("kafka-controller")),
    )
    try:
        broker.start()
        asyncio.run(broker.answer())
        yield SecureKafka(ports, home / "ca.pem", home / "client.pem", home / "data")
    finally:
        broker.kill()


def _store(authority: trustme.CA, name: str, path: Path) -> None:
    """A new key and its certificate, as Java reads them (PKCS 8) and OpenSSL too."""
    made = authority.issue_cert(name)
    key = load_pem_private_key(made.private_key_pem.bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + b"".join(blob.bytes() for blob in made.cert_chain_pems))


def _security(home: Path, ports: dict[str, int], plain: int, controller: int) -> dict[str, str]:
    """Listeners for each way in, beside the broker's own; later lines of a properties file win."""
    own = {"PLAINTEXT": plain, "CONTROLLER": controller}
    protocols = [*(f"{name}:{name}" for name in (*ports, "PLAINTEXT")), "CONTROLLER:PLAINTEXT"]
    addresses = {name: f"{name}://127.0.0.1:{port}" for name, port in (ports | own).items()}
    return {
        "listeners": ",".join(addresses.values()),
        "advertised.listeners": ",".join(addresses[name] for name in (*ports, "PLAINTEXT")),
        "listener.security.protocol.map": ",".join(protocols),
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        _JAAS.format("sasl_plaintext", "scram-sha-512"): _SCRAM,
        _JAAS.format("sasl_ssl", "scram-sha-512"): _SCRAM,
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(home / "server.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(home / "ca.pem"),
        "listener.name.ssl.ssl.client.auth": "required",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "ssl.principal.mapping.rules": "RULE:^.*$/certified/",
        "super.users": f"User:{USER};User:certified;User:ANONYMOUS",
    }
