"""Where an OpenAI-compatible server listens, read from its base URL."""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

import msgspec


class Endpoint(msgspec.Struct, frozen=True):
    """An address that HTTP/1.1 requests go to: TCP, TLS, or a unix socket."""

    host: str
    port: int
    path: str = ""
    """Prefix of every request's path, without a slash at its end."""
    tls: bool = False
    socket: str | None = None
    """Path of a unix socket; host and port then only name it."""

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket else f"{self.host}:{self.port}"

    @property
    def host_header(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (80, 443) or self.socket else f"{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS settings that check the server's certificate and name; None for plain HTTP."""
        return ssl.create_default_context() if self.tls else None


def parse_base_url(url: str) -> Endpoint:
    """Read `http://host[:port][/prefix]`, `https://…` or `unix:///path/to.sock` (whose prefix is `/v1`).

    Raises ValueError with what is wrong.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.netloc:
            raise ValueError(f"{url!r} must name an absolute path: unix:///path/to.sock")
        return Endpoint(host="localhost", port=80, path="/v1", socket=parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not a base URL: it must begin with http://, https:// or unix://")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ValueError(f"{parts.scheme}://{parts.hostname}: a base URL holds no query, fragment or password")
    tls = parts.scheme == "https"
    return Endpoint(host=parts.hostname, port=parts.port or (443 if tls else 80), path=parts.path.rstrip("/"), tls=tls)
