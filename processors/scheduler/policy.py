"""The scheduling policy: `step(pool, event, now) -> actions`. Pure: no I/O, no clock, no randomness.

This first policy keeps a queue a model, first come first served, serves every model that fits the workers' providers,
and gives a request to the worker with the most free slots. The interface is what grows: events in, actions out.
"""

from __future__ import annotations

from typing import assert_never

from processors.scheduler.messages import (
    Action,
    Arrived,
    Assign,
    AttemptEmpty,
    CancelAsked,
    CancelRunning,
    End,
    Enqueued,
    Event,
    Finished,
    Grant,
    LeaseGranted,
    LeaseMoved,
    Load,
    ModelsChanged,
    Recover,
    Restored,
    SendTerm,
    Tick,
    Unload,
    WorkerSeen,
)
from processors.scheduler.state import Lease, Pool, Request, Running, Worker
from schemas.control import Model
from schemas.events import Status, WorkerStatus

WORKER_TIMEOUT_MS = 6_000
"""A worker without a heartbeat for this long is lost."""
EARLY_CANCEL_MS = 900_000
"""How long a cancellation that found no request is remembered."""
RELOAD_AFTER_MS = 5_000
"""A model whose load failed is tried again after this long."""
MAX_QUEUE = 10_000
"""Requests that may wait for one model; more are shed."""
MAX_ATTEMPTS = 3
"""Workers that may die under one request before it fails."""


def step(pool: Pool, event: Event, now_ms: int) -> list[Action]:
    """Apply one event to the pool, which is changed in place, and return what must be done, in order."""
    match event:
        case Arrived(request):
            return _arrived(pool, request, now_ms)
        case Restored(running):
            pool.running[running.request.id] = running
            return []
        case CancelAsked(request_id, reason):
            return _cancel(pool, request_id, reason, now_ms)
        case Finished(request_id):
            return _finished(pool, request_id, now_ms)
        case AttemptEmpty(request_id, attempt):
            return _requeue(pool, request_id, attempt, now_ms)
        case WorkerSeen(status):
            return _worker_seen(pool, status, now_ms)
        case LeaseGranted(worker, model, epoch):
            return _granted(pool, worker, model, epoch)
        case ModelsChanged(models):
            pool.models = models
            return _serve(pool, now_ms)
        case Tick():
            return _tick(pool, now_ms)
    assert_never(event)


def _arrived(pool: Pool, request: Request, now_ms: int) -> list[Action]:
    early = pool.early_cancels.pop(request.id, None)
    if early is not None:
        return [End(request, Status.CANCELLED, "cancelled", early[1])]
    if now_ms > request.deadline_ms:
        return [End(request, Status.EXPIRED, "deadline_exceeded", "The deadline passed before it could be queued.")]
    if request.model not in pool.models:
        return [End(request, Status.REJECTED, "model_not_found", f"The model {request.model!r} was removed.")]
    queue = pool.queue(request.model)
    if len(queue) >= MAX_QUEUE:
        return [End(request, Status.REJECTED, "service_unavailable", "Too many requests wait for this model.")]
    queue[request.id] = request
    actions = _dispatch(pool, request.model, now_ms)
    if request.id in queue:
        actions.append(Enqueued(request))
    return actions


def _cancel(pool: Pool, request_id: str, reason: str, now_ms: int) -> list[Action]:
    for queue in pool.queues.values():
        if (request := queue.pop(request_id, None)) is not None:
            return [End(request, Status.CANCELLED, "cancelled", reason)]
    running = pool.running.get(request_id) or pool.recovering.get(request_id)
    if running is None:
        pool.early_cancels[request_id] = (now_ms, reason)
        return []
    return _cancel_running(running, reason, Status.CANCELLED)


def _cancel_running(running: Running, reason: str, status: Status) -> list[Action]:
    if running.cancel_asked:
        return []
    running.cancel_asked = True
    return [CancelRunning(running.request.id, running.worker, reason, status)]


def _finished(pool: Pool, request_id: str, now_ms: int) -> list[Action]:
    pool.recovering.pop(request_id, None)
    running = pool.running.pop(request_id, None)
    if running is None:
        for queue in pool.queues.values():
            queue.pop(request_id, None)
        return []
    model = running.request.model
    spent = max(0, now_ms - running.request.arrived_ms)
    known = pool.service_ms.get(model)
    pool.service_ms[model] = spent if known is None else known + 0.1 * (spent - known)
    lease = pool.leases.get((running.worker, model))
    if lease is not None:
        lease.running.discard(request_id)
    return _dispatch(pool, model, now_ms)


