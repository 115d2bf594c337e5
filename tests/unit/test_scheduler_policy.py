"""The scheduling policy against a small world of workers that load, run, die and come back, in any order of events."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from processors.scheduler import messages, policy
from processors.scheduler.policy import Action, Event, step
from processors.scheduler.state import Pool, Request
from schemas.control import Model
from schemas.events import Resident, RunningAttempt, Status, WorkerStatus

TERM = 7
MODELS = {
    "two": Model("two", "p", "t", max_concurrency=2),
    "one": Model("one", "p", "t", max_concurrency=1, preload=False),
}
WORKERS = ("w1", "w2")


@dataclass
class Machine:
    """A worker's process as it really is; the policy sees it only by heartbeats."""

    boot: int = 0
    alive: bool = False
    term: int = -1
    resident: dict[str, tuple[int, str]] = field(default_factory=dict)
    running: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """(request, attempt) -> (model, epoch)."""


class World(RuleBasedStateMachine):
    """Carries out the policy's actions, late or never, as real parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000
        self.pool = Pool(term=TERM, taken_ms=self.now)
        self.machines = {name: Machine() for name in WORKERS}
        self.epoch = 100
        self.asked: dict[str, Request] = {}
        self.ended: dict[str, Status] = {}
        self.grants: list[messages.Grant] = []
        self.recoveries: list[messages.Recover] = []
        self.given: dict[str, int] = {}
        """Highest attempt that was assigned."""
        self.opened: dict[str, int] = {}
        """Highest attempt that the log holds an opening of."""

    # --- the world --------------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        for action in step(self.pool, event, self.now):
            self.do(action)

    def do(self, action: Action) -> None:
        match action:
            case messages.SendTerm(worker):
                self.machines[worker].term = TERM
            case messages.Grant():
                self.grants.append(action)
            case messages.Load(worker, boot, model, epoch):
                machine = self.machines[worker]
                if boot == str(machine.boot) and machine.alive:
                    machine.resident[model] = (epoch, "loading")
            case messages.Unload(worker, _, model, _):
                self.machines[worker].resident.pop(model, None)
            case messages.Assign(request, worker, boot, epoch):
                self.assigned(request, worker, boot, epoch)
            case messages.CancelRunning(request_id, worker, _, status):
                for attempt in [key for key in self.machines[worker].running if key[0] == request_id]:
                    del self.machines[worker].running[attempt]
                    self.finish(request_id, attempt[1], status)
            case messages.End(request, status, _, _):
                assert request.id not in self.ended, "a request ends once"
                self.finish(request.id, request.attempt, status)
            case messages.Recover():
                self.recoveries.append(action)
            case messages.Enqueued() | messages.LeaseMoved():
                pass

    def assigned(self, request: Request, worker: str, boot: str, epoch: int) -> None:
        assert request.id not in self.ended, "what has ended is not begun again"
        known = self.pool.workers[worker]
        assert known.trusted and known.status.boot == boot and known.status.term == TERM
        assert not known.status.stopping
        lease = self.pool.leases[worker, request.model]
        assert lease.epoch == epoch and lease.state == "active"
        assert request.attempt > self.given.get(request.id, 0), "each assignment is an attempt of its own"
        assert request.attempt == self.opened.get(request.id, 1), "an attempt is opened before it is assigned"
        self.given[request.id] = request.attempt
        machine = self.machines[worker]
        if machine.alive and str(machine.boot) == boot:
            machine.running[request.id, request.attempt] = (request.model, epoch)

    def finish(self, request_id: str, attempt: int, status: Status) -> None:
        """The log takes a terminal, if it is the one that decides."""
        if request_id in self.ended or attempt < self.opened.get(request_id, 1):
            return
        self.ended[request_id] = status
        self.later.append(request_id)

    @initialize()
    def begin(self) -> None:
        self.later: list[str] = []
        self.tell(messages.ModelsChanged(dict(MODELS)))
        self.healthy("w1")

    # --- what happens -----------------------------------------------------------------------------------------

    @rule(model=st.sampled_from(sorted(MODELS)), patience=st.integers(50, 60_000))
    def arrive(self, model: str, patience: int) -> None:
        request = Request(f"r{len(self.asked)}", "t", model, self.now, self.now + patience)
        self.asked[request.id] = request
        self.tell(messages.Arrived(request))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        known = st.sampled_from(sorted(self.asked)) if self.asked else st.just("early")
        self.tell(messages.CancelAsked(data.draw(known), "left"))

    @rule(name=st.sampled_from(WORKERS))
    def boot(self, name: str) -> None:
        self.machines[name] = Machine(self.machines[name].boot + 1, alive=True)

    @rule(name=st.sampled_from(WORKERS))
    def healthy(self, name: str) -> None:
        """All that it takes until a worker serves; otherwise few runs would come this far."""
        if not self.machines[name].alive:
            self.boot(name)
        for _ in range(4):
            self.heartbeat(name, stopping=False)
            while self.grants:
                self.grant()
            self.loaded(name, "active")

    @rule(count=st.integers(2, 6), model=st.sampled_from(sorted(MODELS)))
    def rush(self, count: int, model: str) -> None:
        for _ in range(count):
            self.arrive(model, 60_000)

    @rule(name=st.sampled_from(WORKERS))
    def die(self, name: str) -> None:
        machine = self.machines[name]
        machine.alive = False
        machine.running.clear()

    @rule(name=st.sampled_from(WORKERS), stopping=st.sampled_from([False, False, False, True]))
    def heartbeat(self, name: str, stopping: bool) -> None:
        machine = self.machines[name]
        if not machine.alive:
            return
        resident = [Resident(model, epoch, state) for model, (epoch, state) in machine.resident.items()]
        running = [RunningAttempt(key[0], key[1], epoch) for key, (_, epoch) in machine.running.items()]
        self.tell(
            messages.WorkerSeen(
                WorkerStatus(
                    name, str(machine.boot), "default", machine.term, self.now,
                    providers=["p"], resident=resident, running=running, stopping=stopping,
                )
            )
        )  # fmt: skip

    @precondition(lambda self: self.grants)
    @rule()
    def grant(self) -> None:
        granted = self.grants.pop(0)
        self.epoch += 1
        self.tell(messages.LeaseGranted(granted.worker, granted.model, self.epoch))

    @rule(name=st.sampled_from(WORKERS), state=st.sampled_from(["active", "active", "failed"]))
    def loaded(self, name: str, state: str) -> None:
        for model, (epoch, held) in list(self.machines[name].resident.items()):
            if held == "loading":
                self.machines[name].resident[model] = (epoch, state)

    @rule(name=st.sampled_from(WORKERS))
    def complete(self, name: str) -> None:
        machine = self.machines[name]
        if machine.running:
            request_id, attempt = next(iter(machine.running))
            del machine.running[request_id, attempt]
            self.finish(request_id, attempt, Status.COMPLETED)

    @precondition(lambda self: self.later)
    @rule()
    def log_is_read(self) -> None:
        self.tell(messages.Finished(self.later.pop(0)))

    @precondition(lambda self: self.recoveries)
    @rule(empty=st.booleans())
    def recover(self, empty: bool) -> None:
        lost = self.recoveries.pop(0)
        request = lost.running.request
        self.opened[request.id] = request.attempt + 1
        if request.id in self.ended:
            return  # read in the log, past the opening
        if empty and lost.may_retry:
            self.tell(messages.AttemptEmpty(request.id, request.attempt + 1))
        else:
            self.finish(request.id, request.attempt + 1, Status.FAILED)

    @rule(ms=st.sampled_from([50, 500, 3_000, 7_000]))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        self.tell(messages.Tick())

    # --- what always holds ------------------------------------------------------------------------------------

    @invariant()
    def no_more_run_than_a_model_takes(self) -> None:
        for lease in self.pool.leases.values():
            assert len(lease.running) <= MODELS[lease.model].max_concurrency

    @invariant()
    def each_request_is_in_one_place(self) -> None:
        queued = [request_id for queue in self.pool.queues.values() for request_id in queue]
        places = [*queued, *self.pool.running, *self.pool.recovering]
        assert len(places) == len(set(places))
        for request_id in self.asked:
            assert request_id in self.ended or request_id in places, f"{request_id} was lost"

    @invariant()
    def slots_are_held_by_what_runs(self) -> None:
        for place, lease in self.pool.leases.items():
            for request_id in lease.running:
                running = self.pool.running[request_id]
                assert (running.worker, running.request.model) == place

    def teardown(self) -> None:
        """With healthy workers and time, every request comes to its end."""
        for _ in range(400):
            if set(self.asked) <= set(self.ended):
                break
            for name in WORKERS:
                self.healthy(name)
                self.complete(name)
            while self.recoveries:
                self.recover(empty=True)
            while self.later:
                self.log_is_read()
            self.time_passes(500)
        assert set(self.asked) <= set(self.ended), sorted(set(self.asked) - set(self.ended))


World.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPolicy = World.TestCase


def ready(models: dict[str, Model]) -> Pool:
    """A pool with one worker that holds each model."""
    pool = Pool(term=TERM, models=dict(models))
    status = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"])
    for action in step(pool, messages.WorkerSeen(status), 0):
        assert isinstance(action, messages.Grant)
        step(pool, messages.LeaseGranted(action.worker, action.model, 5), 0)
    status.resident = [Resident(model, 5, "active") for model in models]
    step(pool, messages.WorkerSeen(status), 0)
    return pool


def test_first_come_first_served() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    begun = []
    for number in range(4):
        actions = step(pool, messages.Arrived(Request(f"r{number}", "t", "one", 0, 9_999)), 0)
        begun += [action.request.id for action in actions if isinstance(action, messages.Assign)]
    for _ in range(4):
        actions = step(pool, messages.Finished(begun[-1]), 0)
        begun += [action.request.id for action in actions if isinstance(action, messages.Assign)]
    assert begun == ["r0", "r1", "r2", "r3"]


def test_nothing_is_given_to_a_worker_that_does_not_show_our_term() -> None:
    pool = Pool(term=TERM, models=dict(MODELS))
    old = WorkerStatus("w1", "b1", "default", TERM - 1, 0, providers=["p"], resident=[Resident("two", 3, "active")])
    assert step(pool, messages.WorkerSeen(old), 0) == [messages.SendTerm("w1")]
    assert step(pool, messages.Arrived(Request("r", "t", "two", 0, 9_999)), 0) == [
        messages.Enqueued(pool.queue("two")["r"])
    ]


def test_a_cancellation_that_overtakes_its_request_ends_it() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    assert step(pool, messages.CancelAsked("r", "left"), 0) == []
    [end] = step(pool, messages.Arrived(Request("r", "t", "one", 0, 9_999)), 1)
    assert isinstance(end, messages.End) and end.status is Status.CANCELLED


def test_a_full_queue_sheds() -> None:
    pool = Pool(term=TERM, models=dict(MODELS))
    for number in range(policy.MAX_QUEUE):
        step(pool, messages.Arrived(Request(f"r{number}", "t", "two", 0, 9_999)), 0)
    [end] = step(pool, messages.Arrived(Request("over", "t", "two", 0, 9_999)), 0)
    assert isinstance(end, messages.End) and (end.status, end.code) == (Status.REJECTED, "service_unavailable")


def test_a_deadline_ends_what_waits_and_what_runs() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    for name in ("runs", "waits"):
        step(pool, messages.Arrived(Request(name, "t", "one", 0, 500)), 0)
    assert step(pool, messages.Tick(), 500) == []
    waits, runs = step(pool, messages.Tick(), 501)
    assert isinstance(waits, messages.End) and (waits.request.id, waits.status) == ("waits", Status.EXPIRED)
    assert isinstance(runs, messages.CancelRunning) and (runs.request_id, runs.status) == ("runs", Status.EXPIRED)
    assert step(pool, messages.Tick(), 502) == [], "each is told once"
