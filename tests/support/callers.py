"""Callers that do not give up: they read numbered streams through kills, resume, and say what they saw in the end."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import httpx

from bench.gateway.spec import Spec
from tests.support.chat import Api, Seen, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until

TOKENS = 60
INTERVAL_MS = 50.0
PATIENCE_S = 60.0
RAMP_S = 1.0


@dataclass
class Outcome:
    """What one caller saw, over all its connections."""

    spec: Spec
    request_id: str = ""
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    error: str | None = None
    """Code of the error event that ended the stream."""
    resumed: int = 0
    repeated: int = 0
    """Times the request was sent again because no answer had begun."""

    @property
    def expected(self) -> list[int]:
        return list(range(self.spec.seq, self.spec.seq + self.spec.tokens))


class Caller:
    """One caller with an Idempotency-Key: repeats what did not begin, resumes what broke, at any ingress."""

    def __init__(
        self,
        apis: list[Api],
        number: int,
        spec: Spec | None = None,
        *,
        patience_s: float = PATIENCE_S,
        tokens: int = TOKENS,
        **fields: object,
    ) -> None:
        self._apis = apis
        self._patience_s = patience_s
        self._turn = number
        self._fields = fields
        self.outcome = Outcome(
            spec or Spec(tokens=tokens, interval_ms=INTERVAL_MS, seq=number * 1_000, id=fresh("fault"))
        )

    async def run(self) -> Outcome:
        """Read to the end. Raises `TimeoutError` when its patience is over."""
        headers = {"idempotency-key": self.outcome.spec.id, "x-hr-resume": f"{self._patience_s:g}"}
        completion_id, last_id = "", None
        async with asyncio.timeout(self._patience_s):
            while True:
                api = self._apis[self._turn % len(self._apis)]
                try:
                    if completion_id:
                        self.outcome.resumed += 1
                        seen = await api.resume(completion_id, last_id)
                    else:
                        seen = await api.stream(body(self.outcome.spec, **self._fields), headers)
                except httpx.TransportError:
                    seen = Seen(broken=True)
                if seen.status == 200:
                    completion_id = seen.completion_id
                    self.outcome.request_id = seen.request_id
                    self.outcome.tokens += seen.tokens
                    last_id = seen.last_id or last_id
                if self._settled(seen):
                    return self.outcome
                self.outcome.repeated += not completion_id
                self._turn += 1
                await asyncio.sleep(0.2)

    def _settled(self, seen: Seen) -> bool:
        if seen.done:
            self.outcome.done = True
            return True
        if seen.error is None or seen.status == 503 or seen.error["code"] == "service_unavailable":
            return False  # it broke, or we were told to come again
        self.outcome.error = seen.error["code"]
        self.outcome.request_id = self.outcome.request_id or seen.headers["x-request-id"]
        return True


class Crowd:
    """Many callers that begin within a second of each other."""

    def __init__(
        self, stack: Stack, size: int, chance: random.Random, *, patience_s: float = PATIENCE_S, tokens: int = TOKENS
    ) -> None:
        """`tokens`: of each answer, which takes 50 ms for each of them."""
        self._stack = stack
        self._tokens = tokens
        self._size = size
        self._chance = chance
        self._patience_s = patience_s
        self._callers: list[Caller] = []
        self._tasks: list[asyncio.Task[Outcome]] = []

    async def __aenter__(self) -> Crowd:
        self._apis = [Api(self._stack, ingress=index) for index in range(len(self._stack.ingress_urls))]
        base = self._chance.randrange(1_000) * self._size
        for number in range(self._size):
            caller = Caller(self._apis, base + number, patience_s=self._patience_s, tokens=self._tokens)
            self._callers.append(caller)
            self._tasks.append(asyncio.create_task(_later(caller, RAMP_S * number / self._size)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for api in self._apis:
            await api.client.aclose()

    @property
    def names(self) -> list[str]:
        """Under which the upstream counts what they ask."""
        return [one.outcome.spec.id for one in self._callers]

    async def outcomes(self) -> list[Outcome]:
        """What they saw, once all have ended."""
        return list(await asyncio.gather(*self._tasks))

    async def begun(self) -> list[str]:
        """Ids of the requests whose answer had begun, once every connection has broken or ended."""

        def broken() -> bool:
            return all(one.outcome.request_id or one.outcome.repeated for one in self._callers)

        await until(broken, "every connection has broken", 20)
        return [one.outcome.request_id for one in self._callers if one.outcome.request_id]


async def _later(caller: Caller, delay_s: float) -> Outcome:
    await asyncio.sleep(delay_s)
    return await caller.run()
