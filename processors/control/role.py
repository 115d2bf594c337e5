"""The control role: the single writer of the control plane, and the keeper of its projection in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from aiokafka.errors import KafkaError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace import audit_trail
from headrace.audit_chain import Place
from headrace.cancellation import end
from headrace.control_log import end_offsets, replay_control
from headrace.errors import Unavailable
from headrace.limits.limiter import Limiter
from headrace.limits.restore import restore
from headrace.model_facts import keep_facts
from headrace.projection import Applied, CommandOutcome, Outcome, Projection
from headrace.rebuild import rebuild
from headrace.redis_client import connect
from headrace.settings import Settings
from processors.control.audit import described, held, unreadable
from processors.control.decide import Refused, apps_with_publishers, decide, decode_command
from processors.control.state import ControlState, Write
from processors.control.trail import REMEMBERED, Trail
from processors.control.writer import TOPICS, Writer
from schemas.audit import AUDIT
from topics.agents import AgentRole, Message
from topics.apply import ensure
from topics.catalogue import CONTROL_COMMANDS, CONTROL_RECORDS, answers_of
from topics.clients import Producer
from topics.dead_letters import bury

log = structlog.get_logger(__name__)

ROLE = "control"
WATCH_EVERY_S = 1.0
"""How often the projection is compared with what was written."""
MAX_BATCH = 512
"""Commands that are decided in one transaction, whose round trips take as long for many as for one."""
LOGGED = 20
"""Ids of commands that a line of the log names; the audit trail has them all."""
NOT_KEPT = ("replays", "erasures")
"""Kinds whose refused commands are no dead letters: whoever asked was told, and there is nothing to mend."""
_AWAY = (RedisError, OSError, KafkaError, Unavailable)
"""What a part that is away raises; trying again is right."""


class ControlProcessor:
    """Decides commands while it owns their partition; at other times it waits."""

    def __init__(self, settings: Settings, redis: Redis, producer: Producer) -> None:
        self._settings = settings
        self._redis = redis
        self._projection = Projection(redis)
        self._limiter = Limiter(redis)
        self._producer = producer
        self._writer: Writer | None = None
        self._state = ControlState()
        self._trail = Trail(Place())
        self._offsets: dict[str, int] = {}
        """Next offset of each control topic, as the projection should have it."""
        self._answered: set[str] = set()
        """Apps whose topic of answers is there."""
        self._owning = asyncio.Event()
        self._busy = asyncio.Lock()
        """Held while records are written or compared, so that a rebuild never starts between write and apply."""

    async def assigned(self, _: frozenset[int]) -> None:
        """Become the writer: fence the one before, then read what it wrote."""
        async with self._busy:
            await self._release()
            self._writer = Writer(self._settings.kafka, f"{ROLE}-writer-{self._settings.instance}")
            await self._writer.start()
            replay = await replay_control(self._settings, TOPICS)
            self._state = ControlState.of(replay.records)
            self._offsets = {topic.name: replay.offsets[topic.name] for topic in CONTROL_RECORDS.values()}
            self._trail = await self._read_trail()
            self._owning.set()
            log.info("control_owned", **{kind: len(held) for kind, held in replay.records.items()})

    async def _read_trail(self) -> Trail:
        """The audit trail, to be gone on with: its head was written in the transaction of its last event."""
        heads = await audit_trail.heads(self._settings)
        end = Place(heads[-1].seq, heads[-1].hash) if heads else Place()
        newest = await audit_trail.newest(self._settings, REMEMBERED)
        if newest and Place(newest[-1].seq, newest[-1].hash) != end:
            log.error("audit_trail_differs", anchored=end.seq, found=newest[-1].seq)  # `audit verify` says where.
        return Trail(end, newest)

    async def revoked(self, _: frozenset[int]) -> None:
        """Stop writing; another member goes on."""
        self._owning.clear()
        async with self._busy:
            await self._release()

    async def _release(self) -> None:
        self._owning.clear()
        if self._writer is not None:
            await self._writer.stop()
            self._writer = None

    async def handle(self, messages: Sequence[Message]) -> None:
        """Decide a batch of commands, in order; returns when the results are in Kafka and in Redis."""
        while True:
            await self._owning.wait()
            async with self._busy:
                if self._writer is None:
                    continue  # Lost while waiting for the lock.
                await self._decide(self._writer, messages)
                return

    async def _decide(self, writer: Writer, messages: Sequence[Message]) -> None:
        """One transaction for the whole batch. A failure ends the process, so that memory never runs ahead of Kafka."""
        writes: list[Write] = []
        outcomes: list[CommandOutcome] = []
        decided: list[str] = []
        for message in messages:
            made, outcome = await self._one(message)
            writes += made
            if outcome is not None:
                outcomes.append(outcome)
                if any(write.kind in TOPICS for write in made):
                    decided.append(outcome.id)
        if writes:
            writes.append(self._trail.head())
        for app in apps_with_publishers(writes):
            # Before they are in force, so that whoever publishes can listen first.
            await self._ensure_answers(app)
        offsets = await writer.write(writes)
        await self._put_into_force(
            [
                Applied(write.kind, write.key, write.value, TOPICS[write.kind].name, offset)
                for write, offset in zip(writes, offsets, strict=True)
                if write.kind in CONTROL_RECORDS
            ]
        )
        if decided:
            log.info("commands_in_force", commands=decided[:LOGGED], more=max(0, len(decided) - LOGGED))
        await self._tell(outcomes)

    async def _one(self, message: Message) -> tuple[list[Write], CommandOutcome | None]:
        """Decide one command; what is to be written, and what to tell its sender.

        A command that is delivered again, since its reader's progress was lost, is known by its id and not done again.
        """
        at_ms = message.timestamp
        try:
            command = decode_command(message.value)
        except ValueError as error:
            place = f"{message.topic}/{message.partition}/{message.offset}@{at_ms}"
            if self._trail.outcome(place) is not None:
                return [], None
            await bury(self._producer, message, reason=f"not a control command: {error}", role=ROLE)
            return [self._trail.add(unreadable(place, str(error), at_ms=at_ms))], None
        known = self._trail.outcome(command.id)
        if known is not None:
            return [], known
        before, decision = held(self._state, command), decide(self._state, command, now_ms=at_ms)
        event = self._trail.add(described(command, before, decision, at_ms=at_ms))
        outcome = self._trail.outcome(command.id)
        if isinstance(decision, Refused):
            if command.kind not in NOT_KEPT and not decision.code:  # Whoever lost a race asks again.
                await bury(self._producer, message, reason=f"refused: {decision.reason}", role=ROLE)
            return [event], outcome
        for write in decision.writes:
            self._state.put(write)
        return [*decision.writes, event], outcome if command.kind != AUDIT else None

    async def _ensure_answers(self, app: str) -> None:
        if app not in self._answered:
            if await ensure(self._settings, answers_of(app)):
                log.info("answers_topic_made", app=app)
            self._answered.add(app)

    async def _put_into_force(self, records: Sequence[Applied]) -> None:
        """Apply durable records to Redis, for as long as that takes."""
        self._offsets |= {one.topic: one.offset + 1 for one in records}
        while True:
            try:
                if Outcome.INCOMPLETE not in await self._projection.apply_all(records):
                    return
                await rebuild(self._settings, limits=False)
            except _AWAY as error:
                log.warning("redis_unwritable", records=len(records), error=repr(error))
                await asyncio.sleep(WATCH_EVERY_S)

    async def _tell(self, outcomes: Sequence[CommandOutcome]) -> None:
        """Best effort: whoever waits for an answer that is lost sees a timeout, and the log has it."""
        try:
            await self._projection.tell(outcomes)
        except (RedisError, OSError) as error:
            log.warning("outcomes_not_told", commands=[one.id for one in outcomes], error=repr(error))

    async def keep(self) -> None:
        """Compare the projection with Kafka for ever; rebuild it when it is missing, partial or older."""
        while True:
            await self._owning.wait()
            try:
                async with self._busy:
                    if self._owning.is_set() and not await self._is_whole():
                        await rebuild(self._settings, limits=False)
            except _AWAY as error:
                log.warning("projection_unchecked", error=repr(error))
            await asyncio.sleep(WATCH_EVERY_S)

    async def keep_limits(self) -> None:
        """Make what limits hold anew whenever it is not complete; beside the rest, since it takes longer."""
        while True:
            await self._owning.wait()
            try:
                if not (await self._limiter.state()).whole:
                    conf = self._settings
                    await restore(conf.kafka, conf.instance, self._redis, conf.limits_default_output)
            except _AWAY as error:
                log.warning("limits_unchecked", error=repr(error))
            await asyncio.sleep(WATCH_EVERY_S)

    async def _is_whole(self) -> bool:
        """Whether Redis holds all that was written, and nothing that Kafka does not have."""
        state, want = await self._projection.state(), self._offsets
        have = {topic: state.offsets.get(topic, 0) for topic in want}
        whole = state.complete and all(have[topic] >= want[topic] for topic in want)
        if whole and have != want:
            ends = await end_offsets(self._settings)
            whole = all(have[topic] <= ends[topic] for topic in want)
            if whole:  # A rebuild counted the marks that end our transactions.
                self._offsets = have
        if not whole:
            log.warning("projection_differs", complete=state.complete, have=have, want=want)
        return whole

    async def close(self) -> None:
        """Give up the pen."""
        async with self._busy:
            await self._release()


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Run the control role until `stop` is set. Raises what ended it otherwise."""
    redis = connect(settings.redis_url)
    async with Producer(settings.kafka, f"{ROLE}-{settings.instance}") as producer:
        processor = ControlProcessor(settings, redis, producer)
        role = AgentRole(settings, ROLE, CONTROL_COMMANDS, processor.handle, max_batch=MAX_BATCH)
        role.on_partitions(processor.assigned, processor.revoked)
        facts = keep_facts(settings.kafka, f"{ROLE}-facts-{settings.instance}", redis)
        keeping = (processor.keep(), processor.keep_limits(), facts)
        keepers = [asyncio.create_task(kept) for kept in keeping]
        for keeper in keepers:
            keeper.add_done_callback(lambda task: _ended(role, task))
        try:
            await role.run(stop)
        finally:
            await end(*keepers)
            await processor.close()
            await redis.aclose()


def _ended(role: AgentRole, task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        role.fail(error)
