"""A seeded walker takes the policy through a million random steps, and finds each of the ways in which we break it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from processors.scheduler import holdings, lives, placement, policy, servers, training, wishes
from processors.scheduler.messages import Action, CancelAsked, LoadAsked, Unload, Wish
from processors.scheduler.queues import Queue
from processors.scheduler.state import Lease, LeaseState, Pool, Request, Worker
from schemas.events import Priority, Resident, RunningAttempt, WorkerStatus
from tests.support.scheduler_machines import JOBS, SERVED, SIZE, WORKERS, Broken
from tests.support.scheduler_world import INGRESSES, TENANTS, World

STEPS = 1_000_000
LIFE = 400
"""Steps of one world, before it must bring all that was asked to an end and another one begins."""
MOST_LIVE = 14


def walk(seed: int, steps: int) -> int:
    """Take at least `steps` steps in worlds of `LIFE` steps; returns how many. Raises `Broken`."""
    taken = life = 0
    while taken < steps:
        chance = random.Random(f"{seed}/{life}")
        world, trouble = World(server=chance.random() < 0.25), chance.choice((0.0, 0.02, 0.1))
        try:
            while world.steps < LIFE:
                if chance.random() < trouble:
                    disturb(world, chance)
                else:
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
            world.arrive(chance.choice(world.names), patience, chance.choice(TENANTS), priority)
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


def disturb(world: World, chance: random.Random) -> None:
    """Something random happens that changes what there is: by operators, by others on a machine, or by what breaks."""
    worker, model = chance.choice(WORKERS), chance.choice(world.names)
    what = chance.random()
    if what < 0.09:
        world.wish(model, chance.choice(("load", "unload")))
    elif what < 0.15:
        release(world, chance)
    elif what < 0.30:
        change(world, model, chance)
    elif what < 0.40:
        world.breaker(worker, chance.choice("ppqo"), is_open=chance.random() < 0.6)
    elif what < 0.46:
        provider, is_open = chance.choice("ppqo"), chance.random() < 0.7
        for name in WORKERS:
            world.breaker(name, provider, is_open=is_open)
            world.heartbeat(name)
    elif what < 0.60:
        world.resize(worker, chance.choice((SIZE, SIZE, *range(SIZE))))
        world.heartbeat(worker)
    elif what < 0.63:
        world.fall_off(worker)
    elif what < 0.67:
        world.revoke(chance.choice(TENANTS), app=chance.random() < 0.4)
    elif what < 0.72:
        name = chance.choice(INGRESSES)
        (world.lose_ingress if chance.random() < 0.5 else world.boot_ingress)(name)
    elif what < 0.80:
        world.others_load(chance.choice((*SERVED, "?", "?")), chance.choice((1, 2, 3, 4)))
    elif what < 0.83:
        world.others_unload()
    else:
        world.pass_time(chance.choice((1_000, 5_000)))


def release(world: World, chance: random.Random) -> None:
    """An operator says that what is being unloaded is gone, and the scheduler may be another one at once."""
    held = [(name, id, one.state) for name in WORKERS for id, one in world.machines[name].resident.items()]
    leaving = [(name, id) for name, id, state in held if state == "unloading"]
    if leaving:
        world.release(*chance.choice(leaving))
        if chance.random() < 0.3:
            world.take_over()
    elif held:
        world.wish(chance.choice(held)[1], "unload")


def change(world: World, model: str, chance: random.Random) -> None:
    """The registry has a model no more, or has it again, or otherwise."""
    what = chance.random()
    if model not in world.models:
        world.restore(model)
    elif what < 0.35:
        world.remove(model, delete=chance.random() < 0.5)
    elif what < 0.55:
        world.register(model, max_concurrency=chance.choice((1, 2, 3)))
    elif what < 0.75:
        # One that is pinned leaves room for each of the others.
        world.register(model, bytes=chance.choice((1, 2) if model == "pinned" else (2, 4, 6, 8)))
    else:
        world.register(model, pinned=chance.random() < 0.5)


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


def _end_no_wait(
    pool: Pool, wish: CancelAsked, now_ms: int, *, real: Callable[..., list[Action]] = policy._cancel
) -> list[Action]:
    """Who is to end while it waits waits on."""
    return [] if any(wish.request_id in queue for queue in pool.queues.values()) else real(pool, wish, now_ms)


def _forget_the_removed(
    pool: Pool, model_id: str, now_ms: int, *, real: Callable[..., list[Action]] = policy._dispatch
) -> list[Action]:
    """Who waits for a model that is gone waits on."""
    return real(pool, model_id, now_ms) if model_id in pool.models else []


def _keep_the_removed(pool: Pool, now_ms: int, *, real: Callable[..., list[Action]] = lives.time_out) -> list[Action]:
    """A model that is gone keeps its memory."""
    return real(pool, now_ms) if all(lease.model in pool.models for lease in pool.leases.values()) else []


def _grant_what_was(
    pool: Pool, status: WorkerStatus, now_ms: int, *, real: Callable[..., list[Action]] = policy._worker_seen
) -> list[Action]:
    """A device is taken to have what it has at its best."""
    for device in status.devices:
        device.bytes = max(device.bytes, SIZE)
    return real(pool, status, now_ms)


def _unload_any(pool: Pool, model_id: str, reason: str, now_ms: int) -> list[Action]:
    """An operator's wish to unload is obeyed for pinned models too."""
    return wishes._drain_all(pool, model_id, reason, now_ms)


