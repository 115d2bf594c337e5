"""The scheduling policy: `step(pool, event, now) -> actions`. Pure: no I/O, no clock, no randomness.

Each model has a queue, fair between tenants (`queues`); models share the memory of devices (`placement`) under
leases (`lives`, `holdings`); a request goes to the worker that holds its model and has the most free slots.
"""

from __future__ import annotations

import heapq
from typing import assert_never

from processors.scheduler import forecast, holdings, lives, placement, servers, training, wishes, yielding
from processors.scheduler.messages import (
    Action,
    Adopt,
    Arrived,
    Assign,
    AttemptReady,
    CancelAsked,
    CancelRunning,
    End,
    Enqueued,
    Event,
    Finished,
    Heard,
    LeaseGranted,
    LeaseMoved,
    Load,
    LoadAsked,
    LogRead,
    ModelsChanged,
    ReadLog,
    Recover,
    ReleaseAsked,
    Restored,
    SendTerm,
    Superseded,
    Tick,
    TrainingAsked,
    TrainingDone,
    TrainingGranted,
    UnloadAsked,
    WeightsChanged,
    WorkerSeen,
)
from processors.scheduler.state import Lease, LeaseState, Pool, Request, Running, Stray, Taking, Worker
from schemas.control import Model
from schemas.events import Priority, RunningAttempt, Status, WorkerStatus

WORKER_TIMEOUT_MS = 3_000
"""A worker without a heartbeat for this long is lost."""
EARLY_CANCEL_MS = 900_000
"""How long a cancellation that found no request is remembered."""
DEAF_MS = 1_000
"""Between two ticks that are further apart than this, the scheduler heard nobody: it, or the brokers, stood still."""
MAX_QUEUE = 10_000
"""Requests that may wait for one model; more are shed."""
BROKEN_RETRY_S = 5
"""What a caller is told to wait for when the provider of its model fails."""
STRAYS_MS = 10_000
"""What a worker runs that nobody asked us for is left alone for this long after the pool was taken: its request may
come again, since the scheduler before had not committed that it had read it."""
MAX_ATTEMPTS = 3
"""Workers that may die under one request before it fails."""


def step(pool: Pool, event: Event, now_ms: int) -> list[Action]:
    """Apply one event to the pool, which is changed in place, and return what must be done, in order."""
    match event:
        case Arrived(request):
            return _arrived(pool, request, now_ms)
        case Restored(running):
            return _restored(pool, running)
        case CancelAsked():
            return _cancel(pool, event, now_ms)
        case Finished():
            return _finished(pool, event, now_ms)
        case AttemptReady():
            return _requeue(pool, event, now_ms)
        case Superseded(request_id, attempt):
            return _superseded(pool, request_id, attempt, now_ms)
        case WorkerSeen(status):
            return _worker_seen(pool, status, now_ms)
        case LeaseGranted():
            return _granted(pool, event, now_ms)
        case Heard():
            pool.taking = Taking.HEARING
            return _hear(pool)
        case LogRead():
            pool.taking = Taking.TAKEN
            return _fence_opened(pool, now_ms) + _serve(pool, now_ms)
        case ModelsChanged(models):
            pool.models = models
            pool.ready_ms = {id: at_ms for id, at_ms in pool.ready_ms.items() if id in models}
            return _serve(pool, now_ms)
        case WeightsChanged(weights):
            pool.weights.clear()
            pool.weights.update(weights)
            return []
        case LoadAsked() | UnloadAsked() | ReleaseAsked():
            return wishes.obey(pool, event, now_ms) + _serve(pool, now_ms)
        case TrainingAsked(job):
            training.ask(pool, job)
            return _serve(pool, now_ms)
        case TrainingDone(job_id):
            return training.done(pool, job_id, now_ms)
        case TrainingGranted():
            return training.granted(pool, event, now_ms)
        case Tick():
            return _tick(pool, now_ms)
    assert_never(event)


# --- requests -----------------------------------------------------------------------------------------------------