def _requeue(pool: Pool, request_id: str, attempt: int, now_ms: int) -> list[Action]:
    lost = pool.recovering.pop(request_id, None)
    if lost is None:
        return []
    request = lost.request
    request.attempt = attempt
    if lost.cancel_asked:
        return [End(request, Status.CANCELLED, "cancelled", "The caller left.")]
    queue = pool.queue(request.model)
    queue[request.id] = request
    queue.move_to_end(request.id, last=False)
    return _dispatch(pool, request.model, now_ms)


# --- workers and leases -------------------------------------------------------------------------------------------


def _worker_seen(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    known = pool.workers.get(status.worker)
    actions: list[Action] = []
    if known is not None and known.status.boot != status.boot:
        actions += _lose_boot(pool, known, now_ms)
        known = None
    trusted = status.term == pool.term
    pool.workers[status.worker] = Worker(status, now_ms, trusted)
    if not trusted:
        # Asked again at each heartbeat until it shows: a term is idempotent, and the worker may be new.
        return [*actions, SendTerm(status.worker)] if status.term < pool.term else actions
    first = known is None or not known.trusted
    actions += _adopt(pool, status)
    if first:
        actions += _reconcile(pool, status)
    actions += _strays(pool, status)
    return actions + _serve(pool, now_ms)


def _adopt(pool: Pool, status: WorkerStatus) -> list[Action]:
    """Bring leases in line with what the worker really holds."""
    actions: list[Action] = []
    for resident in status.resident:
        place = (status.worker, resident.model)
        lease = pool.leases.get(place)
        if lease is None:
            lease = Lease(status.worker, status.boot, resident.model, resident.epoch, resident.state)
            lease.running = {r.request.id for r in pool.running.values() if (r.worker, r.request.model) == place}
            pool.leases[place] = lease
        if resident.epoch != lease.epoch or resident.state == lease.state:
            continue
        if resident.state == "loading":
            lease.state = "granted"  # its engine died and comes back under the same lease
        elif resident.state == "active":
            lease.state = "active"
            actions.append(
                LeaseMoved(status.worker, status.boot, resident.model, resident.epoch, "active", resident.bytes)
            )
        elif resident.state == "failed":
            lease.state, lease.error = "failed", resident.error
            actions.append(LeaseMoved(status.worker, status.boot, resident.model, resident.epoch, "free"))
    return actions


def _reconcile(pool: Pool, status: WorkerStatus) -> list[Action]:
    """A worker shows our term: what it does not run now, of what it was given before, it never will."""
    runs = {(attempt.request_id, attempt.attempt) for attempt in status.running}
    lost = [
        running
        for running in pool.running.values()
        if running.worker == status.worker and (running.request.id, running.request.attempt) not in runs
    ]
    return [_lose(pool, running) for running in lost]


def _strays(pool: Pool, status: WorkerStatus) -> list[Action]:
    """Attempts that a worker still runs and nobody waits for: they hold slots, so they are ended."""
    return [
        CancelRunning(attempt.request_id, status.worker, "The attempt was superseded.", Status.CANCELLED)
        for attempt in status.running
        if (known := pool.running.get(attempt.request_id)) is None or known.request.attempt != attempt.attempt
    ]


def _lose(pool: Pool, running: Running) -> Recover:
    request = running.request
    pool.running.pop(request.id, None)
    lease = pool.leases.get((running.worker, request.model))
    if lease is not None:
        lease.running.discard(request.id)
    pool.recovering[request.id] = running
    return Recover(running, may_retry=request.attempt < MAX_ATTEMPTS)


def _lose_boot(pool: Pool, worker: Worker, now_ms: int) -> list[Action]:
    """A worker's process is gone: its leases end, its requests are recovered."""
    name, boot = worker.status.worker, worker.status.boot
    actions: list[Action] = []
    for place, lease in list(pool.leases.items()):
        if place[0] == name and lease.boot == boot:
            del pool.leases[place]
            if lease.epoch is not None:
                actions.append(LeaseMoved(name, boot, lease.model, lease.epoch, "lost"))
    lost = [running for running in pool.running.values() if (running.worker, running.boot) == (name, boot)]
    return actions + [_lose(pool, running) for running in lost]


def _granted(pool: Pool, worker: str, model: str, epoch: int) -> list[Action]:
    lease = pool.leases.get((worker, model))
    if lease is None or lease.epoch is not None:
        return []
    lease.epoch = epoch
    lease.state = "granted"
    return [Load(worker, lease.boot, model, epoch)]


def _serve(pool: Pool, now_ms: int) -> list[Action]:
    """Lease every preloaded or wanted model to every worker that can serve it; unload what is gone."""
    actions: list[Action] = []
    for name, worker in pool.workers.items():
        if not worker.trusted or worker.status.stopping:
            continue
        for model in pool.models.values():
            if model.provider not in worker.status.providers:
                continue
            lease = pool.leases.get((name, model.id))
            retry = lease is not None and lease.state == "failed" and now_ms - lease.asked_ms >= RELOAD_AFTER_MS
            wanted = model.preload or bool(pool.queues.get(model.id))
            if wanted and (lease is None or retry):
                pool.leases[name, model.id] = Lease(name, worker.status.boot, model.id, asked_ms=now_ms)
                actions.append(Grant(name, worker.status.boot, model.id))
    for place, lease in list(pool.leases.items()):
        if lease.model not in pool.models and not lease.running and lease.epoch is not None:
            del pool.leases[place]
            actions.append(Unload(lease.worker, lease.boot, lease.model, lease.epoch))
            actions.append(LeaseMoved(lease.worker, lease.boot, lease.model, lease.epoch, "free"))
    for model_id in list(pool.queues):
        actions += _dispatch(pool, model_id, now_ms)
    return actions


def _dispatch(pool: Pool, model_id: str, now_ms: int) -> list[Action]:
    """Assign waiting requests of a model to the active leases with the most free slots."""
    queue = pool.queues.get(model_id)
    model = pool.models.get(model_id)
    if not queue or model is None:
        return []
    actions: list[Action] = []
    if (reason := load_error(pool, model_id)) is not None:
        error = f"The model {model_id!r} could not be loaded: {reason}"
        actions = [End(request, Status.FAILED, "provider_error", error) for request in queue.values()]
        queue.clear()
        return actions
    while queue:
        lease = _best_lease(pool, model)
        if lease is None or lease.epoch is None:
            break
        request_id, request = queue.popitem(last=False)
        lease.running.add(request_id)
        pool.running[request_id] = Running(request, lease.worker, lease.boot, lease.epoch)
        actions.append(Assign(request, lease.worker, lease.boot, lease.epoch))
    return actions


def _best_lease(pool: Pool, model: Model) -> Lease | None:
    best: Lease | None = None
    for name, worker in pool.workers.items():
        lease = pool.leases.get((name, model.id))
        if lease is None or lease.state != "active" or not worker.trusted or worker.status.stopping:
            continue
        if len(lease.running) < model.max_concurrency and (best is None or len(lease.running) < len(best.running)):
            best = lease
    return best


# --- time ---------------------------------------------------------------------------------------------------------


def _tick(pool: Pool, now_ms: int) -> list[Action]:
    actions: list[Action] = []
    for name, worker in list(pool.workers.items()):
        if now_ms - worker.seen_ms > WORKER_TIMEOUT_MS:
            del pool.workers[name]
            actions += _lose_boot(pool, worker, now_ms)
    for running in [r for r in pool.running.values() if r.worker not in pool.workers]:
        # Restored from an earlier term, on a worker that never came back.
        if now_ms - pool.taken_ms > WORKER_TIMEOUT_MS:
            actions.append(_lose(pool, running))
    for queue in pool.queues.values():
        for request in [r for r in queue.values() if now_ms > r.deadline_ms]:
            del queue[request.id]
            actions.append(End(request, Status.EXPIRED, "deadline_exceeded", "The deadline passed while it waited."))
    for running in pool.running.values():
        if now_ms > running.request.deadline_ms:
            actions += _cancel_running(running, "The deadline passed.", Status.EXPIRED)
    for request_id, (since, _) in list(pool.early_cancels.items()):
        if now_ms - since > EARLY_CANCEL_MS:
            del pool.early_cancels[request_id]
    return actions + _serve(pool, now_ms)


def load_error(pool: Pool, model_id: str) -> str | None:
    """Why nobody can serve the model now, when every lease on it failed; None while one is active or on its way."""
    leases = [lease for lease in pool.leases.values() if lease.model == model_id]
    if not leases or any(lease.state != "failed" for lease in leases):
        return None
    return leases[0].error


def estimated_wait_ms(pool: Pool, model: Model) -> int:
    """Expected wait of a request that arrives now: its place in the queue over the slots, times a mean service."""
    slots = sum(model.max_concurrency for lease in pool.leases.values() if lease.model == model.id) or 1
    return int(len(pool.queues.get(model.id, ())) / slots * pool.service_ms.get(model.id, 0.0))
