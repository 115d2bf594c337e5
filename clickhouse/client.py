"""Connections to ClickHouse over HTTP, as `Settings` describe them."""

from __future__ import annotations

import re
from typing import TypedDict
from urllib.parse import unquote, urlsplit

import clickhouse_connect
from clickhouse_connect.driver import options
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.client import Client

from headrace.settings import Settings

for heavy in ("np", "pd", "pd_time_test"):
    # The client loads numpy, pandas and more at its first insert, for frames that are never used here: 80 MB and 1 s.
    setattr(options, heavy, None)

INSERT_SETTINGS: dict[str, int] = {
    # An insert is answered when its parts are written, never when it is only buffered.
    "async_insert": 0,
    "wait_for_async_insert": 1,
    # A replay of years touches many months at once; that is slow, not wrong.
    "throw_on_max_partitions_per_insert_block": 0,
}
"""Settings of every insert; ClickHouse 26 buffers inserts by default, which would lose rows after a commit."""

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")


class Target(TypedDict):
    """Arguments of `clickhouse_connect.get_client` that say where the server is."""

    interface: str
    host: str
    port: int
    username: str | None
    password: str
    proxy_path: str


def database_name(conf: Settings) -> str:
    """The configured database. Raises `ValueError` when it is not a plain identifier."""
    if not _NAME.match(conf.clickhouse_database):
        raise ValueError(
            f"HEADRACE_CLICKHOUSE_DATABASE is {conf.clickhouse_database!r}; use letters, digits and underscores only"
        )
    return conf.clickhouse_database


def target(url: str) -> Target:
    """The parts of an `http(s)://[user[:password]@]host[:port][/path]` URL. Raises `ValueError` on another form."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("HEADRACE_CLICKHOUSE_URL is not of the form http://[user:password@]host:port")
    return Target(
        interface=parts.scheme,
        host=parts.hostname,
        port=parts.port or (8443 if parts.scheme == "https" else 8123),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password or ""),
        proxy_path=parts.path.strip("/"),
    )


async def connect(conf: Settings, *, database: str | None = None, timeout_s: float = 60.0) -> AsyncClient:
    """An asynchronous client. Raises `ClickHouseError` or `OSError` when no server answers.

    Who writes names no `database`, since a server refuses every query under one that does not exist yet: they write
    `database.table`.
    """
    return await clickhouse_connect.get_async_client(
        **target(conf.clickhouse_url),
        database=database,
        connect_timeout=5.0,
        send_receive_timeout=timeout_s,
        autogenerate_session_id=False,
        client_name="headrace",
    )


def connect_sync(conf: Settings, *, database: str | None = None, timeout_s: float = 300.0) -> Client:
    """A blocking client for the command line, in `database`. Raises `ClickHouseError` when no server answers."""
    return clickhouse_connect.get_client(
        **target(conf.clickhouse_url),
        database=database,
        connect_timeout=5.0,
        send_receive_timeout=timeout_s,
        autogenerate_session_id=False,
        client_name="headrace",
    )
