"""The scheduler's agent: reads `inference.routed`, owns the pools of its partitions, and follows what workers do."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace import metrics
from headrace.attached import followed
from headrace.errors import Unavailable
from headrace.redis_client import connect
from headrace.registry import Registry
from headrace.settings import Settings
from processors.scheduler import messages, policy, wishes
from processors.scheduler.abandoned import ABANDONED, Ingresses
from processors.scheduler.revoked import REVOKED, is_revoked, name_of
from processors.scheduler.runner import Held, PoolRunner
from processors.scheduler.state import Running, Stray, Taking
from processors.scheduler.tails import Ended, Tails
from processors.scheduler.takeover import (
    GIVEN_MS,
    forgotten,
    oldest_live_ms,
    read_given,
    read_live,
    read_routed,
    read_status,
    restored,
    take_term,
)
from processors.scheduler.tenure import Deposed, Tenure, newest_terms
from schemas.events import Cancellation, PoolCommand, Routed, Stage, WorkerStatus
from schemas.ids import is_idempotent
from topics import frames
from topics.agents import AgentRole, Message
from topics.catalogue import ROUTED, frames_at
from topics.clients import LogReader, Producer
from topics.dead_letters import bury
from topics.outcomes import Outcomes, now_ms
from topics.record import Record

log = structlog.get_logger(__name__)

MAX_AGE_MS = 600_000
"""The log is followed from this long ago, or from the oldest live request: no older one is assigned any more."""
REMEMBER_MS = 900_000
REMEMBER_IDEMPOTENT_MS = 86_400_000
"""How long finished ids are kept to tell duplicates: idempotent ones may be sent again for a day."""
TICK_S = 0.25
NOT_YET_MS = 2**62
"""A pool is still being taken: no time runs against the workers of what it restores."""
STATUS_EVERY_S = 1.0
REVOKED_EVERY_S = 0.5
"""How often the keys of all that is held are asked for, when no change is announced."""
ABANDONED_EVERY_S = 2.0

_routed = msgspec.json.Decoder(Routed)


class _Asked(NamedTuple):
    """An operator's wish, its offset in `pool.commands`, and when the brokers took it (Unix ms)."""

    command: PoolCommand
    offset: int
    at_ms: int


