"""How the machines stand: pools, workers and leases, folded from Kafka, and what people are shown of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Literal

import msgspec
import structlog

from headrace.errors import Unavailable
from headrace.leases import LeaseBook
from headrace.model_facts import newest, warnings
from headrace.pools import STALE_S
from headrace.settings import Settings
from schemas.admin import DeviceView, FactsView, LeaseView, ModelView, PriceView, ResidentView, WorkerView
from schemas.control import API, Model
from schemas.events import LeaseEvent, ModelCard, ModelState, PoolStatus, WorkerStatus
from topics.catalogue import LEASES, POOL_STATUS, WORKER_STATUS
from topics.clients import LogReader
from topics.cluster import Cluster

log = structlog.get_logger(__name__)

STALE_MS = int(STALE_S * 1000)
"""A pool whose scheduler was not heard for this long is unknown."""
SILENT_MS = 3_000
"""A worker that was not heard for this long is lost, as its scheduler sees it too."""
FORGET_MS = 3_600_000
"""A worker that was not heard for this long is shown no more."""
_POOL_SINCE_MS = 60_000

_pool = msgspec.json.Decoder(PoolStatus)
_worker = msgspec.json.Decoder(WorkerStatus)
_lease = msgspec.json.Decoder(LeaseEvent)


class Fleet:
    """The newest word on every pool, worker and lease."""

    def __init__(self) -> None:
        self.pools: dict[str, PoolStatus] = {}
        self.workers: dict[str, WorkerStatus] = {}
        self.leases = LeaseBook()

    def take(self, topic: str, value: bytes | None, offset: int) -> None:
        """Take in a record of one of the three topics, in the order of offsets. Raises `msgspec.MsgspecError`."""
        if value is None:
            return
        if topic == POOL_STATUS.name:
            status = _pool.decode(value)
            known = self.pools.get(status.pool)
            if known is None or status.term >= known.term:
                self.pools[status.pool] = status
        elif topic == WORKER_STATUS.name:
            heard = _worker.decode(value)
            known_worker = self.workers.get(heard.worker)
            if not heard.left:
                self.workers[heard.worker] = heard
            elif known_worker is not None and known_worker.boot == heard.boot:
                del self.workers[heard.worker]
        else:
            self.leases.take(_lease.decode(value), offset)

    def pool(self, name: str, now_ms: int) -> PoolStatus | None:
        """A pool's status; None when its scheduler is not heard."""
        status = self.pools.get(name)
        return status if status is not None and now_ms - status.at_ms <= STALE_MS else None

    # --- what people are shown ------------------------------------------------------------------------------------

    def model_views(self, models: Iterable[Model], now_ms: int, cards: Iterable[ModelCard] = ()) -> list[ModelView]:
        """The models as they are configured and stand, and as their cards say, by id."""
        models = list(models)
        facts = newest(cards, {model.id: model for model in models})
        leases = self.lease_views()
        states = {
            (name, state.id): state
            for name in self.pools
            if (status := self.pool(name, now_ms)) is not None
            for state in status.models
        }
        return [
            self._model_view(model, states.get((model.pool, model.id)), facts.get(model.id), leases, now_ms)
            for model in sorted(models, key=lambda model: model.id)
        ]

    def _model_view(
        self, model: Model, state: ModelState | None, card: ModelCard | None, leases: list[LeaseView], now_ms: int
    ) -> ModelView:
        status = self.pool(model.pool, now_ms)
        price = model.price_at(now_ms)
        return ModelView(
            id=model.id,
            aliases=list(model.aliases),
            provider=model.provider,
            backend_tag=model.backend_tag,
            pool=model.pool,
            enabled=model.enabled,
            capabilities=list(model.capabilities),
            fallbacks=list(model.fallbacks),
            preload=model.preload,
            pinned=model.pinned,
            keep_alive_ms=model.keep_alive_ms,
            context_length=model.context_length,
            max_concurrency=model.max_concurrency,
            bytes=model.bytes,
            load_ms=model.load_ms,
            origin="api" if model.origin == API else "file",
            default_max_tokens=model.default_max_tokens,
            rate_limit_rpm=model.rate_limit_rpm,
            rate_limit_tpm=model.rate_limit_tpm,
            concurrency_limit=model.concurrency_limit,
            adapters=model.adapters,
            price=PriceView(
                input=str(price.input), output=str(price.output), cached=str(price.cached),
                currency=price.currency, version=price.version,
            ),
            state=state.state if state is not None else "unloaded" if not model.enabled else "unknown",
            error=(status.broken_models | status.failed_models).get(model.id) if status is not None else None,
            asked=_asked(status, model.id),
            queued=state.queued if state is not None else 0,
            running=state.running if state is not None else 0,
            estimated_wait_ms=status.waits_ms.get(model.id) if status is not None else None,
            last_used_ms=(state.used_ms or None) if state is not None else None,
            progress=self._progress(model.id),
            facts=facts_view(card) if card is not None else None,
            warnings=warnings(model, card),
            leases=[lease for lease in leases if lease.model == model.id],
        )  # fmt: skip

    def _progress(self, model: str) -> str | None:
        told = (held.progress for worker in self.workers.values() for held in worker.resident if held.model == model)
        return next((progress for progress in told if progress), None)

    def worker_views(self, now_ms: int) -> list[WorkerView]:
        """The workers that were heard within an hour, by id."""
        held: dict[tuple[str, str], int] = {}
        for lease in self.leases.held():
            place = (lease.worker, lease.device)
            held[place] = held.get(place, 0) + lease.bytes
        return [
            _worker_view(status, held, now_ms)
            for _, status in sorted(self.workers.items())
            if now_ms - status.at_ms <= FORGET_MS
        ]

    def lease_views(self) -> list[LeaseView]:
        """The leases that have not ended, by worker and model."""
        views = [
            LeaseView(
                pool=lease.pool, worker=lease.worker, model=lease.model, device=lease.device, state=lease.state,
                bytes=lease.bytes, epoch=lease.epoch, since_ms=lease.at_ms, reason=lease.reason,
            )
            for lease in self.leases.held()
        ]  # fmt: skip
        return sorted(views, key=lambda lease: (lease.worker, lease.model, lease.epoch))


