"""Training as a tenant of idle memory: jobs hold bytes of a device under leases that give way on notice. Pure.

A job's lease is granted what nobody else wants, and is given notice as soon as a model that somebody waits for, or that
is to be at hand, would fit in its place. Then the trainer writes its checkpoint and leaves; its bytes are granted again
when its worker shows that it has left, or when the worker's process is gone. One that has not left when its notice ends
is quarantined. A job that gave way waits for memory again.

 requested ──▶ loading ──▶ active ──▶ draining ──▶ (left)
     └── gave way before it began           └── past its notice ──▶ quarantined ──▶ (left)
"""

from __future__ import annotations

from collections.abc import Iterator

from processors.scheduler.messages import (
    Action,
    BeginTraining,
    GrantTraining,
    NoticeTraining,
    TrainingGranted,
    TrainingMoved,
)
from processors.scheduler.state import Job, LeaseState, Pool, TrainingLease, Worker
from schemas.events import Trainer, WorkerStatus

_STAYS = (LeaseState.REQUESTED, LeaseState.LOADING, LeaseState.ACTIVE)


def ask(pool: Pool, job: Job) -> None:
    """A job wants memory, from now on until it is done; told again, nothing changes."""
    pool.jobs.setdefault(job.id, job)


def done(pool: Pool, job_id: str, now_ms: int) -> list[Action]:
    """A job needs no memory any more: it has ended, or nobody wants it."""
    pool.jobs.pop(job_id, None)
    return [action for lease in leases_of(pool, job_id) for action in notice(pool, lease, now_ms, "the job is done")]


def leases_of(pool: Pool, job_id: str) -> list[TrainingLease]:
    """The leases of a job: more than one only where a worker that was given up for lost comes back with it."""
    return [lease for (_, held), lease in pool.trainers.items() if held == job_id]


def waiting(pool: Pool) -> Iterator[Job]:
    """Jobs that hold nothing, in the order in which they asked."""
    held = {job_id for _, job_id in pool.trainers}
    return (job for job in pool.jobs.values() if job.id not in held)


def devices(pool: Pool, job: Job) -> Iterator[tuple[str, str]]:
    """Workers and devices that a job may be given: not a server's memory, in which nobody trains."""
    for name, worker in pool.workers.items():
        for device in worker.status.devices if worker.usable else ():
            if not device.shared and job.device in ("", device.id):
                yield name, device.id


def grant(pool: Pool, job: Job, worker: Worker, device: str, now_ms: int) -> list[Action]:
    """Ask for a job's lease."""
    name, boot = worker.status.worker, worker.status.boot
    pool.trainers[name, job.id] = TrainingLease(name, boot, job.id, device, job.bytes, job.notice_ms, moved_ms=now_ms)
    return [GrantTraining(name, boot, job.id, device, job.bytes)]


def granted(pool: Pool, event: TrainingGranted, now_ms: int) -> list[Action]:
    """The grant is durable: the trainer may begin, unless somebody needed the memory meanwhile."""
    lease = pool.trainers.get((event.worker, event.job))
    if lease is None or lease.epoch is not None:
        return []
    lease.epoch = event.epoch
    if lease.state is not LeaseState.REQUESTED:
        return _left(pool, lease)
    begin = BeginTraining(lease.worker, lease.boot, lease.job, event.epoch, lease.device, lease.bytes, lease.notice_ms)
    return [begin, *_move(lease, LeaseState.LOADING, now_ms)]


def notice(pool: Pool, lease: TrainingLease, now_ms: int, reason: str) -> list[Action]:
    """Have a trainer write its checkpoint and leave; there is no way back."""
    if lease.state not in _STAYS:
        return []
    lease.by_ms = now_ms + min(lease.notice_ms, pool.limits.max_wait_ms // 2)
    moved = _move(lease, LeaseState.DRAINING, now_ms, reason)
    if lease.epoch is None:
        return moved
    return [NoticeTraining(lease.worker, lease.boot, lease.job, lease.epoch, lease.by_ms, reason), *moved]


def time_out(pool: Pool, now_ms: int) -> list[Action]:
    """Quarantine what has not left when its notice ended."""
    return [
        action
        for lease in pool.trainers.values()
        if lease.state is LeaseState.DRAINING and lease.epoch is not None and now_ms > lease.by_ms
        for action in _move(lease, LeaseState.QUARANTINED, now_ms, "did not leave in time")
    ]


def seen(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    """Bring leases in line with what a worker shows that has read all that it was told before us."""
    actions: list[Action] = []
    for shown in status.trainers:
        lease = pool.trainers.get((status.worker, shown.job))
        if lease is None and not shown.left:
            actions += _take_over(pool, status, shown, now_ms)
        elif lease is not None and lease.epoch == shown.epoch:
            if shown.left:
                actions += _left(pool, lease)
            elif lease.state is LeaseState.LOADING:
                actions += _move(lease, LeaseState.ACTIVE, now_ms)
    return actions


def lose_boot(pool: Pool, name: str, boot: str) -> list[Action]:
    """A worker's process is gone, and its trainers with it: their jobs wait again."""
    actions: list[Action] = []
    for place, lease in list(pool.trainers.items()):
        if place[0] == name and lease.boot == boot:
            del pool.trainers[place]
            actions += _told(lease, "lost", "the worker's process is gone")
    return actions


def _take_over(pool: Pool, status: WorkerStatus, shown: Trainer, now_ms: int) -> list[Action]:
    """A trainer that we did not begin, or had given up for lost. Jobs are to be asked for before workers are heard."""
    lease = TrainingLease(
        status.worker, status.boot, shown.job, shown.device, shown.bytes, shown.notice_ms, shown.epoch,
        LeaseState.LOADING, moved_ms=now_ms,
    )  # fmt: skip
    pool.trainers[status.worker, shown.job] = lease
    actions = _move(lease, LeaseState.ACTIVE, now_ms)
    if shown.job not in pool.jobs:
        return actions + notice(pool, lease, now_ms, "the job is done")
    if len(leases_of(pool, shown.job)) > 1:  # It goes on elsewhere: what comes back late has nothing to add.
        return actions + notice(pool, lease, now_ms, "the job was given to another worker")
    return actions


def _left(pool: Pool, lease: TrainingLease) -> list[Action]:
    del pool.trainers[lease.worker, lease.job]
    return _told(lease, "free", "")


def _move(lease: TrainingLease, state: LeaseState, now_ms: int, reason: str = "") -> list[Action]:
    lease.state, lease.moved_ms = state, now_ms
    return _told(lease, str(state), reason)


def _told(lease: TrainingLease, state: str, reason: str) -> list[Action]:
    if lease.epoch is None:
        return []
    return [TrainingMoved(lease.worker, lease.boot, lease.job, lease.epoch, state, lease.bytes, lease.device, reason)]
