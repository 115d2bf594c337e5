"""A small world for the scheduling policy: workers with memory, a log, callers; and what must hold after every step.

Nothing here knows how the policy decides. Memory is counted on the machines, not in the policy's books.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from processors.scheduler import messages, policy, wishes
from processors.scheduler.messages import Action, Event
from processors.scheduler.state import Job, LeaseState, Limits, Pool, Request, Running, Stray, Taking
from schemas.control import Model
from schemas.events import Device, Priority, Resident, RunningAttempt, Status, Trainer, WorkerStatus

SIZE = 10
"""Bytes of each machine's device."""
MODELS = {
    "one": Model("one", "p", "t", max_concurrency=1, bytes=6, load_ms=400),
    "two": Model("two", "p", "t", max_concurrency=2, bytes=5, load_ms=200, preload=False),
    "three": Model("three", "p", "t", max_concurrency=2, bytes=4, load_ms=100, preload=False, keep_alive_ms=5_000),
    "pinned": Model("pinned", "p", "t", max_concurrency=1, bytes=1, load_ms=100, preload=False, pinned=True),
    "remote": Model("remote", "q", "t", max_concurrency=2),
}
LIMITS = Limits(max_wait_ms=3_000)
"""So short that models in use have to give way."""
WORKERS = ("w1", "w2")
JOBS = {"small": Job("small", 3, 500), "big": Job("big", 4, 1_000), "there": Job("there", 2, 60_000, device="d")}
TENANTS = ("a", "b", "c")
TRAINS = (LeaseState.REQUESTED, LeaseState.LOADING, LeaseState.ACTIVE)
GONE = ("failed", "ghost")
SHOWN = {"ghost": "unloading"}
_LATER = {
    LeaseState.DRAINING: {LeaseState.DRAINING, LeaseState.RELEASING, LeaseState.QUARANTINED, LeaseState.FAILED},
    LeaseState.RELEASING: {LeaseState.RELEASING, LeaseState.QUARANTINED},
    LeaseState.QUARANTINED: {LeaseState.QUARANTINED},
    LeaseState.FAILED: {LeaseState.FAILED},
}
"""What may follow a state under the same epoch; anything may follow the others."""
_ANY = set(LeaseState)


