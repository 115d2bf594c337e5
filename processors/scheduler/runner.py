"""One pool's scheduler at work: feeds the policy and carries out its actions, in order, each one durable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import structlog

from headrace import metrics
from headrace.leases import LeaseBook
from headrace.settings import Settings
from processors.scheduler import messages, orphans, policy, wishes
from processors.scheduler.messages import Action, Event
from processors.scheduler.recovery import Recovery
from processors.scheduler.report import pool_status
from processors.scheduler.sent import Sent
from processors.scheduler.sizes import Sizes
from processors.scheduler.state import Limits, Pool, Request
from processors.scheduler.tails import Ended, Tails
from processors.scheduler.terminals import terminal_of
from schemas.control import Model, Provider
from schemas.events import (
    NOTHING,
    CancelCommand,
    Cancellation,
    Command,
    ErrorInfo,
    GenerateCommand,
    LeaseEvent,
    LiveRequest,
    LoadCommand,
    PoolCommand,
    PoolWishes,
    Priority,
    Routed,
    Stage,
    TermCommand,
    UnloadCommand,
    WorkerStatus,
)
from topics.catalogue import LEASES, LIVE, POOL_STATUS, ROUTED, worker_commands
from topics.clients import LogReader, Producer
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)

_lease = msgspec.json.Decoder(LeaseEvent)

ORPHANED_MS = 2_000
"""Past the time-out of workers, leases that nobody shows are taken for lost."""
HTTP_STATUS = {
    "cancelled": 499,
    "model_not_found": 404,
    "service_unavailable": 503,
    "deadline_exceeded": 504,
    "provider_error": 503,
}
"""HTTP status of the codes with which the policy ends a waiting request; 499 is never sent: its caller has left."""


@dataclass(slots=True)
class Held:
    """A live request: its routed record, without the body once it was assigned, and where that record stands."""

    routed: Routed
    offset: int
    sent: Sent | None = None
    """What lost attempts had sent, while the next one waits for its worker. Kafka has it: it is read again if lost."""


class PoolRunner:
    """Owns one pool for one term. Every policy step and the posting of its actions happen under one lock."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        producer: Producer,
        tails: Tails,
        hold: Callable[[], Awaitable[None]],
    ) -> None:
        """`hold` raises `Deposed` when another scheduler may not be kept from deciding any more (`tenure`)."""
        self.name = name
        self.partition = ROUTED.partition_of(name)
        """Of `inference.routed`, and the same number of `scheduler.live`."""
        limits = Limits(int(settings.max_wait * 1000), settings.residency_loads)
        self.state = Pool(term=-1, limits=limits)
        self.held: dict[str, Held] = {}
        self.providers: dict[str, Provider] = {}
        """By name, also those that are gone."""
        self.fail: Callable[[BaseException], None] = lambda error: None
        self.taken = asyncio.Event()
        """Set once the pool is wholly taken."""
        self._cluster = settings.kafka
        self._producer = producer
        self._outcomes = Outcomes(producer, "scheduler", settings.instance)
        self._tails = tails
        self._hold = hold
        self._recovery = Recovery(settings.kafka, producer, self._outcomes, tails, self._provider_of, hold)
        self._declared: dict[str, Model] = {}
        """The models as the registry has them."""
        self._sizes = Sizes()
        self._next_wish = 0
        """Offset in `pool.commands` of the first wish that is not obeyed yet."""
        self._lost: list[messages.Recover] = []
        """What waits for the recovery that runs, if one does."""
        self._recovering = False
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- feeding the policy -----------------------------------------------------------------------------------

    async def feed(self, event: Event) -> None:
        """Step the policy and carry out what it says; returns when that is durable. Raises `KafkaError`."""
        await asyncio.gather(*await self.post(event))

    async def post(self, event: Event) -> list[Awaitable[object]]:
        """Step the policy and post its actions; the awaitables resolve when they are durable."""
        async with self._lock:
            return await self._step(event)

    async def _step(self, event: Event) -> list[Awaitable[object]]:
        await self._hold()
        return await self._carry_out(policy.step(self.state, event, now_ms()))

    async def arrive(self, routed: Routed, offset: int) -> list[Awaitable[object]]:
        """Take a routed request; the awaitables resolve when its place is durable."""
        self.held[routed.request_id] = Held(routed, offset)
        request = waiting_request(routed, now_ms())
        request.attempt = self._tails.view.attempts(request.id)
        request.opened_before = request.attempt > 1
        return await self.post(messages.Arrived(request))

    async def cancel(self, wish: Cancellation) -> None:
        """Take a caller's wish to end a request, which need not have come yet; told if it has."""
        held = self.held.get(wish.request_id)
        if held is not None and held.routed.tenant == wish.tenant:
            running = self.state.running.get(wish.request_id) or self.state.recovering.get(wish.request_id)
            self._outcomes.event(
                wish.request_id, held.routed.tenant, Stage.CANCEL_ASKED, at_ms=wish.at_ms,
                attempt=running.request.attempt if running is not None else 1,
                detail={"by": wish.by, "reason": wish.reason},
            )  # fmt: skip
        await self.feed(messages.CancelAsked(wish.request_id, wish.reason, wish.tenant))

    async def finished(self, ended: Ended) -> bool:
        """The log holds a terminal: drop the request and tombstone its record. False when it is not this pool's."""
        usage = ended.usage
        event = messages.Finished(ended.request_id, usage.prompt_tokens, usage.completion_tokens)
        async with self._lock:  # Actions that are being carried out may need the record.
            if self.held.pop(ended.request_id, None) is None:
                return False
            self.bury_live(ended.request_id)
            waits = await self._step(event)
        await asyncio.gather(*waits)
        return True

    def remember(self, kept: PoolWishes) -> None:
        """Take over what the scheduler before was asked and did not see come true."""
        self._next_wish = kept.next_offset
        wishes.restore(self.state, kept)

    async def obey(self, command: PoolCommand, offset: int, asked_ms: int) -> None:
        """Obey an operator's wish, if it was not obeyed before and is not too old; returns when that is durable.

        That it was taken is durable before anything is done about it: a successor does not obey it again, but goes on
        with what the status says is still to come true.
        """
        async with self._lock:
            if offset < self._next_wish:
                return
            self._next_wish = offset + 1
            if now_ms() - asked_ms > wishes.LIFE_MS:
                log.warning("wish_too_old", pool=self.name, wish=command.id, kind=command.kind, model=command.model)
                return
            log.info(
                "wish", pool=self.name, wish=command.id, kind=command.kind, model=command.model, worker=command.worker,
                actor=command.actor, reason=command.reason,
            )  # fmt: skip
            await self._hold()
            actions = policy.step(self.state, wishes.of(command, asked_ms), now_ms())
            await self.publish_status()
            waits = await self._carry_out(actions)
        await asyncio.gather(*waits)

    def bury_live(self, request_id: str) -> None:
        """Tombstone a request's live record; should a crash lose that, the successor finds the terminal and does it."""
        self._producer.post_later(LIVE.name, None, key=request_id, partition=self.partition)

    def spawn(self, work: Awaitable[None]) -> None:
        """Run something beside the stream; its failure ends the role."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    async def stop(self) -> None:
        """Drop the pool: another scheduler takes it from the topics."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- carrying out its actions -----------------------------------------------------------------------------

    async def _carry_out(self, actions: Iterable[Action]) -> list[Awaitable[object]]:
        waits: list[Awaitable[object]] = []
        for action in actions:
            match action:
                case messages.Assign(request, worker, boot, epoch):
                    waits += await self._assign(request, worker, boot, epoch)
                case messages.Adopt(request, worker, boot, epoch):
                    log.info("attempt_adopted", request_id=request.id, attempt=request.attempt, worker=worker)
                    waits.append(await self._post_live(request, worker=worker, boot=boot, epoch=epoch))
                    self._drop_body(self.held[request.id])
                case messages.ReadLog():
                    self.spawn(self._read_log())
                case messages.Enqueued(request):
                    waits.append(await self._post_live(request))
                    self._outcomes.event(request.id, request.tenant, Stage.QUEUED, attempt=request.attempt)
                case messages.End(request):
                    waits.append(self._end(self.held[request.id], action))
                case messages.CancelRunning(request_id, worker, reason, status, attempt):
                    command = CancelCommand(self.state.term, request_id, reason, status, attempt)
                    waits.append(await self._command(worker, command))
                case messages.Recover():
                    self._lost.append(action)
                case messages.Grant():
                    self.spawn(self._grant(action))
                case messages.Load():
                    waits.append(await self._load(action))
                case messages.Unload(worker, boot, model, epoch):
                    waits.append(await self._command(worker, UnloadCommand(self.state.term, boot, epoch, model)))
                case messages.LeaseMoved():
                    waits.append(await self._lease(action))
                case messages.SendTerm(worker, fence):
                    waits.append(await self._command(worker, TermCommand(self.state.term, self.name, fence)))
        if self._lost and not self._recovering:
            self._recovering = True
            self.spawn(self._recover())
        return waits

    async def _command(self, worker: str, command: Command) -> Awaitable[object]:
        return await self._producer.post(worker_commands(worker).name, msgspec.json.encode(command), partition=0)

    async def _assign(self, request: Request, worker: str, boot: str, epoch: int) -> list[Awaitable[object]]:
        held = self.held[request.id]
        at = now_ms()
        command = GenerateCommand(self.state.term, boot, request.attempt, epoch, at, held.routed)
        if held.sent is not None:
            _go_on_from(command, held.sent)
            held.sent = None
        waits = [
            await self._command(worker, command),
            await self._post_live(request, worker=worker, boot=boot, epoch=epoch),
        ]
        self._drop_body(held)
        metrics.QUEUE_SECONDS.observe((at - request.arrived_ms) / 1000)
        detail: dict[str, str | int | float | bool] = {"worker": worker, "model": request.model}
        self._outcomes.event(
            request.id, request.tenant, Stage.ASSIGNED, at_ms=at, attempt=request.attempt, epoch=epoch, detail=detail
        )
        return waits

    @staticmethod
    def _drop_body(held: Held) -> None:
        if held.routed.body:
            # A later attempt reads the body from `inference.requests`; thousands of running ones are not kept here.
            held.routed = msgspec.structs.replace(held.routed, body=NOTHING)

    async def _post_live(
        self, request: Request, *, worker: str = "", boot: str = "", epoch: int = 0
    ) -> Awaitable[object]:
        held = self.held[request.id]
        live = LiveRequest(
            request_id=request.id,
            tenant=request.tenant,
            pool=self.name,
            model=request.model,
            routed_partition=self.partition,
            routed_offset=held.offset,
            accepted_ms=held.routed.accepted_ms,
            digest=held.routed.digest,
            reply_partition=held.routed.reply_partition,
            attempt=request.attempt,
            worker=worker,
            boot=boot,
            epoch=epoch,
            term=self.state.term,
        )
        return await self._producer.post(LIVE.name, msgspec.json.encode(live), key=request.id, partition=self.partition)

    async def _end(self, held: Held, end: messages.End) -> None:
        status = HTTP_STATUS[end.code]
        error = ErrorInfo(status, end.code, end.message, retry_after_s=end.retry_after_s if status == 503 else None)
        await self._outcomes.end(terminal_of(held.routed, end.request.attempt, end.status, error, sent=held.sent))

    async def _read_log(self) -> None:
        await self._tails.caught_up()
        await self.feed(messages.LogRead())
        log.info("pool_serves", pool=self.name, term=self.state.term)
        self.taken.set()

    async def _grant(self, grant: messages.Grant) -> None:
        await self._hold()
        granted = LeaseEvent(
            f"{grant.worker}:{grant.model}", self.name, self.state.term, grant.worker, grant.model, "granted", now_ms(),
            boot=grant.boot, bytes=grant.bytes, device=grant.device,
        )  # fmt: skip
        key = f"{granted.lease_id}/{granted.term}"
        written = await self._producer.send(LEASES.name, msgspec.json.encode(granted), key=key)
        await self.feed(messages.LeaseGranted(grant.worker, grant.boot, grant.model, written.offset))

    async def _load(self, load: messages.Load) -> Awaitable[object]:
        model = self.state.models[load.model]
        command = LoadCommand(
            self.state.term, load.boot, load.epoch, model, self.providers[model.provider], device=load.device
        )
        return await self._command(load.worker, command)

    async def _lease(self, moved: messages.LeaseMoved) -> Awaitable[object]:
        event = LeaseEvent(
            f"{moved.worker}:{moved.model}", self.name, self.state.term, moved.worker, moved.model, moved.state,
            now_ms(), epoch=moved.epoch, boot=moved.boot, bytes=moved.bytes, reason=moved.reason, device=moved.device,
        )  # fmt: skip
        return await self._producer.post(LEASES.name, msgspec.json.encode(event), key=f"{event.lease_id}/{event.term}")

    async def end_orphans(self, seen_ms: Mapping[tuple[str, str], int]) -> None:
        """Once every worker that lives must have been heard, end the leases of workers that went before that.

        `seen_ms`: (worker, boot) -> Unix ms of its last heartbeat.
        """
        await asyncio.sleep((policy.WORKER_TIMEOUT_MS + ORPHANED_MS) / 1000)
        async with LogReader(self._cluster, "scheduler-orphans") as reader:
            book = await read_leases(reader)
        for event in orphans.ends(book, self.name, self.state, seen_ms):
            log.info("lease_orphaned", pool=self.name, worker=event.worker, model=event.model, epoch=event.epoch)
            key = f"{event.lease_id}/{event.term}"
            await self._producer.send(LEASES.name, msgspec.json.encode(event), key=key)

    async def _recover(self) -> None:
        """Settle what is lost, and what is lost meanwhile, all of it at a time: reading costs the same for many."""
        while self._lost:
            lost, self._lost = self._lost, []
            # One whose terminal was read meanwhile is no longer held, and needs nothing.
            pairs = [
                (action, held.routed)
                for action in lost
                if (held := self.held.get(action.running.request.id)) is not None
            ]
            for again in await self._recovery.settle(pairs):
                if (held := self.held.get(again.request_id)) is not None:
                    held.sent = again.sent
                    await self.feed(messages.AttemptReady(again.request_id, again.attempt, begun=not again.sent.empty))
        self._recovering = False

    def _provider_of(self, model_id: str) -> Provider | None:
        model = self.state.models.get(model_id)
        return self.providers.get(model.provider) if model is not None else None

    # --- telling others ---------------------------------------------------------------------------------------

    async def follow(self, models: dict[str, Model], providers: dict[str, Provider], weights: dict[str, float]) -> None:
        """Follow the registry. A model whose provider is gone is gone too."""
        self._declared = {id: model for id, model in models.items() if model.provider in providers}
        self.providers |= providers  # Commands for leases that there still are name the old ones.
        await self.feed(messages.WeightsChanged(weights))
        await self.feed(messages.ModelsChanged(self._sizes.applied(self._declared)))

    async def heard(self, status: WorkerStatus) -> None:
        """Follow a worker; the sizes of its models come first, since memory is planned by them."""
        if self._sizes.learn(status):
            await self.feed(messages.ModelsChanged(self._sizes.applied(self._declared)))
        await self.feed(messages.WorkerSeen(status))

    async def publish_status(self) -> None:
        """Tell the ingresses how the pool stands."""
        status = pool_status(self.state, self.name, now_ms(), self._next_wish)
        metrics.POOL_QUEUED.labels(pool=self.name).set(status.queued)
        metrics.POOL_RUNNING.labels(pool=self.name).set(status.running)
        metrics.WORKERS.labels(pool=self.name).set(len(status.workers))
        await self._producer.send(POOL_STATUS.name, msgspec.json.encode(status), key=self.name)


async def read_leases(reader: LogReader) -> LeaseBook:
    """All leases that Kafka knows of."""
    book = LeaseBook()
    assignment = reader.assign([LEASES])
    await reader.consumer.seek_to_beginning(*assignment)
    async for record in reader.read_to_end(assignment):
        if record.value is not None:
            book.take(_lease.decode(record.value), record.offset)
    return book


def waiting_request(routed: Routed, at_ms: int) -> Request:
    """A routed request as the policy keeps it while it waits."""
    return Request(
        routed.request_id, routed.tenant, routed.model, at_ms, routed.deadline_ms,
        priority=Priority[routed.priority.upper()], prompt_tokens=routed.prompt_tokens_estimate,
        start_by_ms=routed.start_by_ms,
    )  # fmt: skip


def _go_on_from(command: GenerateCommand, sent: Sent) -> None:
    """Let an attempt begin where lost ones had come to."""
    command.emitted, command.tokens = sent.answer.content(), sent.tokens
    command.after_seq, command.first_token_ms = sent.last_seq, sent.first_ms
