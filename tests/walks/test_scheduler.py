"""A seeded walker takes the policy through a million random steps, and finds each of the ways in which we break it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from processors.scheduler import holdings, lives, policy, training
from processors.scheduler.messages import Action, Unload
from processors.scheduler.queues import Queue
from processors.scheduler.state import Lease, LeaseState, Pool, Request
from schemas.events import Priority, Resident, RunningAttempt, WorkerStatus
from tests.support.scheduler_world import JOBS, MODELS, TENANTS, WORKERS, Broken, World

STEPS = 1_000_000
LIFE = 400
"""Steps of one world, before it must bring all that was asked to an end and another one begins."""
MOST_LIVE = 14


def walk(seed: int, steps: int) -> int:
    """Take at least `steps` steps in worlds of `LIFE` steps; returns how many. Raises `Broken`."""
    taken = life = 0
    while taken < steps:
        world, chance = World(), random.Random(f"{seed}/{life}")
        try:
            while world.steps < LIFE:
                act(world, chance)
            world.finish_all()
        except Broken as error:
            raise Broken(f"{error} (seed {seed}, life {life}, step {world.steps})") from error
        taken += world.steps
        life += 1
    return taken


def act(world: World, chance: random.Random) -> None:
    """One random thing happens."""
    worker = chance.choice(WORKERS)
    what = chance.random()
    if what < 0.22:
        if len(world.live) < MOST_LIVE:
            patience = chance.choice((300, 3_000, 60_000))
            priority = chance.choice((Priority.INTERACTIVE, Priority.STANDARD, Priority.STANDARD, Priority.BATCH))
            world.arrive(chance.choice(sorted(MODELS)), patience, chance.choice(TENANTS), priority)
    elif what < 0.25:
        world.cancel(chance.choice(sorted(world.asked)) if world.asked else "early")
    elif what < 0.45:
        world.heartbeat(worker, stopping=chance.random() < 0.05)
    elif what < 0.55:
        world.grant()
    elif what < 0.65:
        world.settle(worker, "failed" if chance.random() < 0.1 else "active")
    elif what < 0.77:
        world.generate(worker)
        world.complete(worker)
    elif what < 0.86:
        world.read_log()
    elif what < 0.87:
        world.read_again()
    elif what < 0.90:
        world.recover(empty=chance.random() < 0.7)
    elif what < 0.905:
        (world.stop if chance.random() < 0.4 else world.die)(worker)
    elif what < 0.91:
        world.boot(worker)
    elif what < 0.92:
        world.pause(worker)
    elif what < 0.927:
        world.resume(worker)
    elif what < 0.935:
        world.read(worker)
    elif what < 0.941:
        world.take_over()
    elif what < 0.95:
        world.healthy(worker)
    elif what < 0.97:
        train(world, worker, chance)
    else:
        world.pass_time(chance.choice((50, 250, 1_000, 7_000)))


def train(world: World, worker: str, chance: random.Random) -> None:
    """A job is asked for, is done, or leaves after its notice."""
    job = chance.choice(sorted(JOBS))
    if chance.random() < 0.5:
        world.leave(worker)
    elif job in world.jobs:
        world.end_training(job)
    else:
        world.train(job)


@pytest.mark.timeout(900)
def test_a_million_steps() -> None:
    # Not forked: a fork of a process with threads may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        assert sum(processes.map(walk, range(10), [STEPS // 10] * 10)) >= STEPS


# --- mutants --------------------------------------------------------------------------------------------------------


def _trust_all(pool: Pool, lease: Lease) -> bool:
    return lease.state is LeaseState.ACTIVE


def _resurrect(
    lease: Lease, resident: Resident, now_ms: int, *, real: Callable[..., list[Action]] = holdings._follow
) -> list[Action]:
    if lease.state is LeaseState.DRAINING and resident.state == "active":
        return lives.move(lease, LeaseState.ACTIVE, now_ms)
    return real(lease, resident, now_ms)


def _free_at_once(lease: Lease, now_ms: int) -> list[Action]:
    """Bytes are given away as soon as the worker was told to unload."""
    if lease.state is not LeaseState.DRAINING or lease.running:
        return []
    lease.state, lease.bytes = LeaseState.RELEASING, 0
    return [Unload(lease.worker, lease.boot, lease.model, lease.granted)]


def _forget_a_queue(
    pool: Pool, model_id: str, now_ms: int, *, real: Callable[..., list[Action]] = policy._dispatch
) -> list[Action]:
    return [] if model_id == "two" else real(pool, model_id, now_ms)


def _unload_in_use(lease: Lease, now_ms: int) -> list[Action]:
    if lease.state is not LeaseState.DRAINING or lease.epoch is None:
        return []
    moved = lives.move(lease, LeaseState.RELEASING, now_ms)
    return [Unload(lease.worker, lease.boot, lease.model, lease.epoch), *moved]


def _lose_request(self: Queue, request: Request, *, first: bool = False, real: Callable[..., None] = Queue.add) -> None:
    if not first:
        real(self, request)


def _any_boot(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    """What a dead process held is kept."""
    return []


def _adopt_nothing(pool: Pool, status: WorkerStatus, attempt: RunningAttempt, now_ms: int) -> list[Action]:
    """What a worker runs by the word of the scheduler before is not heeded."""
    return []


def _forget_commands(
    pool: Pool, request: Request, now_ms: int, *, real: Callable[..., list[Action]] = policy._arrived
) -> list[Action]:
    """What the scheduler before had given to a worker is known by what was written down alone."""
    pool.given.clear()
    return real(pool, request, now_ms)


def _any_fence(pool: Pool, status: WorkerStatus) -> bool:
    """A worker that comes back is believed before it has read what it was told."""
    return status.term == pool.term


def _free_after_notice(pool: Pool, now_ms: int) -> list[Action]:
    """A trainer's bytes are given away when its notice has ended, left or not."""
    for place, lease in list(pool.trainers.items()):
        if lease.state is LeaseState.DRAINING and now_ms > lease.by_ms:
            del pool.trainers[place]
    return []


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (policy, "_is_trusted", _any_fence),
        (policy, "_takes_work", _trust_all),
        (holdings, "_follow", _resurrect),
        (lives, "release_drained", _free_at_once),
        (lives, "release_drained", _unload_in_use),
        (policy, "_dispatch", _forget_a_queue),
        (policy, "_lose_boot", _any_boot),
        (Queue, "add", _lose_request),
        (Lease, "holds", property(lambda lease: lease.bytes)),
        (Lease, "holds", property(lambda lease: lease.bytes if lease.state is LeaseState.ACTIVE else 0)),
        (lives, "freed", lambda pool, lease: []),
        (policy, "_reconcile", lambda pool, status: []),
        (policy, "_stray", _adopt_nothing),
        (policy, "STRAYS_MS", -1),
        (policy, "_arrived", _forget_commands),
        (training, "time_out", _free_after_notice),
        (training, "notice", lambda pool, lease, now_ms, reason: []),
        (training, "seen", lambda pool, status, now_ms: []),
    ],
    ids=[
        "believe who comes back",
        "skip a fence", "resurrect a victim", "bytes given away too early", "unload what is in use", "forget a queue",
        "keep what the dead held", "forget a lost request", "leak bytes", "forget what is loading", "never free",
        "believe that all still runs", "do not see what runs", "end what is asked for again",
        "forget what was commanded",
        "bytes of who trains on given away", "let jobs train on", "lose sight of trainers",
    ],
)  # fmt: skip
def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, mutant: object) -> None:
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises((Broken, KeyError, ValueError)):
        for seed in range(20):
            walk(1000 + seed, 4_000)