def _arrived(pool: Pool, request: Request, now_ms: int) -> list[Action]:
    early = pool.early_cancels.pop((request.tenant, request.id), None)
    given = pool.given.pop((request.id, request.attempt), None)
    refused = given is not None and _has_not(pool, given, request)
    if (stray := pool.strays.pop((request.id, request.attempt), None if refused else given)) is not None:
        shown = any(request.id in lease.strays for lease in _leases_at(pool, stray))
        adopted = _run_on(pool, request, stray, now_ms, shown=shown)
        return (
            adopted
            if early is None
            else adopted + _cancel(pool, CancelAsked(request.id, early[1], request.tenant), now_ms)
        )
    if refused or (request.opened_before and pool.taking is Taking.TAKEN):
        return [Enqueued(request), _fence(pool, request, now_ms, cancel_asked=early is not None)]
    if early is not None:
        return [End(request, Status.CANCELLED, "cancelled", early[1])]
    if now_ms > request.late_ms:
        return [_too_late(request)]
    model = pool.models.get(request.model)
    if model is None:
        return [End(request, Status.REJECTED, "model_not_found", f"The model {request.model!r} was removed.")]
    if (reason := placement.too_large(pool, model)) is not None:
        return [End(request, Status.REJECTED, "service_unavailable", f"The model {model.id!r} {reason}.")]
    queue = pool.queue(request.model)
    if len(queue) >= MAX_QUEUE:
        return [End(request, Status.REJECTED, "service_unavailable", "Too many requests wait for this model.")]
    patience_ms = request.late_ms - now_ms
    wait_ms = estimated_wait_ms(pool, model, now_ms, request.tenant, request.priority, patience_ms=patience_ms)
    if wait_ms > patience_ms:
        wait_s = -(-wait_ms // 1000)
        message = f"The wait for the model {model.id!r} is about {wait_s} s, longer than the request may wait."
        return [End(request, Status.REJECTED, "service_unavailable", message, retry_after_s=wait_s)]
    placement.count_demand(pool, request.model, now_ms)
    actions = _enqueue(pool, request, now_ms)
    if request.id in queue:
        actions.append(Enqueued(request))
        if len(queue) == 1:  # Where others waited before it, memory was planned for them.
            actions += placement.place(pool, now_ms)
    return actions


def _enqueue(pool: Pool, request: Request, now_ms: int, *, first: bool = False) -> list[Action]:
    """Let a request wait, and give it a slot at once if there is one."""
    request.waiting_ms = now_ms
    pool.queue(request.model).add(request, first=first)
    heapq.heappush(pool.deadlines, (request.late_ms, request.id, request.model))
    return _dispatch(pool, request.model, now_ms)


def _run_on(pool: Pool, request: Request, at: Stray, now_ms: int, *, shown: bool) -> list[Action]:
    """A request that the scheduler before us had given to a worker, and did not come to write down that it had.

    One that its worker has `shown` before and shows no more has ended: its slot may be another's by now.
    """
    pool.queue(request.model).charge_tokens(request, prompt=request.prompt_tokens)
    pool.running[request.id] = Running(request, at.worker, at.boot, at.epoch, now_ms)
    lease = pool.leases.get((at.worker, request.model))
    if lease is not None and lease.boot == at.boot:
        lease.strays.discard(request.id)
        if shown:
            lease.running.add(request.id)
    return [Adopt(request, at.worker, at.boot, at.epoch)]


def _has_not(pool: Pool, at: Stray, request: Request) -> bool:
    """Whether a worker that was told to run a request shows that it does not: it has ended it, or refused to."""
    worker = pool.workers.get(at.worker)
    if worker is None or not worker.trusted or worker.status.boot != at.boot:
        return False
    return (request.id, request.attempt) not in _shown(worker.status)


def _fence(pool: Pool, request: Request, now_ms: int, *, cancel_asked: bool = False) -> Recover:
    """Open the next attempt of a request whose last one was the scheduler's before, and which no worker has."""
    request.opened_before = False
    pool.recovering[request.id] = held = Running(request, "", "", 0, now_ms, cancel_asked)
    return Recover(held, may_retry=True, reason="its scheduler was lost")


def _fence_opened(pool: Pool, now_ms: int) -> list[Action]:
    """The pool is taken: what lost attempts had sent is asked for anew where the one who had asked for it is gone."""
    actions: list[Action] = []
    for queue in pool.queues.values():
        for request in [waiting for waiting in queue if waiting.opened_before]:
            queue.remove(request.id)
            actions.append(_fence(pool, request, now_ms))
    return actions


def _too_late(request: Request) -> End:
    message = "The deadline passed while the request waited for its turn."
    if request.late_ms < request.deadline_ms:
        message = "The request was to begin by now, and still waited for its turn: nothing was generated."
    return End(request, Status.EXPIRED, "deadline_exceeded", message)


def _restored(pool: Pool, running: Running) -> list[Action]:
    pool.running[running.request.id] = running
    pool.queue(running.request.model).charge_tokens(running.request, prompt=running.request.prompt_tokens)
    lease = pool.leases.get((running.worker, running.request.model))
    if lease is not None and lease.boot == running.boot:  # its worker was heard before this request was read
        lease.running.add(running.request.id)
    return []


def _cancel(pool: Pool, wish: CancelAsked, now_ms: int) -> list[Action]:
    running = pool.running.get(wish.request_id) or pool.recovering.get(wish.request_id)
    if running is not None:
        own = running.request.tenant == wish.tenant
        return _cancel_running(running, wish.reason, Status.CANCELLED) if own else []
    for queue in pool.queues.values():
        if (request := queue.get(wish.request_id)) is not None:
            if request.tenant != wish.tenant:
                return []
            queue.remove(wish.request_id)
            return [End(request, Status.CANCELLED, "cancelled", wish.reason)]
    pool.early_cancels[wish.tenant, wish.request_id] = (now_ms, wish.reason)
    return []


def _cancel_running(running: Running, reason: str, status: Status) -> list[Action]:
    if running.cancel_asked:
        return []
    running.cancel_asked = True
    # What no worker has ends when its next attempt is open.
    return [CancelRunning(running.request.id, running.worker, reason, status)] if running.worker else []


def _finished(pool: Pool, event: Finished, now_ms: int) -> list[Action]:
    pool.recovering.pop(event.request_id, None)
    running = pool.running.pop(event.request_id, None)
    if running is None:
        for queue in pool.queues.values():
            queue.remove(event.request_id)
        return []
    request = running.request
    queue = pool.queue(request.model)
    queue.charge_tokens(request, prompt=event.prompt_tokens, completion=event.completion_tokens)
    spent = max(0, now_ms - running.began_ms)
    known = pool.service_ms.get(request.model)
    pool.service_ms[request.model] = spent if known is None else known + 0.1 * (spent - known)
    lease = pool.leases.get((running.worker, request.model))
    if lease is None:
        return _dispatch(pool, request.model, now_ms)
    lease.running.discard(request.id)
    lease.used_ms = now_ms
    if lease.state is LeaseState.DRAINING:
        return lives.release_drained(lease, now_ms)
    actions = _dispatch(pool, request.model, now_ms)
    # It may be idle now, and another model may have waited for that.
    return actions if lease.running else actions + placement.place(pool, now_ms)


def _requeue(pool: Pool, ready: AttemptReady, now_ms: int) -> list[Action]:
    """Let a request wait for its next attempt, which is open: what the one before it still says is void."""
    actions: list[Action] = []
    before = pool.recovering.pop(ready.request_id, None)
    if before is None:
        before = pool.running.get(ready.request_id)
        if before is None or not before.yielding:
            return []
        actions += _give_up_slot(pool, before, now_ms)
    request = before.request
    request.attempt = ready.attempt
    if ready.begun:
        request.start_by_ms = 0
    if before.cancel_asked:
        return [*actions, End(request, Status.CANCELLED, "cancelled", "The caller left.")]
    if request.model not in pool.models:
        reason = f"The model {request.model!r} was removed."
        return [*actions, End(request, Status.REJECTED, "model_not_found", reason)]
    if now_ms > request.late_ms:
        return [*actions, _too_late(request)]
    # What a worker had goes before all others.
    actions += _enqueue(pool, request, now_ms, first=bool(before.worker) or ready.begun)
    return actions + placement.place(pool, now_ms) if request.id in pool.queue(request.model) else actions


def _give_up_slot(pool: Pool, running: Running, now_ms: int) -> list[Action]:
    request = running.request
    del pool.running[request.id]
    actions: list[Action] = [
        CancelRunning(request.id, running.worker, "It gave way.", Status.CANCELLED, request.attempt)
    ]
    lease = pool.leases.get((running.worker, request.model))
    if lease is not None:
        lease.running.discard(request.id)
        actions += lives.release_drained(lease, now_ms)
    return actions


# --- workers and leases -------------------------------------------------------------------------------------------


def _worker_seen(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    known = pool.workers.get(status.worker)
    if status.left:
        return _worker_left(pool, status, now_ms)
    actions: list[Action] = []
    if known is not None and known.status.boot != status.boot:
        actions += _lose_boot(pool, known.status, now_ms)
        known = None
    trusted = _is_trusted(pool, status)
    pool.workers[status.worker] = Worker(status, now_ms, trusted)
    if not trusted:
        # Asked again at each heartbeat until it shows: a term is idempotent, and the worker may be new.
        if status.term <= pool.term:
            actions.append(SendTerm(status.worker, pool.fences.get(status.worker, 0)))
        return actions + _serve(pool, now_ms)  # Others may have to do without it.
    first = known is None or not known.trusted
    news = known is None or first or _tells_news(pool, known.status, status)
    actions += holdings.adopt(pool, status, now_ms)
    servers.see_dropped(pool, status, now_ms)
    actions += holdings.see_freed(pool, status)
    actions += training.seen(pool, status, now_ms)
    if first:
        actions += _reconcile(pool, status)
    actions += _progress(pool, status, now_ms)
    actions += _hear(pool)
    # What time alone has changed is for the next tick.
    return actions + _serve(pool, now_ms) if news or actions else actions


def _worker_left(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    """A worker stopped in order: what it did not end goes on elsewhere, and nobody waits until it is missed."""
    known = pool.workers.get(status.worker)
    if known is not None and known.status.boot == status.boot:
        del pool.workers[status.worker]
    actions = _lose_boot(pool, status, now_ms)
    return actions + _hear(pool) + _serve(pool, now_ms)


def _tells_news(pool: Pool, before: WorkerStatus, now: WorkerStatus) -> bool:
    """Whether a heartbeat shows more than progress: anything by which memory or slots could be given otherwise."""
    if (before.resident, before.devices, before.providers, before.broken, before.stopping, before.trainers) != (
        now.resident, now.devices, now.providers, now.broken, now.stopping, now.trainers
    ):  # fmt: skip
        return True
    if any(lease.strays for lease in pool.leases.values()):
        return True
    changed = (
        running
        for attempt in now.running
        if (running := pool.running.get(attempt.request_id)) is not None and running.goes_on != attempt.goes_on
    )
    return any(running.request.priority is Priority.BATCH for running in changed)


def _hear(pool: Pool) -> list[Action]:
    """Go on with taking the pool once every worker that lives has shown the term."""
    if pool.taking is not Taking.HEARING or not all(worker.trusted for worker in pool.workers.values()):
        return []
    pool.taking = Taking.READING
    return [ReadLog()]


def _is_trusted(pool: Pool, status: WorkerStatus) -> bool:
    return status.term == pool.term and status.fence >= pool.fences.get(status.worker, 0)


def _reconcile(pool: Pool, status: WorkerStatus) -> list[Action]:
    """A worker shows our term: what it does not run now, of what it was given before, it never will."""
    runs = _shown(status)
    lost = [
        running
        for running in pool.running.values()
        if running.worker == status.worker and (running.request.id, running.request.attempt) not in runs
    ]
    return [action for running in lost for action in _lose(pool, running)]


def _shown(status: WorkerStatus) -> set[tuple[str, int]]:
    """(request, attempt) of all that a worker runs."""
    return {(attempt.request_id, attempt.attempt) for attempt in status.running}


def _progress(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    """Charge what was generated; end attempts that nobody waits for any more, since they hold slots."""
    actions: list[Action] = []
    for lease in pool.leases.values():
        if lease.worker == status.worker:
            lease.strays.clear()
    for attempt in status.running:
        known = pool.running.get(attempt.request_id)
        if known is not None and known.request.attempt == attempt.attempt:
            if (known.worker, known.boot) != (status.worker, status.boot):
                actions += _lose(pool, known)  # Two have the same attempt: neither counts.
                continue
            known.goes_on = attempt.goes_on
            pool.queue(known.request.model).charge_tokens(known.request, completion=attempt.tokens)
        else:
            actions += _stray(pool, status, attempt, now_ms)
    return actions


def _stray(pool: Pool, status: WorkerStatus, attempt: RunningAttempt, now_ms: int) -> list[Action]:
    """An attempt that we gave to nobody: it is superseded, or the scheduler before us gave it and did not say so."""
    at = Stray(status.worker, status.boot, attempt.epoch)
    lost = pool.recovering.get(attempt.request_id)
    if lost is not None and lost.request.attempt == attempt.attempt:
        # Its next attempt is not open yet: an end that it told of now would be the request's.
        return _keep_slot(pool, at, attempt.request_id)
    if attempt.request_id not in pool.running and lost is None:
        for queue in pool.queues.values():
            waiting = queue.get(attempt.request_id)
            if waiting is not None and waiting.attempt == attempt.attempt:
                queue.remove(waiting.id)
                return _run_on(pool, waiting, at, now_ms, shown=True)
            if waiting is not None:
                break
        else:
            if now_ms - pool.taken_ms < STRAYS_MS:
                pool.strays[attempt.request_id, attempt.attempt] = at
                return _keep_slot(pool, at, attempt.request_id)
    reason = "The attempt was superseded."
    # By its number: another attempt of it may be on its way to the same worker.
    return [CancelRunning(attempt.request_id, status.worker, reason, Status.CANCELLED, attempt=attempt.attempt)]


def _keep_slot(pool: Pool, at: Stray, request_id: str) -> list[Action]:
    """What is left alone where it runs has its slot until its worker is heard next."""
    for lease in _leases_at(pool, at):
        lease.strays.add(request_id)
    return []


def _leases_at(pool: Pool, at: Stray) -> list[Lease]:
    place = (at.worker, at.boot, at.epoch)
    return [lease for lease in pool.leases.values() if (lease.worker, lease.boot, lease.epoch) == place]


def _lose(pool: Pool, running: Running, *, left: bool = False) -> list[Action]:
    """Recover a request whose worker has it no more; where that `left` in order, it is not held against the request."""
    request = running.request
    request.losses += not left
    pool.running.pop(request.id, None)
    lease = pool.leases.get((running.worker, request.model))
    if lease is not None:
        lease.running.discard(request.id)
    pool.recovering[request.id] = running
    if running.yielding:
        return []  # Its next attempt is being opened already.
    reason = f"worker {running.worker} stopped" if left else ""
    return [Recover(running, may_retry=request.losses < MAX_ATTEMPTS, reason=reason)]


def _superseded(pool: Pool, request_id: str, attempt: int, now_ms: int) -> list[Action]:
    """A scheduler before us opened the next attempt, and was gone before it could give it to a worker."""
    running = pool.running.get(request_id)
    if running is not None:
        return _lose(pool, running) if running.request.attempt < attempt and not running.yielding else []
    for queue in pool.queues.values():
        waiting = queue.get(request_id)
        if waiting is not None and waiting.attempt < attempt:
            queue.remove(request_id)
            return [_fence(pool, waiting, now_ms)]
    return []


def _lose_boot(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    """A worker's process is gone, as its last `status` may say: its leases end, its requests are recovered."""
    name, boot = status.worker, status.boot
    actions = training.lose_boot(pool, name, boot)
    for place, lease in list(pool.leases.items()):
        if place[0] == name and lease.boot == boot:
            del pool.leases[place]
            servers.lose(pool, status, lease, now_ms)
            if lease.epoch is not None:
                reason = "the worker stopped" if status.left else "the worker's process is gone"
                actions.append(
                    LeaseMoved(name, boot, lease.model, lease.epoch, "lost", lease.bytes, reason, lease.device)
                )
    lost = [running for running in pool.running.values() if (running.worker, running.boot) == (name, boot)]
    return actions + [action for running in lost for action in _lose(pool, running, left=status.left)]


def _granted(pool: Pool, event: LeaseGranted, now_ms: int) -> list[Action]:
    worker, boot, model, epoch = event.worker, event.boot, event.model, event.epoch
    lease = pool.leases.get((worker, model))
    if lease is None or lease.epoch is not None or lease.boot != boot:
        # It is written down and nobody has it; the process that is there now has a grant of its own.
        return [LeaseMoved(worker, boot, model, epoch, "lost", reason="the worker's process is gone")]
    lease.epoch = epoch
    if model not in pool.models:
        return lives.freed(pool, lease)  # it was removed while the grant was written
    load = Load(worker, boot, model, epoch, lease.device)
    return [load, *lives.move(lease, LeaseState.LOADING, now_ms)]


def _serve(pool: Pool, now_ms: int) -> list[Action]:
    """Plan memory, then assign what waits; nothing before the pool is taken."""
    if pool.taking is not Taking.TAKEN:
        return []
    actions = [
        *wishes.settle(pool, now_ms), *lives.time_out(pool, now_ms), *training.time_out(pool, now_ms),
        *servers.unload_strays(pool, now_ms), *placement.place(pool, now_ms),
    ]  # fmt: skip
    for model_id in pool.queues:
        actions += _dispatch(pool, model_id, now_ms)
    for lease in list(pool.leases.values()):
        actions += lives.release_drained(lease, now_ms)
    return actions


def _dispatch(pool: Pool, model_id: str, now_ms: int) -> list[Action]:
    """Assign waiting requests of a model to the active leases with the most free slots."""
    queue = pool.queues.get(model_id)
    if not queue or pool.taking is not Taking.TAKEN:
        return []
    model = pool.models.get(model_id)
    if model is None:
        return _end_all(pool, model_id, Status.REJECTED, "model_not_found", f"The model {model_id!r} was removed.")
    if (reason := broken_reason(pool, model)) is not None:
        error = f"The provider of the model {model_id!r} fails, and is tried again in a moment: {reason}"
        return _end_all(pool, model_id, Status.FAILED, "provider_error", error, retry_after_s=BROKEN_RETRY_S)
    held = pool.of_model(model_id)
    if (reason := _failure(held)) is not None and not any(lives.due_again(lease, now_ms) for lease in held):
        error = f"The model {model_id!r} could not be loaded: {reason}"
        return _end_all(pool, model_id, Status.FAILED, "provider_error", error)
    actions: list[Action] = []
    leases = [lease for lease in held if _takes_work(pool, lease)]
    while leases and queue:
        lease = min(leases, key=lambda one: one.used)
        free = model.max_concurrency - lease.used
        # Batch work leaves a slot for those who do not plan ahead.
        if free <= 0 or (request := queue.take(idle=free > 1 or model.max_concurrency == 1)) is None:
            break
        lease.running.add(request.id)
        lease.used_ms = now_ms
        pool.running[request.id] = Running(request, lease.worker, lease.boot, lease.granted, now_ms)
        actions.append(Assign(request, lease.worker, lease.boot, lease.granted))
    if leases and queue.pressing:
        actions += yielding.yield_slots(pool, leases, queue.pressing)
    return actions


def _end_all(
    pool: Pool, model_id: str, status: Status, code: str, message: str, *, retry_after_s: int = 2
) -> list[Action]:
    waiting = list(pool.queues[model_id])
    for request in waiting:
        pool.queues[model_id].remove(request.id)
    return [End(request, status, code, message, retry_after_s) for request in waiting]


def _takes_work(pool: Pool, lease: Lease) -> bool:
    worker = pool.workers.get(lease.worker)
    return lease.state is LeaseState.ACTIVE and worker is not None and worker.usable and not pool.blocked(lease)


# --- time ---------------------------------------------------------------------------------------------------------


def _tick(pool: Pool, now_ms: int) -> list[Action]:
    _forgive_deaf_time(pool, now_ms)
    actions: list[Action] = []
    for name, worker in list(pool.workers.items()):
        if now_ms - worker.seen_ms > WORKER_TIMEOUT_MS:
            del pool.workers[name]
            actions += _lose_boot(pool, worker.status, now_ms)
            # Should it come back, what it was told and has not read comes first: it may load a model yet.
            pool.fences[name] = pool.fences.get(name, 0) + 1
    for running in [r for r in pool.running.values() if not _is_there(pool, r)]:
        # Of an earlier term, on a worker that never came back.
        if now_ms - pool.taken_ms > WORKER_TIMEOUT_MS:
            actions += _lose(pool, running)
    while pool.deadlines and pool.deadlines[0][0] < now_ms:
        _, request_id, model_id = heapq.heappop(pool.deadlines)
        queue = pool.queues[model_id]
        # One that has begun meanwhile, and waits to go on, has its deadline in the heap too.
        if (request := queue.get(request_id)) is not None and now_ms > request.late_ms:
            queue.remove(request_id)
            actions.append(_too_late(request))
    for running in pool.running.values():
        if now_ms > running.request.deadline_ms:
            actions += _cancel_running(running, "The deadline passed.", Status.EXPIRED)
    for wish, (since, _) in list(pool.early_cancels.items()):
        if now_ms - since > EARLY_CANCEL_MS:
            del pool.early_cancels[wish]
    if now_ms - pool.taken_ms > STRAYS_MS:
        # No request comes again any more. What still runs keeps its slot until its worker shows it next, and is ended
        # then: its model must not be unloaded under it.
        pool.strays.clear()
        pool.given.clear()
    return actions + _hear(pool) + _serve(pool, now_ms)


def _is_there(pool: Pool, running: Running) -> bool:
    worker = pool.workers.get(running.worker)
    return worker is not None and worker.status.boot == running.boot


def _forgive_deaf_time(pool: Pool, now_ms: int) -> None:
    """Time in which the scheduler did not listen does not count against workers."""
    if pool.ticked_ms and now_ms - pool.ticked_ms > DEAF_MS:
        for worker in pool.workers.values():
            worker.seen_ms = max(worker.seen_ms, now_ms - DEAF_MS)
    pool.ticked_ms = now_ms


# --- what others may ask ------------------------------------------------------------------------------------------


def load_error(pool: Pool, model: Model) -> str | None:
    """Why nobody can load the model: every lease on it failed, or no device is large enough. None while one is held."""
    held = pool.of_model(model.id)
    return _failure(held) if held else placement.too_large(pool, model)


def broken_reason(pool: Pool, model: Model) -> str | None:
    """Why nobody can use the model's provider, when its breaker is open on each worker that serves it."""
    if not any(worker.status.broken for worker in pool.workers.values()):
        return None  # as nearly always
    serving = [w.status for w in pool.workers.values() if w.usable and model.provider in w.status.providers]
    if not serving or any(model.provider not in status.broken for status in serving):
        return None
    return serving[0].broken[model.provider]


def _failure(leases: list[Lease]) -> str | None:
    if not leases or any(lease.state is not LeaseState.FAILED for lease in leases):
        return None
    return leases[0].error


def estimated_wait_ms(
    pool: Pool,
    model: Model,
    now_ms: int,
    tenant: str | None = None,
    priority: Priority = Priority.STANDARD,
    *,
    patience_ms: int = 0,
) -> int:
    """Expected wait of a request that comes now; without a tenant, the least that any of its priority waits.

    Where no lease is coming the model waits for memory first (`forecast`), and is then loaded; a load that goes on
    counts for what is left of it. After the load a slot comes free every `service / slots` on average: once for each
    request that goes before it and for itself, less the slots that are free now, or that batch work gives up for it.
    The wait for memory is left out where the longest there is would not make the wait longer than `patience_ms`.
    """
    leases = [lease for lease in pool.of_model(model.id) if lease.coming and not pool.blocked(lease)]
    slots = sum(model.max_concurrency for lease in leases) or model.max_concurrency
    queue, service = pool.queues.get(model.id), pool.service_ms.get(model.id, 0.0)
    turns = (queue.before(tenant, priority) if queue else 0.0) + 1 - slots + sum(lease.used for lease in leases)
    if priority is not Priority.BATCH:
        turns -= sum(yielding.gives(pool, lease) for lease in leases)
    elif model.max_concurrency > 1:
        turns += len(leases)  # Batch work leaves one free.
    load_ms = min((forecast.load_left_ms(lease, model, now_ms) for lease in leases), default=model.load_ms)
    wait_ms = load_ms + int(max(0.0, turns) / slots * service)
    if leases or wait_ms + pool.limits.max_wait_ms <= patience_ms:
        return wait_ms
    return wait_ms + forecast.memory_wait_ms(pool, model, now_ms, priority)
