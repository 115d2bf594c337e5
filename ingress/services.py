"""What the endpoints share: one object, made at start and closed at the end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable

import msgspec
import structlog

from headrace.analytics import Analytics
from headrace.control_client import ControlClient
from headrace.erasure import ErasureBook
from headrace.fleet import FleetReader
from headrace.limits.limiter import Limiter
from headrace.model_facts import FactsCache
from headrace.pools import Pools
from headrace.projection import Projection
from headrace.redis_client import connect
from headrace.registry import Registry
from headrace.settings import Settings
from ingress.attachments import Attachments
from ingress.idempotency import Reservations
from ingress.limits import Admissions
from ingress.lookup import Lookup
from ingress.replies import ReplyReader
from ingress.revocations import Revocations
from ingress.signin.attempts import Attempts
from ingress.signin.sessions import Sessions
from ingress.signin.tokens import SignIn
from schemas.events import IngressStatus
from topics.catalogue import INGRESS_STATUS
from topics.clients import Producer
from topics.outcomes import Outcomes

log = structlog.get_logger(__name__)

BEAT_S = 5.0
CONFIRM_S = 10.0
"""How long a change of the control plane may take to be in force."""


class Services:
    """Clients and background readers of one ingress process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.boot = secrets.token_hex(4)
        self.seals = settings.seals
        self.redis = connect(settings.redis_url)
        self.registry = Registry(self.redis)
        self.erasures = ErasureBook(self.redis)
        self.producer = Producer(settings.kafka, settings.instance)
        self.projection = Projection(self.redis)
        self.control = ControlClient(settings, self.projection, timeout=CONFIRM_S, producer=self.producer)
        secret = settings.jwt_secret
        self.signin = SignIn(secret.get_secret_value() if secret is not None else secrets.token_urlsafe(48))
        self.sessions = Sessions(self.redis)
        self.attempts = Attempts(self.redis)
        self.revocations = Revocations(self.registry)
        self.outcomes = Outcomes(self.producer, "ingress", settings.instance)
        self.replies = ReplyReader(settings.kafka, settings.instance, self.producer)
        self.pools = Pools(settings.kafka, settings.instance)
        self.fleet = FleetReader(settings.kafka, settings.instance)
        self.lookup = Lookup(settings, self.seals)
        self.reservations = Reservations(self.redis)
        self.limiter = Limiter(self.redis, allow_on_outage=settings.limits_on_outage == "allow")
        self.admissions = Admissions(self.limiter, settings.limits_default_output)
        self.facts = FactsCache(self.redis)
        self.attachments = Attachments(self.redis, self.producer, settings.instance)
        self.analytics = Analytics(settings)
        self.stopping = asyncio.Event()
        """Set when the process begins to stop: who only watches is let go at once."""
        self.draining = asyncio.Event()
        """Set when it has waited long enough: open streams end with an error that says how to resume."""
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Connect; waits for the brokers, not for Redis (its absence is answered with 503)."""
        await self.producer.start()
        await self.registry.start()
        readers = self.replies.run(), self.replies.sweep(), self.pools.run(), self.fleet.run(), self.revocations.run()
        for work in (*readers, self._beat()):
            self._watch(work)

    async def _beat(self) -> None:
        """Tell schedulers that this process is there, for ever: what its callers ask outlives it for a while only."""
        while True:
            status = IngressStatus(self.settings.instance, self.boot, time.time_ns() // 1_000_000)
            self.producer.post_later(INGRESS_STATUS.name, msgspec.json.encode(status), key=status.instance)
            await asyncio.sleep(BEAT_S)

    def _watch(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.failed.done():
            self.failed.set_exception(task.exception() or RuntimeError("a reader ended"))

    def drain(self) -> None:
        """End the open streams with an error that says how to resume them."""
        self.draining.set()
        self.replies.wake_all()

    async def stop(self) -> None:
        """Close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.attachments.stop()
        await self.admissions.stop()
        await self.lookup.stop()
        await self.analytics.stop()
        await self.registry.stop()
        await self.producer.stop()
        await self.redis.aclose()