class Scheduler:
    """All pools that this process owns."""

    def __init__(self, settings: Settings, producer: Producer, registry: Registry, redis: Redis) -> None:
        self._settings = settings
        self._redis = redis
        self._producer = producer
        self._registry = registry
        self._outcomes = Outcomes(producer, "scheduler", settings.instance)
        self._pools: dict[str, PoolRunner] = {}
        self._owned: set[int] = set()
        self._finished: dict[str, int] = {}
        self._taking = asyncio.Lock()
        self._listens = asyncio.Event()
        """Set once it is known where the tails begin: no pool is taken before."""
        self._terms: dict[str, int] = {}
        """Newest term of each pool, as far as it was read."""
        self.tenure = Tenure(partial(newest_terms, settings.kafka), self._own_terms, now_ms)
        self._seen_version = -1
        self._began_ms = now_ms()
        self._ended: set[str] = set()
        """Requests that were cancelled because nobody may, or will, have them."""
        self._ingresses = Ingresses()
        self.tails = Tails(
            settings.kafka,
            on_terminal=self._on_terminal,
            on_opened=self._on_opened,
            on_cancellation=self._on_cancellation,
            on_heartbeat=self._on_heartbeat,
            on_ingress=self._ingresses.heard,
            on_unreadable=self._on_unreadable,
            on_term=self._on_term,
            on_wish=self._on_wish,
        )
        self._wishes: deque[_Asked] = deque()
        """Wishes that are not too old, to whichever pool: it may be taken after they were read."""
        self._cancellations: deque[Cancellation] = deque()
        """What callers left that is not too old: who takes a pool must know of those that came before."""
        self._heartbeats: dict[str, WorkerStatus] = {}
        self._seen_ms: dict[tuple[str, str], int] = {}
        """(worker, boot) -> when it last reported."""
        self.agent = AgentRole(settings, "scheduler", ROUTED, self.handle)
        self.agent.on_partitions(self._gain, self._lose)

    # --- the stream -------------------------------------------------------------------------------------------

    async def handle(self, batch: list[Message]) -> None:
        """Take a batch of routed requests; returns when each has its place, durably."""
        waits: list[Awaitable[object]] = []
        for message in batch:
            try:
                routed = _routed.decode(message.value or b"")
            except msgspec.MsgspecError as error:
                waits.append(bury(self._producer, message, reason=str(error), role="scheduler"))
                continue
            if (runner := await self._take(routed.pool)) is None:
                raise RuntimeError(f"a rebalance took pool {routed.pool} while it was being taken")
            if routed.request_id in runner.held or routed.request_id in self._finished:
                await self._duplicate(runner, routed)
            else:
                waits += await runner.arrive(routed, message.offset)
        await asyncio.gather(*waits)

    async def _duplicate(self, runner: PoolRunner, routed: Routed) -> None:
        """The same request again: counted, never ended by us; its caller is sent to the first one's stream or end."""
        metrics.DUPLICATES.inc()
        held = runner.held.get(routed.request_id)
        self._outcomes.event(routed.request_id, routed.tenant, Stage.DUPLICATE, detail={"live": held is not None})
        if held is None:
            ended_ms = self._finished.get(routed.request_id, now_ms())
            moved = frames.Moved(None, ended_ms - MAX_AGE_MS)  # We may have heard of its end long after.
        elif held.routed.reply_partition != routed.reply_partition:
            moved = frames.Moved(held.routed.reply_partition, held.routed.accepted_ms)
        else:
            return
        delta = frames.Delta(
            bytes.fromhex(routed.request_id), 0, 0, frames.Kind.MOVED, 0, msgspec.json.encode(moved).decode()
        )
        topic, partition = frames_at(routed.reply_partition)
        await self._producer.send(topic.name, frames.encode([delta]), partition=partition)

    # --- owning pools -----------------------------------------------------------------------------------------

    async def _gain(self, partitions: frozenset[int]) -> None:
        self._owned |= partitions
        # Not awaited: a rebalance must not wait for a pool to be read. Records that arrive first take it themselves.
        task = asyncio.create_task(self._take_known())
        task.add_done_callback(self._watch)

    def _watch(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.agent.fail(error)

    async def _take_known(self) -> None:
        for pool in await self._known_pools():
            if ROUTED.partition_of(pool) in self._owned and pool not in self._pools:
                await self._take(pool)

    async def _lose(self, partitions: frozenset[int]) -> None:
        self._owned -= partitions
        for name in [name for name, runner in self._pools.items() if runner.partition in partitions]:
            await self._leave(name)

    async def _known_pools(self) -> set[str]:
        await self._registry.wait_complete(timeout=60)
        return {model.pool for model in self._registry.snapshot.models.values()} | {self._settings.pool}

    def _own_terms(self) -> dict[str, int]:
        return {name: runner.state.term for name, runner in self._pools.items()}

    async def _take(self, name: str) -> PoolRunner | None:
        """The pool's runner, once it knows what lives; None when a rebalance took it meanwhile. Raises `Deposed`."""
        if not self._taking.locked() and name in self._pools:
            return self._pools[name]
        async with self._taking:
            if (runner := self._pools.get(name)) is None:
                runner = await self._take_now(name)
            return runner

    async def _take_now(self, name: str) -> PoolRunner | None:
        await self._listens.wait()
        if ROUTED.partition_of(name) not in self._owned:
            return None
        runner = PoolRunner(self._settings, name, self._producer, self.tails, self.tenure.hold)
        runner.fail = self.agent.fail
        runner.state.taking = Taking.WAITING
        async with LogReader(self._settings.kafka, "scheduler-takeover") as reader:
            asked_ms = now_ms()
            runner.state.term = await take_term(self._producer, name, self._settings.instance)
            self.tenure.sure(asked_ms)
            runner.state.taken_ms = NOT_YET_MS
            # Which workers there are, what was opened and what ended is known before a request is taken up.
            await self.tails.caught_up()
            live = await read_live(reader, [runner.partition])
            # What was assigned comes first: workers may be heard from while what waits is read.
            mine = sorted(
                (request for request in live.requests if request.pool == name), key=lambda one: one.worker == ""
            )
            routed = await read_routed(reader, mine)
            kept, alive_ms = await read_status(reader, name, now_ms())
            runner.remember(kept)
            runner.state.given = await self._given(reader, name, alive_ms or now_ms() - MAX_AGE_MS)
        self._finished |= live.finished
        await self._follow_models(runner)
        self._pools[name] = runner
        for request in mine:
            if self.tails.view.decided(request.request_id):
                runner.bury_live(request.request_id)
                continue
            if (record := routed.get(request.request_id)) is None:
                log.error("routed_record_gone", request_id=request.request_id, offset=request.routed_offset)
                await self._outcomes.end(forgotten(request))
                runner.bury_live(request.request_id)
                continue
            await self._restore(runner, request.worker != "", record, request.routed_offset, restored(request, record))
        for wish in list(self._cancellations):
            if wish.request_id not in self._finished:
                await runner.cancel(wish)
        if self._pools.get(name) is not runner or runner.partition not in self._owned:
            self._pools.pop(name, None)
            await runner.stop()
            return None
        if self._terms[name] > runner.state.term:
            raise Deposed(name, self._terms[name])
        for status in list(self._heartbeats.values()):
            if status.pool == name and (status.left or now_ms() - status.at_ms < policy.WORKER_TIMEOUT_MS):
                await runner.heard(status)
        # From here on a worker that was not heard is missed.
        runner.state.taken_ms = now_ms()
        await runner.feed(messages.Heard())
        runner.spawn(self._then_obey(runner))
        runner.spawn(runner.end_orphans(self._seen_ms))
        log.info("pool_taken", pool=name, term=runner.state.term, live=len(mine))
        return runner

    async def _given(self, reader: LogReader, pool: str, alive_ms: int) -> dict[tuple[str, int], Stray]:
        """To whom the scheduler so far, which was last alive at `alive_ms`, gave what of late."""
        since_ms = alive_ms - GIVEN_MS
        workers = [one.worker for one in self._heartbeats.values() if one.pool == pool and one.at_ms >= since_ms]
        return await read_given(reader, workers, since_ms)

    async def _then_obey(self, runner: PoolRunner) -> None:
        await runner.taken.wait()
        await self._obey_wishes(runner)

    async def _leave(self, name: str) -> None:
        await self._pools.pop(name).stop()
        log.info("pool_left", pool=name)

    async def _restore(self, runner: PoolRunner, assigned: bool, routed: Routed, offset: int, running: Running) -> None:
        if assigned:
            runner.held[routed.request_id] = Held(routed, offset)
            await runner.feed(messages.Restored(running))
            opened = self.tails.view.attempts(routed.request_id)
            await runner.feed(messages.Superseded(routed.request_id, opened))
        else:
            await asyncio.gather(*await runner.arrive(routed, offset))

    async def listen(self) -> None:
        """Find where to begin, then hear what others say, for ever. The group is joined meanwhile."""
        oldest, now = await oldest_live_ms(self._settings.kafka), now_ms()
        await self.tails.start(min(now - MAX_AGE_MS, oldest or now), wishes_since_ms=now - wishes.LIFE_MS)
        self._listens.set()
        await self.tails.run()

    # --- what others say --------------------------------------------------------------------------------------

    async def _on_terminal(self, ended: Ended) -> None:
        self._finished[ended.request_id] = now_ms()
        for runner in list(self._pools.values()):
            if await runner.finished(ended):
                return

    async def _on_opened(self, request_id: str, attempt: int) -> None:
        for runner in list(self._pools.values()):
            if request_id in runner.held:
                await runner.feed(messages.Superseded(request_id, attempt))

    async def _on_cancellation(self, wish: Cancellation) -> None:
        if wish.request_id in self._finished or now_ms() - wish.at_ms > MAX_AGE_MS:
            return
        self._cancellations.append(wish)
        for runner in list(self._pools.values()):
            await runner.cancel(wish)

    async def _on_heartbeat(self, status: WorkerStatus) -> None:
        self._heartbeats[status.worker] = status
        self._seen_ms[status.worker, status.boot] = status.at_ms
        runner = self._pools.get(status.pool)
        if runner is None or runner.state.taking is Taking.WAITING:
            return  # it hears all of them once it knows what lives
        if status.left or now_ms() - status.at_ms < policy.WORKER_TIMEOUT_MS:
            await runner.heard(status)

    async def _on_unreadable(self, record: Record, reason: str) -> None:
        """Keep a message of a topic that only schedulers read: one of them does, and not again when it starts anew."""
        if record.timestamp >= self._began_ms and record.partition % ROUTED.partitions in self._owned:
            await bury(self._producer, record, reason=reason, role="scheduler")

    async def _on_term(self, pool: str, term: int) -> None:
        self._terms[pool] = term
        runner = self._pools.get(pool)
        if runner is not None and term > runner.state.term:
            raise Deposed(pool, term)

    async def _on_wish(self, command: PoolCommand, offset: int, at_ms: int) -> None:
        self._wishes.append(_Asked(command, offset, at_ms))
        while now_ms() - self._wishes[0].at_ms > wishes.LIFE_MS and len(self._wishes) > 1:
            self._wishes.popleft()
        runner = self._pools.get(command.pool)
        if runner is not None and runner.taken.is_set():
            await self._obey_wishes(runner)

    async def _obey_wishes(self, runner: PoolRunner) -> None:
        """Have a pool obey all wishes that it has not yet, in their order."""
        for asked in [asked for asked in self._wishes if asked.command.pool == runner.name]:
            await runner.obey(*asked)

    # --- time -------------------------------------------------------------------------------------------------

    async def _follow_models(self, runner: PoolRunner) -> None:
        with contextlib.suppress(Unavailable):
            snapshot = self._registry.snapshot
            models = {m.id: m for m in snapshot.models.values() if m.enabled and m.pool == runner.name}
            weights = {app.id: app.weight for app in snapshot.apps.values() if app.weight != 1.0}
            await runner.follow(models, dict(snapshot.providers), weights)

    async def tick(self) -> None:
        """Move time on, follow the registry and publish how the pools stand, for ever."""
        published = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK_S)
            for runner in list(self._pools.values()):
                await runner.feed(messages.Tick())
            with contextlib.suppress(Unavailable):
                if (version := self._registry.snapshot.version) != self._seen_version:
                    await self._registry_changed()
                    self._seen_version = version
            if loop.time() - published >= STATUS_EVERY_S:
                published, asked_ms = loop.time(), now_ms()
                for runner in list(self._pools.values()):
                    await runner.publish_status()
                    self.tenure.sure(asked_ms)
                self._forget()

    async def _registry_changed(self) -> None:
        for runner in list(self._pools.values()):
            await self._follow_models(runner)
        await self._take_known()

    async def end_revoked(self) -> None:
        """Watch for ever who asked for what is held, and end what nobody may have any more."""
        version = 0
        while True:
            version = await self._registry.moved(version, REVOKED_EVERY_S)
            await self._end_revoked()

    async def _end_revoked(self) -> None:
        """Cancel what is left of keys, users and apps that were revoked, whether its callers wait for it or not."""
        held = self._held()
        names = sorted({name_of(routed) for routed in held.values()})
        try:
            found = dict(zip(names, await self._registry.callers(names), strict=True))
            apps = self._registry.snapshot.apps
            gone = [routed for routed in held.values() if is_revoked(routed, found, apps)]
            if gone:  # What we know of apps and their publishers may be older than the request of a new one.
                apps = (await self._registry.confirmed()).apps
                gone = [routed for routed in gone if is_revoked(routed, found, apps)]
        except Unavailable:
            return  # What runs goes on while nobody can tell.
        await self._end(gone, REVOKED)

    async def end_abandoned(self) -> None:
        """Watch for ever whose ingress is gone, and end what nobody has come back for."""
        while True:
            await asyncio.sleep(ABANDONED_EVERY_S)
            gone = self._ingresses.abandoned(self._held().values(), now_ms())
            try:
                kept = await followed(self._redis, [routed.request_id for routed in gone]) if gone else set()
            except (RedisError, OSError) as error:
                log.warning("followers_unknown", requests=len(gone), error=repr(error))
                continue  # Rather a generation too long than one cut off under a caller that is still there.
            await self._end([routed for routed in gone if routed.request_id not in kept], ABANDONED)

    def _held(self) -> dict[str, Routed]:
        """All requests that have no end yet, and were not ended from here."""
        held = {id_: one.routed for runner in self._pools.values() for id_, one in runner.held.items()}
        self._ended &= held.keys()
        return {id_: routed for id_, routed in held.items() if id_ not in self._ended}

    async def _end(self, gone: Sequence[Routed], reason: str) -> None:
        self._ended |= {routed.request_id for routed in gone}
        wishes = [Cancellation(r.request_id, r.tenant, reason, now_ms(), by=self._settings.instance) for r in gone]
        await asyncio.gather(*(self._on_cancellation(wish) for wish in wishes))

    def _forget(self) -> None:
        now = now_ms()
        while self._cancellations and now - self._cancellations[0].at_ms > MAX_AGE_MS:
            self._cancellations.popleft()
        for request_id, at in list(self._finished.items()):
            if now - at > (REMEMBER_IDEMPOTENT_MS if is_idempotent(request_id) else REMEMBER_MS):
                del self._finished[request_id]
                self.tails.view.forget(request_id)
            elif not is_idempotent(request_id):
                # Insertion order is time order: what follows is younger.
                break


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life."""
    client = connect(settings.redis_url)
    registry = Registry(client)
    async with Producer(settings.kafka, settings.instance) as producer:
        await registry.start()
        scheduler = Scheduler(settings, producer, registry, client)
        work = scheduler.listen(), scheduler.tick(), scheduler.end_revoked(), scheduler.end_abandoned()
        beside = [asyncio.create_task(one) for one in work]
        for task in beside:
            task.add_done_callback(lambda done: None if done.cancelled() else scheduler.agent.fail(_error(done)))
        try:
            await scheduler.agent.run(stop)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await scheduler.tails.stop()
            await registry.stop()
            await client.aclose()


def _error(task: asyncio.Task[None]) -> BaseException:
    return task.exception() or RuntimeError("a background task ended")