def _obey_no_load(
    pool: Pool, wish: Wish, now_ms: int, *, real: Callable[..., list[Action]] = wishes.obey
) -> list[Action]:
    return [] if isinstance(wish, LoadAsked) else real(pool, wish, now_ms)


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
        (policy, "_cancel", _end_no_wait),
        (policy, "_cancel_running", lambda running, reason, status: []),
        (Pool, "blocked", lambda pool, lease: False),
        (Worker, "offers", lambda worker, provider: worker.usable and provider in worker.status.providers),
        (policy, "broken_reason", lambda pool, model: None),
        (policy, "_worker_seen", _grant_what_was),
        (placement._Planner, "relieve", lambda planner: None),
        (policy, "_dispatch", _forget_the_removed),
        (lives, "time_out", _keep_the_removed),
        (placement, "_pinned", lambda pool, lease: False),
        (wishes, "_unload", _unload_any),
        (wishes, "obey", _obey_no_load),
        (Pool, "at_hand", lambda pool, model: model.pinned or model.preload or model.id in pool.wanted),
        (wishes, "_release", lambda pool, worker, model, reason: []),
        (wishes, "is_released", lambda pool, lease: False),
        (servers, "strays", lambda pool, now_ms: {}),
        (servers, "lose", lambda pool, status, lease, now_ms: None),
        (servers, "unload_strays", lambda pool, now_ms: []),
    ],
    ids=[
        "believe who comes back",
        "skip a fence", "resurrect a victim", "bytes given away too early", "unload what is in use", "forget a queue",
        "keep what the dead held", "forget a lost request", "leak bytes", "forget what is loading", "never free",
        "believe that all still runs", "do not see what runs", "end what is asked for again",
        "forget what was commanded",
        "bytes of who trains on given away", "let jobs train on", "lose sight of trainers",
        "let who is revoked wait", "let who is revoked run",
        "use a broken provider", "load for a broken provider", "let a queue wait for a broken provider",
        "grant on a device that shrank", "let models idle in memory that is gone",
        "forget who waits for a removed model", "keep a removed model",
        "take a pinned model's memory", "unload a pinned model", "ignore a load", "load what was unloaded",
        "ignore a release", "forget a release",
        "forget what a server holds", "forget what a lost worker had in a server",
        "leave in a server what nobody wants",
    ],
)  # fmt: skip
def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, mutant: object) -> None:
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises((Broken, KeyError, ValueError)):
        for seed in range(20):
            walk(1000 + seed, 4_000)