@dataclass
class Machine:
    """A worker as it really is."""

    boot: int = 0
    alive: bool = False
    paused: bool = False
    """Whether it is stopped, or cut off: it says nothing, and what it is told waits."""
    behind: bool = False
    """Whether it was, and has not read since; it may say how it is before that."""
    inbox: list[tuple[int, Action]] = field(default_factory=list)
    """Commands that it has not read."""
    term: int = 0
    fence: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Providers whose breaker is open."""
    resident: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Model -> (epoch, state); all take memory but failed ones and ghosts: gone, and shown as if they were not."""
    running: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """(request, attempt) -> (model, tokens so far)."""
    trainers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Job -> (epoch, `trains`, `saves` after its notice, or `left`)."""

    def used(self) -> int:
        held = sum(MODELS[model].bytes for model, (_, state) in self.resident.items() if state not in GONE)
        return held + self.trained()

    def trained(self) -> int:
        return sum(JOBS[job].bytes for job, (_, state) in self.trainers.items() if state != "left")


class Broken(AssertionError):
    """Something that must always hold does not."""


def hold(truth: object, what: str, *about: object) -> None:
    """Raise `Broken` unless `truth`; only then is `what` put together with `about`, since it is asked so often."""
    if not truth:
        raise Broken(what.format(*about) if about else what)


class World:
    """The policy's pool, and all that happens around it."""

    def __init__(self) -> None:
        self.term = 7
        self.pool = Pool(term=self.term, limits=LIMITS)
        self.now = 0
        self.epoch = 0
        self.steps = 0
        self.loads = 0
        self.excuses = 0
        """Loads that did not need to serve anybody: after a start, a failure, or for those who then left."""
        self.machines = {name: Machine() for name in WORKERS}
        self.asked: dict[str, Request] = {}
        self.ended: dict[str, Status] = {}
        self.given: dict[str, int] = {}
        self.opened: dict[str, int] = {}
        self.live: set[str] = set()
        self.grants: list[messages.Grant | messages.GrantTraining] = []
        self.jobs: set[str] = set()
        """Jobs that are asked for and not done."""
        self.recoveries: list[messages.Recover] = []
        self.later: list[str] = []
        self.unread: list[str] = []
        """Requests that come again after a take-over: the scheduler before had not committed that it read them."""
        self.left: set[str] = set()
        """Requests whose callers have left."""
        self.reads = False
        """Whether the log is to be read to its end."""
        self.fresh: set[str] = set()
        """Requests that this scheduler gave to a worker, or found there."""
        self.commands: dict[tuple[str, int], Stray] = {}
        """(request, attempt) -> the worker that was told to run it."""
        self._states: dict[tuple[str, str], tuple[int | None, LeaseState]] = {}
        self.tell(messages.ModelsChanged(dict(MODELS)))

    # --- the policy's actions ---------------------------------------------------------------------------------

    def tell(self, event: Event, *, complete: bool = True) -> None:
        """One step of the policy; its actions happen, then everything is checked, unless the pool is still filled."""
        self.steps += 1
        for action in policy.step(self.pool, event, self.now):
            self.do(action)
        if complete:
            self.check()

    def do(self, action: Action) -> None:
        match action:
            case messages.Assign(request, worker, boot, epoch):
                self.may_assign(request, worker, boot, epoch)
                self.fresh.add(request.id)
                self.commands[request.id, request.attempt] = Stray(worker, boot, epoch)
                self.command(worker, replace(action, request=replace(request)))  # as it is now
            case messages.SendTerm() | messages.Load() | messages.Unload() | messages.CancelRunning():
                self.command(action.worker, action)
            case messages.BeginTraining():
                self.command(action.worker, action)
            case messages.NoticeTraining(worker, _, job, _, by_ms):
                hold(by_ms >= self.now + min(JOBS[job].notice_ms, LIMITS.max_wait_ms // 2), "a notice is too short")
                self.command(worker, action)
            case messages.Grant() | messages.GrantTraining():
                self.grants.append(action)
            case messages.End(request, status, _, _):
                unread = self.pool.taking is not Taking.TAKEN and request.id in self.later
                hold(request.id not in self.ended or unread, "a request ends twice")
                self.finish(request.id, request.attempt, status)
            case messages.Recover():
                self.recoveries.append(action)
            case messages.ReadLog():
                self.reads = True
            case messages.Adopt(request):
                self.fresh.add(request.id)
            case messages.Enqueued() | messages.LeaseMoved() | messages.TrainingMoved():
                pass

    def command(self, worker: str, action: Action) -> None:
        """A worker reads its commands in order, at once unless it was held up."""
        machine = self.machines[worker]
        if machine.alive:
            machine.inbox.append((self.term, action))
            if not machine.behind:
                self.read(worker)

    def read(self, name: str) -> None:
        """A worker reads what it was told."""
        machine = self.machines[name]
        if not machine.paused:
            machine.behind = False
            while machine.inbox:
                self.obey(machine, *machine.inbox.pop(0))

    def obey(self, machine: Machine, term: int, action: Action) -> None:
        match action:
            case messages.SendTerm(_, fence):
                machine.fence = max(fence, machine.fence) if term == machine.term else fence
                machine.term = term
            case messages.Load(_, boot, model, epoch, device) if boot == str(machine.boot):
                self.load(machine, model, epoch, device)
            case messages.Unload(_, boot, model, epoch) if boot == str(machine.boot):
                if machine.resident.get(model, (0, ""))[0] == epoch:
                    hold(not any(held == model for held, _ in machine.running.values()), "a model in use is unloaded")
                    hold(not MODELS[model].pinned, "a pinned model is unloaded")
                    machine.resident[model] = (epoch, "unloading")
            case messages.Assign(request, _, boot, epoch) if boot == str(machine.boot):
                if machine.resident.get(request.model) == (epoch, "active"):
                    machine.running[request.id, request.attempt] = (request.model, 0)
                else:
                    self.finish(request.id, request.attempt, Status.FAILED)
            case messages.BeginTraining(_, boot, job, epoch, _, size) if boot == str(machine.boot):
                last, state = machine.trainers.get(job, (-1, "left"))
                hold(epoch > last and state == "left", "a job trains twice on a worker")
                hold(size == JOBS[job].bytes, "a job has what it asked for")
                machine.trainers[job] = (epoch, "trains")
                hold(machine.used() <= SIZE, "oversold: {}, {}", machine.resident, machine.trainers)
            case messages.NoticeTraining(_, boot, job, epoch) if boot == str(machine.boot):
                if machine.trainers.get(job) == (epoch, "trains"):
                    machine.trainers[job] = (epoch, "saves")
            case messages.CancelRunning(request_id, _, _, status):
                wished = request_id in self.left or status is Status.EXPIRED
                hold(wished or request_id not in self.unread, "what is asked for again is ended")
                for attempt in [key for key in machine.running if key[0] == request_id]:
                    del machine.running[attempt]
                    self.finish(request_id, attempt[1], status)

    def load(self, machine: Machine, model: str, epoch: int, device: str) -> None:
        hold(epoch > machine.resident.get(model, (-1, ""))[0], "an epoch does not grow")
        hold(bool(device) == bool(MODELS[model].bytes), "memory is granted on a device")
        machine.resident[model] = (epoch, "loading")
        self.loads += 1
        hold(machine.used() <= SIZE, "oversold: {}", machine.resident)

    def may_assign(self, request: Request, worker: str, boot: str, epoch: int) -> None:
        hold(request.id not in self.ended, "what has ended is begun again")
        known = self.pool.workers[worker]
        hold(
            known.trusted and known.status.boot == boot and known.status.term == self.term,
            "an untrusted worker is used",
        )
        hold(not known.status.stopping, "a stopping worker is used")
        hold(MODELS[request.model].provider not in known.status.broken, "a broken provider is used")
        lease = self.pool.leases[worker, request.model]
        hold(lease.epoch == epoch and lease.state is LeaseState.ACTIVE, "a lease that is not active is used")
        hold(request.attempt > self.given.get(request.id, 0), "an attempt is given twice {}", request.id)
        hold(request.attempt == self.opened.get(request.id, 1), "an attempt is assigned before it is opened")
        self.given[request.id] = request.attempt

    def finish(self, request_id: str, attempt: int, status: Status) -> None:
        """The log takes a terminal, if it is the one that decides."""
        if request_id in self.ended or attempt < self.opened.get(request_id, 1):
            return
        self.ended[request_id] = status
        self.excuses += status is not Status.COMPLETED
        self.live.discard(request_id)
        self.later.append(request_id)

    # --- what happens -----------------------------------------------------------------------------------------

    def arrive(self, model: str, patience_ms: int, tenant: str = "a", priority: Priority = Priority.STANDARD) -> None:
        request = Request(
            f"r{len(self.asked)}", tenant, model, self.now, self.now + patience_ms, priority=priority, prompt_tokens=5
        )
        self.asked[request.id] = request
        self.live.add(request.id)
        self.tell(messages.Arrived(request))

    def cancel(self, request_id: str) -> None:
        self.left.add(request_id)
        asked = self.asked.get(request_id)
        self.tell(messages.CancelAsked(request_id, "left", asked.tenant if asked is not None else "a"))

    def boot(self, name: str) -> None:
        self.excuses += 4 * len(MODELS)
        self.machines[name] = Machine(self.machines[name].boot + 1, alive=True)

    def die(self, name: str) -> None:
        machine = self.machines[name]
        machine.alive = False
        machine.running.clear()
        machine.trainers.clear()

    def stop(self, name: str) -> None:
        """A worker stops in order: it ends what it runs without terminals, says so, and is gone."""
        machine = self.machines[name]
        if machine.alive and not machine.paused:
            self.die(name)
            self.tell(
                messages.WorkerSeen(
                    WorkerStatus(
                        name, str(machine.boot), "default", machine.term, self.now, [], stopping=True, left=True
                    )
                )
            )

    def train(self, job: str) -> None:
        """A job is asked for."""
        self.jobs.add(job)
        self.excuses += len(MODELS)  # it may take the place of models that nobody asks for, which are loaded again
        self.tell(messages.TrainingAsked(JOBS[job]))

    def end_training(self, job: str) -> None:
        """A job is done, or given up."""
        self.jobs.discard(job)
        self.tell(messages.TrainingDone(job))

    def leave(self, name: str) -> None:
        """Trainers that were given notice have written their checkpoints and are gone."""
        machine = self.machines[name]
        for job, (epoch, state) in machine.trainers.items():
            if state == "saves" and not machine.paused:
                machine.trainers[job] = (epoch, "left")

    def pause(self, name: str) -> None:
        """A worker is stopped, or cut off from the brokers."""
        self.machines[name].paused = self.machines[name].behind = True

    def resume(self, name: str) -> None:
        """It goes on where it was."""
        self.machines[name].paused = False

    def breaker(self, name: str, provider: str, *, is_open: bool) -> None:
        """A provider's breaker opens or closes on a worker; the next heartbeat tells."""
        self.machines[name].broken = {provider: "it does not answer"} if is_open else {}

    def heartbeat(self, name: str, *, stopping: bool = False) -> None:
        machine = self.machines[name]
        if not machine.alive or machine.paused:
            return
        resident = [
            Resident(
                model, epoch, "unloading" if state == "ghost" else state, device="d" if MODELS[model].bytes else ""
            )
            for model, (epoch, state) in machine.resident.items()
        ]
        running = [
            RunningAttempt(
                key[0],
                key[1],
                machine.resident[model][0],
                tokens,
                goes_on=tokens > 0 and self.asked[key[0]].tenant != "c",
            )
            for key, (model, tokens) in machine.running.items()
        ]
        status = WorkerStatus(
            name, str(machine.boot), "default", machine.term, self.now, providers=["p", "q"],
            resident=resident, running=running, stopping=stopping,
            devices=[Device("d", SIZE, ["p"])], fence=machine.fence, broken=machine.broken,
            trainers=[
                Trainer(job, epoch, "d", JOBS[job].bytes, JOBS[job].notice_ms, left=state == "left")
                for job, (epoch, state) in machine.trainers.items()
            ],
        )  # fmt: skip
        self.tell(messages.WorkerSeen(status))

    def grant(self) -> None:
        """The oldest grant is durable."""
        if self.grants:
            granted = self.grants.pop(0)
            self.epoch += 1
            if isinstance(granted, messages.GrantTraining):
                self.tell(messages.TrainingGranted(granted.worker, granted.job, self.epoch))
            else:
                self.tell(messages.LeaseGranted(granted.worker, granted.boot, granted.model, self.epoch))

    def settle(self, name: str, state: str = "active") -> None:
        """Loads end in `state`, unloads have freed their memory."""
        machine = self.machines[name]
        if machine.paused:
            return
        for model, (epoch, held) in list(machine.resident.items()):
            if held == "loading":
                self.excuses += state == "failed"
                machine.resident[model] = (epoch, state)
            elif held in ("unloading", "ghost"):
                del machine.resident[model]

    def generate(self, name: str) -> None:
        running = {} if self.machines[name].paused else self.machines[name].running
        for key, (model, tokens) in running.items():
            running[key] = (model, tokens + 3)

    def complete(self, name: str) -> None:
        machine = self.machines[name]
        if machine.running and not machine.paused:
            request_id, attempt = next(iter(machine.running))
            del machine.running[request_id, attempt]
            self.finish(request_id, attempt, Status.COMPLETED)

    def read_log(self) -> None:
        if self.later:
            self.tell(messages.Finished(self.later.pop(0), 5, 7))
        elif self.reads:
            self.reads = False
            self.tell(messages.LogRead())

    def read_again(self) -> None:
        """Requests that the scheduler before had read come again."""
        while self.unread:
            request_id = self.unread.pop()
            if request_id in self.live or request_id in self.later:
                self._inherit(request_id, complete=True)

    def _inherit(self, request_id: str, *, complete: bool) -> None:
        """A request of which nothing says that it was given to a worker."""
        attempt = self.opened.get(request_id, 1)
        again = replace(self.asked[request_id], attempt=attempt, opened_before=attempt > 1)
        self.asked[request_id] = again
        self.tell(messages.Arrived(again), complete=complete)

    def recover(self, *, empty: bool) -> None:
        if not self.recoveries:
            return
        lost = self.recoveries.pop(0)
        request = lost.running.request
        self.excuses += 1
        attempt = self.open(request.id, request.attempt)
        if request.id in self.ended:
            return  # read in the log, past the opening
        if lost.reason or (empty and lost.may_retry):
            self.tell(messages.AttemptReady(request.id, attempt))
        else:
            self.finish(request.id, attempt, Status.FAILED)

    def open(self, request_id: str, attempt: int) -> int:
        """The log takes the opening of the next attempt; returns which one that is."""
        self.opened[request_id] = max(self.opened.get(request_id, 1), attempt) + 1
        return self.opened[request_id]

    def wish(self, model: str, kind: str) -> None:
        """An operator asks for a model to be loaded or unloaded; either may cost a load that serves nobody."""
        self.excuses += 2 * len(WORKERS)
        if kind == "load":
            self.tell(messages.LoadAsked(model, self.now + 10_000))
        else:
            self.tell(messages.UnloadAsked(model, "an operator"))

    def release(self, name: str, model: str) -> None:
        """An operator saw that what is to be unloaded is gone, though the worker does not, and says so."""
        machine = self.machines[name]
        if machine.resident.get(model, (0, ""))[1] == "unloading":
            machine.resident[model] = (machine.resident[model][0], "ghost")
            self.pass_time(31_000)
            self.heartbeat(name)
            self.tell(messages.ReleaseAsked(name, model, "an operator"))

    def pass_time(self, ms: int) -> None:
        """Time passes, of which the policy is told as often as in production, or nearly so."""
        end = self.now + ms
        if ms > policy.DEAF_MS or end - self.pool.taken_ms > policy.STRAYS_MS // 2:
            self.read_again()
        while self.now < end:
            self.now = min(end, self.now + policy.DEAF_MS)
            self.tell(messages.Tick())
            self.check_training()

    def take_over(self) -> None:
        """Another scheduler takes the pool: it knows what lives, and learns from heartbeats what is held.

        The one before it may have opened attempts that it had no time to give to a worker, and given attempts to
        workers that it had no time to write down.
        """
        for lost in self.recoveries[::2]:
            self.open(lost.running.request.id, lost.running.request.attempt)
        old, self.term = self.pool, self.term + 1
        self.pool = Pool(
            term=self.term, taking=Taking.WAITING, taken_ms=self.now, limits=LIMITS, given=dict(self.commands)
        )
        self.grants, self.recoveries, self._states, self.reads = [], [], {}, False
        # Whether only a worker could tell that it has a request: so it is with every second that was just given.
        unwritten = {one for one in self.fresh & old.running.keys() if int(one[1:]) % 2 == 0}
        self.fresh = set()
        self.excuses += 2 * len(MODELS)
        wishes.restore(self.pool, wishes.kept(old, 0))
        for job in sorted(self.jobs):
            self.tell(messages.TrainingAsked(JOBS[job]), complete=False)
        self.tell(messages.ModelsChanged(dict(MODELS)), complete=False)
        for request_id in sorted(self.live):
            request = self.asked[request_id] = replace(self.asked[request_id])
            known = old.running.get(request_id) or old.recovering.get(request_id)
            if request_id in self.unread or request_id in unwritten:
                if request_id not in self.unread:
                    self.unread.append(request_id)
            elif known is None:
                self._inherit(request_id, complete=False)
            else:
                again = Running(request, known.worker, known.boot, known.epoch, self.now)
                self.tell(messages.Restored(again), complete=False)
                self.tell(messages.Superseded(request_id, self.opened.get(request_id, 1)), complete=False)
        for name in WORKERS:
            self.heartbeat(name)
        self.tell(messages.Heard())

    def healthy(self, name: str) -> None:
        """All that it takes until a worker serves."""
        if not self.machines[name].alive:
            self.boot(name)
        self.resume(name)
        self.read(name)
        self.machines[name].broken = {}
        for _ in range(3):
            self.heartbeat(name)
            while self.grants:
                self.grant()
            self.settle(name)
            self.leave(name)
        self.heartbeat(name)

    # --- what always holds ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `Broken` where an invariant does not hold."""
        pool = self.pool
        for place, lease in pool.leases.items():
            hold(len(lease.running) <= MODELS[lease.model].max_concurrency, "more run than a model takes")
            for request_id in lease.running:
                running = pool.running[request_id]
                hold((running.worker, running.request.model) == place, "a slot is held by what runs elsewhere")
            epoch, state = self._states.get(place, (None, LeaseState.REQUESTED))
            if epoch is not None and epoch == lease.epoch:
                hold(lease.state in _LATER.get(state, _ANY), "{} became {}", state, lease.state)
            elif epoch is not None and lease.epoch is not None:
                hold(lease.epoch > epoch, "an epoch does not grow")
        # A lease that was lost with its worker may be found again where it is still held.
        self._states = {place: (lease.epoch, lease.state) for place, lease in pool.leases.items()}
        granted = dict.fromkeys(WORKERS, 0)
        for lease in pool.leases.values():
            granted[lease.worker] += lease.holds
        for trainer in pool.trainers.values():
            granted[trainer.worker] += trainer.bytes
        for name, held in granted.items():
            hold(held <= SIZE, "{} is granted {} of {} bytes", name, held, SIZE)
        waiting = sum(len(queue) for queue in pool.queues.values())
        for request_id in self.live:
            request = self.asked[request_id]
            places = (request_id in pool.queues.get(request.model, ())) + (request_id in pool.running)
            places += request_id in pool.recovering
            hold(places == 1 - (request_id in self.unread), "{} is in {} places", request_id, places)
        hold(waiting <= len(self.live | set(self.later)), "what has ended waits")
        for model, queue in pool.queues.items():
            known = [
                w.status for w in pool.workers.values() if w.usable and MODELS[model].provider in w.status.providers
            ]
            hopeless = bool(known) and all(MODELS[model].provider in status.broken for status in known)
            hopeless = hopeless and pool.taking is Taking.TAKEN  # Until then nothing is decided.
            hold(not (queue and hopeless), "{} is waited for, and its provider is broken everywhere", model)
        hold(self.loads <= 2 * len(self.asked) + self.excuses, "{} loads for {} requests", self.loads, len(self.asked))

    def check_training(self) -> None:
        """Nobody waits for longer than W_max while jobs train where the model would fit. Raises `Broken` otherwise."""
        pool = self.pool
        if pool.taking is not Taking.TAKEN:
            return
        for lease in pool.trainers.values():
            late = lease.state is LeaseState.DRAINING and lease.epoch is not None and self.now > lease.by_ms
            hold(not late, "a job stays after its notice, and its bytes are counted on")
        without = [
            model for model, queue in pool.queues.items() if queue and MODELS[model].bytes and not pool.of_model(model)
        ]
        if len(without) != 1:  # Others may have been promised what is seen as free.
            return
        [model], oldest = without, pool.queue(without[0]).oldest(batch=False)
        if oldest is None or any(lease.state is LeaseState.DRAINING for lease in pool.trainers.values()):
            return
        for name, worker in pool.workers.items():
            since_ms = max(oldest.waiting_ms, pool.ready_ms.get(model, 0))
            if worker.offers("p") and self.now - since_ms > LIMITS.max_wait_ms:
                free = SIZE - sum(lease.holds for lease in pool.leases.values() if lease.worker == name)
                trainers = [lease for lease in pool.trainers.values() if lease.worker == name]
                free -= sum(lease.bytes for lease in trainers)
                train = sum(lease.bytes for lease in trainers if lease.state in TRAINS)
                hold(not train or free + train < MODELS[model].bytes, f"{model} waits, and jobs train in its place")

    def finish_all(self) -> None:
        """With healthy workers every request comes to its end within about a minute. Raises `Broken` otherwise."""
        for _ in range(60 + 2 * len(self.live)):
            if not self.live:
                return self.check_books()
            for name in WORKERS:
                self.healthy(name)
                self.complete(name)
            while self.recoveries:
                self.recover(empty=True)
            self.read_again()
            while self.later or self.reads:
                self.read_log()
            self.pass_time(500)
        raise Broken(f"never ended: {sorted(self.live)}")

    def check_books(self) -> None:
        """When all is quiet, what the policy counts as held is what the machines hold. Raises `Broken` otherwise.

        What trains goes on until its job is done, and then leaves.
        """
        for name in WORKERS:
            self.healthy(name)
        held_by = {
            name: {job for job, (_, state) in m.trainers.items() if state != "left"}
            for name, m in self.machines.items()
        }
        hold(all(held <= self.jobs for held in held_by.values()), f"jobs that are done train: {held_by}")
        for job in sorted(self.jobs):
            self.end_training(job)
        for name in WORKERS:
            self.healthy(name)
        hold(not self.pool.trainers, f"jobs that are done hold memory: {self.pool.trainers}")
        for name, machine in self.machines.items():
            self.settle(name, "failed")
            self.heartbeat(name)
            self.heartbeat(name)  # the first may only have shown the worker a new term
            if machine.alive:
                held = sum(lease.holds for lease in self.pool.leases.values() if lease.worker == name)
                asked = sum(
                    lease.bytes for lease in self.pool.leases.values() if (lease.worker, lease.epoch) == (name, None)
                )
                hold(held - asked == machine.used(), f"{name} holds {machine.used()} bytes, not {held - asked}")
