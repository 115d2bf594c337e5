"""A caller that does not read: it is cut off, delays nobody else, and may have the rest later, whole and in order."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from urllib.parse import urlsplit

import httpx

from bench.gateway.spec import Spec
from tests.support.chat import TIMEOUT, body, fresh, numbers
from tests.support.stacks import Stack
from tests.support.waiting import until

TOKENS, FILLER = 6_000, 1_500
"""About 9 MB of text, more than an ingress keeps for one caller beside what the kernel keeps for its connection."""


def _mute_caller(stack: Stack) -> socket.socket:
    """A connection that has sent a streamed request and reads nothing."""
    place = urlsplit(stack.base_url)
    spec = Spec(tokens=TOKENS, filler=FILLER, interval_ms=0.5, ttft_ms=0, id=fresh("mute"))
    content = json.dumps(body(spec, stream=True)).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((place.hostname, place.port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\nauthorization: Bearer {stack.key}\r\n"
        f"x-hr-resume: 120\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    sock.sendall(head.encode() + content)
    return sock


async def _dropped(client: httpx.AsyncClient) -> float:
    """How many callers this ingress has cut off."""
    text = (await client.get("/metrics")).text
    found = re.search(r'^headrace_callers_dropped_total\{instance="ingress-1",.*\} (\S+)$', text, re.MULTILINE)
    assert found is not None
    return float(found[1])


async def test_a_caller_that_reads_nothing_is_cut_off_and_can_resume(stack: Stack) -> None:
    mute = await asyncio.to_thread(_mute_caller, stack)
    headers = {"authorization": f"Bearer {stack.key}"}
    try:
        async with httpx.AsyncClient(base_url=stack.base_url, headers=headers, timeout=TIMEOUT) as client:
            beside = await client.post("/v1/chat/completions", json=body(Spec(tokens=8, interval_ms=1)))
            assert numbers(beside.json()["choices"][0]["message"]["content"]) == list(range(8))

            before = await _dropped(client)
            first = await asyncio.to_thread(mute.recv, 600)
            stream_id = first.split(b"x-hr-stream-id: ")[1].split(b"\r\n")[0].decode()

            async def is_cut() -> bool:
                return await _dropped(client) > before

            await until(is_cut, "the caller that reads nothing is cut off", within_s=120)

            text = ""
            async with client.stream("GET", f"/v1/chat/completions/{stream_id}/stream") as rest:
                assert rest.status_code == 200, await rest.aread()
                async for line in rest.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        assert "error" not in chunk, chunk
                        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            assert numbers(text) == list(range(TOKENS))
    finally:
        mute.close()