def facts_view(card: ModelCard) -> FactsView:
    """A card as people are shown it."""
    fields = msgspec.structs.asdict(card)
    return FactsView(told_ms=card.at_ms, **{name: fields[name] for name in FactsView.model_fields if name in fields})


def _asked(status: PoolStatus | None, model: str) -> Literal["load", "unload"] | None:
    if status is None:
        return None
    return "load" if model in status.wishes.load else "unload" if model in status.wishes.unloaded else None


def _worker_view(status: WorkerStatus, held: Mapping[tuple[str, str], int], now_ms: int) -> WorkerView:
    age = max(0, now_ms - status.at_ms)
    return WorkerView(
        id=status.worker,
        pool=status.pool,
        status="silent" if age > SILENT_MS else "stopping" if status.stopping else "ready",
        boot=status.boot,
        heard_ms=status.at_ms,
        age_ms=age,
        providers=list(status.providers),
        broken=dict(status.broken),
        devices=[
            DeviceView(
                id=device.id, bytes=device.bytes, held_bytes=held.get((status.worker, device.id), 0),
                utilisation=status.utilisation.get(device.id),
            )
            for device in status.devices
        ],
        residents=[
            ResidentView(
                model=held.model, state=held.state, device=held.device, epoch=held.epoch, bytes=held.bytes,
                error=held.error or None, progress=held.progress or None,
            )
            for held in sorted(status.resident, key=lambda one: one.model)
        ],
        running=len(status.running),
    )  # fmt: skip


class FleetReader:
    """Follows the three topics; `fleet` is there once they have been read to their ends."""

    def __init__(self, cluster: Cluster, client_id: str) -> None:
        self._reader = LogReader(cluster, f"{client_id}-fleet", max_wait_ms=1000)
        self._fleet = Fleet()
        self._whole = False

    @property
    def fleet(self) -> Fleet:
        """The fleet as it stands. Raises `Unavailable` before it is whole."""
        if not self._whole:
            raise Unavailable("What pools and workers say has not been read yet. Try again in a moment.")
        return self._fleet

    async def start(self) -> None:
        """Read what there is. Raises `KafkaError`."""
        await self._reader.start()
        assignment = self._reader.assign([LEASES, WORKER_STATUS, POOL_STATUS])
        recent = [tp for tp in assignment if tp.topic == POOL_STATUS.name]
        await self._reader.seek_to_time(recent, time.time_ns() // 1_000_000 - _POOL_SINCE_MS)
        await self._reader.consumer.seek_to_beginning(*(tp for tp in assignment if tp not in recent))
        async for record in self._reader.read_to_end(assignment):
            self._take(record.topic, record.value, record.offset)
        self._whole = True

    async def follow(self) -> None:
        """Read on for ever."""
        while True:
            for records in (await self._reader.consumer.getmany(timeout_ms=5000)).values():
                for record in records:
                    self._take(record.topic, record.value, record.offset)

    async def run(self) -> None:
        """Read what there is, then on for ever."""
        try:
            await self.start()
            await self.follow()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Close."""
        await self._reader.stop()

    def _take(self, topic: str, value: bytes | None, offset: int) -> None:
        try:
            self._fleet.take(topic, value, offset)
        except msgspec.MsgspecError as error:
            log.error("unreadable", topic=topic, offset=offset, error=str(error))


@contextlib.asynccontextmanager
async def followed(settings: Settings) -> AsyncIterator[Fleet]:
    """The fleet for the length of a `with`, read to its end and kept up to date. Raises `KafkaError`."""
    reader = FleetReader(settings.kafka, settings.instance)
    try:
        await reader.start()
        task = asyncio.create_task(reader.follow())
        try:
            yield reader.fleet
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    finally:
        await reader.stop()
