"""A connection that is lost under a command is told as such, so that who follows Redis goes on following it."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from headrace.redis_client import connect
from headrace.registry import Registry


async def closed(self: Redis, *args: Any, **options: Any) -> Any:
    """What uvloop says when a transport is closed between two looks at it."""
    raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_a_closed_transport_is_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redis, "execute_command", closed)
    client = connect("redis://127.0.0.1:1/0")
    with pytest.raises(RedisConnectionError, match="handler is closed"):
        await client.get("x")
    registry = Registry(client)
    await registry.start()
    assert [task.get_name() for task in registry._tasks if task.done()] == []
    await registry.stop()
    await client.aclose()
