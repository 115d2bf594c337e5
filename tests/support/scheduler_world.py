"""A small world for the scheduling policy: workers with memory, a log, callers; and what must hold after every step.

Nothing here knows how the policy decides. Memory is counted on the machines, not in the policy's books.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from msgspec import structs

from processors.scheduler import messages, policy, wishes
from processors.scheduler.abandoned import ABANDONED, Ingresses
from processors.scheduler.messages import Action, Event
from processors.scheduler.revoked import REVOKED, is_revoked, name_of
from processors.scheduler.state import LeaseState, Limits, Pool, Request, Running, Stray, Taking
from schemas.control import App, Key, Model
from schemas.events import (
    NO_EPOCH,
    BodyRef,
    Device,
    IngressStatus,
    Priority,
    Resident,
    Routed,
    RunningAttempt,
    ServerHeld,
    Status,
    Trainer,
    WorkerStatus,
)
from tests.support import scheduler_laws as laws
from tests.support.scheduler_machines import (
    GONE,
    JOBS,
    LOOK_MS,
    MODELS,
    SERVED,
    SIZE,
    WORKERS,
    Broken,
    Held,
    Lies,
    Machine,
    Server,
    Told,
    device_of,
    hold,
)

LIMITS = Limits(max_wait_ms=3_000)
"""So short that models in use have to give way."""
TENANTS = ("a", "b", "c")
INGRESSES = ("i1", "i2")
SHOWN = {"ghost": "unloading"}
LEFT = "left"
"""Why a request is to end whose caller has left."""
NEVER = Held(NO_EPOCH, "")
_LATER = {
    LeaseState.DRAINING: {LeaseState.DRAINING, LeaseState.RELEASING, LeaseState.QUARANTINED, LeaseState.FAILED},
    LeaseState.RELEASING: {LeaseState.RELEASING, LeaseState.QUARANTINED},
    LeaseState.QUARANTINED: {LeaseState.QUARANTINED},
    LeaseState.FAILED: {LeaseState.FAILED},
}
"""What may follow a state under the same epoch; anything may follow the others."""
_ANY = set(LeaseState)


@dataclass(frozen=True, slots=True)
class Promise:
    """What was granted under an epoch, and what was known then of the memory that it is of."""

    bytes: int
    told: Told
    step: int


def granted_to(grant: messages.Grant | messages.GrantTraining) -> tuple[str, str]:
    """Whom, and for which model or job."""
    return grant.worker, grant.job if isinstance(grant, messages.GrantTraining) else grant.model


class World:
    """The policy's pool, and all that happens around it."""

    def __init__(self, *, server: bool = False) -> None:
        """Two workers, and a `server` that both use, or none."""
        self.term = 7
        self.server = Server() if server else None
        self.models: dict[str, Model] = MODELS | (SERVED if server else {})
        """The pool's models as the registry has them: those that are enabled."""
        self.names = sorted(self.models)
        """All that there ever were."""
        self.removed: dict[str, Model] = {}
        """Models that are disabled or deleted, as they were."""
        self.deleted: set[str] = set()
        """Those of them that workers know no more."""
        self.widest = {id: model.max_concurrency for id, model in self.models.items()}
        """Model -> the most slots that it ever had."""
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
        self.asked_for: dict[tuple[str, str], Promise] = {}
        """By (worker, model or job)."""
        self.promises: dict[int, Promise] = {}
        """By epoch."""
        self.sizes: dict[int, int] = {}
        """Epoch -> bytes of the model, as the command to load it has them."""
        self.jobs: set[str] = set()
        """Jobs that are asked for and not done."""
        self.recoveries: list[messages.Recover] = []
        self.later: list[str] = []
        self.unread: list[str] = []
        """Requests that come again after a take-over: the scheduler before had not committed that it read them."""
        self.left: dict[str, str] = {}
        """Request -> why it is to end: its caller has left, or may not have an answer, or cannot."""
        self.barred: set[str] = set()
        """Those that this scheduler was told of."""
        self.routed: dict[str, Routed] = {}
        self.apps = {tenant: App(tenant, tenant) for tenant in TENANTS}
        self.keys = dict.fromkeys(TENANTS, 0)
        """Tenant -> the number of the key that it uses."""
        self.revoked: set[str] = set()
        """Ids of keys."""
        self.ingresses = dict.fromkeys(INGRESSES, 1)
        """Ingress -> its boot; negative when that is gone."""
        self.heard = Ingresses()
        """What the scheduler knows of them."""
        self.parked: set[str] = set()
        """Models that an operator had unloaded and that nobody has asked for since."""
        self.released: dict[tuple[str, str], int] = {}
        """(worker, model) -> epoch of what an operator has said to be free and its worker still shows."""
        self.others = 0
        """How often others have loaded something into the server."""
        self.reads = False
        """Whether the log is to be read to its end."""
        self.fresh: set[str] = set()
        """Requests that this scheduler gave to a worker, or found there."""
        self.commands: dict[tuple[str, int], Stray] = {}
        """(request, attempt) -> the worker that was told to run it."""
        self._states: dict[tuple[str, str], tuple[int | None, LeaseState]] = {}
        self.tell(messages.ModelsChanged(dict(self.models)))

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
            case messages.Load(worker, _, model, epoch):
                hold(model in self.models, "a model that was removed is loaded")
                self.sizes[epoch] = self.models[model].bytes
                self.command(worker, action)
            case messages.SendTerm() | messages.Unload() | messages.CancelRunning():
                self.command(action.worker, action)
            case messages.BeginTraining():
                self.command(action.worker, action)
            case messages.NoticeTraining(worker, _, job, _, by_ms):
                hold(by_ms >= self.now + min(JOBS[job].notice_ms, LIMITS.max_wait_ms // 2), "a notice is too short")
                self.command(worker, action)
            case messages.Grant() | messages.GrantTraining():
                laws.may_grant(self, action)
                self.grants.append(action)
                told = self.told(action.worker, action.device)
                self.asked_for[granted_to(action)] = Promise(action.bytes, told, self.steps)
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
            case messages.LeaseMoved(_, _, model, _, "draining"):
                hold(model not in self.models or not self.models[model].pinned, "a pinned model is drained")
            case messages.Enqueued() | messages.LeaseMoved() | messages.TrainingMoved():
                pass

    def told(self, worker: str, device: str) -> Told:
        """What the scheduler was told of a device."""
        if device == "s" and self.server is not None:
            shown = [self.machines[name].shown for name in self.pool.workers]
            return Told(self.server.size, frozenset(name for held in shown for name in held))
        return Told(self.machines[worker].told)

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
        if machine.alive and not machine.paused:
            machine.behind = False
            while machine.inbox:
                self.obey(name, *machine.inbox.pop(0))

    def obey(self, name: str, term: int, action: Action) -> None:
        machine = self.machines[name]
        match action:
            case messages.SendTerm(_, fence):
                machine.fence = max(fence, machine.fence) if term == machine.term else fence
                machine.term = term
            case messages.Load(_, boot, model, epoch, device) if boot == str(machine.boot):
                self.load(name, model, epoch, device)
            case messages.Unload(_, boot, model, epoch) if boot == str(machine.boot):
                self.unload(machine, model, epoch)
            case messages.Assign(request, _, boot, epoch) if boot == str(machine.boot):
                if machine.resident.get(request.model, NEVER)[:2] == (epoch, "active"):
                    machine.running[request.id, request.attempt] = (request.model, 0)
                else:
                    self.finish(request.id, request.attempt, Status.FAILED)
            case messages.BeginTraining(_, boot, job, epoch, _, size) if boot == str(machine.boot):
                last, state = machine.trainers.get(job, (-1, "left"))
                hold(epoch > last and state == "left", "a job trains twice on a worker")
                hold(size == JOBS[job].bytes, "a job has what it asked for")
                machine.trainers[job] = (epoch, "trains")
                self.check_sold(machine)
            case messages.NoticeTraining(_, boot, job, epoch) if boot == str(machine.boot):
                if machine.trainers.get(job) == (epoch, "trains"):
                    machine.trainers[job] = (epoch, "saves")
            case messages.CancelRunning(request_id, _, _, status, number):
                wished = request_id in self.left or status is Status.EXPIRED
                for attempt in [key for key in machine.running if key[0] == request_id and number in (0, key[1])]:
                    void = attempt[1] < self.opened.get(request_id, 1)
                    hold(wished or void or request_id not in self.unread, "what is asked for again is ended")
                    del machine.running[attempt]
                    self.finish(request_id, attempt[1], status)

    def load(self, name: str, model: str, epoch: int, device: str) -> None:
        """A worker begins to load; it looks first whether so much is free in fact."""
        machine = self.machines[name]
        hold(epoch > machine.resident.get(model, NEVER).epoch, "an epoch does not grow")
        hold(device == device_of(model), "a model is loaded on another device")
        self.loads += 1
        machine.resident[model] = held = Held(epoch, "loading", self.sizes[epoch], self.promises[epoch].bytes)
        if device == "d":
            self.check_sold(machine)
            fits = machine.used() <= machine.size
        else:
            fits = not device or self.load_into_server(name, model, held)
        if not fits:
            self.excuses += 1
            machine.resident[model] = held._replace(state="failed")

    def check_sold(self, machine: Machine) -> None:
        """What was granted fits into what the device had, as far as the scheduler could know. Raises `Broken`."""
        most = max((self.promises[epoch] for epoch in machine.epochs()), key=lambda one: one.step).told.bytes
        hold(machine.sold() <= most, "oversold: {}, {} of {}", machine.resident, machine.trainers, most)

    def load_into_server(self, name: str, model: str, held: Held) -> bool:
        """A server begins to load a model, unless that lies there already; whether there is room for it."""
        machine, server = self.machines[name], self.server
        assert server is not None
        if model in machine.clearing:
            self.clear(machine, model)
        if model in server.lies:
            lies = server.lies[model]
            lies.by, lies.told = (name, machine.boot), True
            machine.resident[model] = held._replace(bytes=lies.bytes)
            return True
        promises = [
            self.promises[one.epoch]
            for machine in self.machines.values()
            for id, one in machine.resident.items()
            if machine.alive and one.state not in GONE and device_of(id) == "s"
        ]
        told = max(promises, key=lambda one: one.step).told
        lease = self.pool.leases.get((name, model))
        late = lease is None or lease.epoch != held.epoch  # Nobody knows that this command is still to be read.
        known = [id for id, one in server.lies.items() if (one.by is not None and one.told) or id in told.others]
        fits = server.used(known) + min(held.bytes, held.granted) <= told.bytes
        hold(fits or late, "a server is oversold: {}", server.lies)
        if server.used() + held.bytes > server.size:
            return False
        server.lies[model] = Lies(held.bytes, (name, machine.boot), self.now + self.load_ms(model), told=not late)
        return True

    def load_ms(self, model: str) -> int:
        return (self.models.get(model) or self.removed[model]).load_ms

    def unload(self, machine: Machine, model: str, epoch: int) -> None:
        """A worker begins to unload; what a server holds under no lease is not among what it has."""
        held = machine.resident.get(model)
        if held is None and epoch == NO_EPOCH and model not in self.deleted:
            machine.clearing.add(model)
        elif held is not None and held.epoch == epoch:
            hold(not any(used == model for used, _ in machine.running.values()), "a model in use is unloaded")
            machine.resident[model] = held._replace(state="ghost" if held.state in GONE else "unloading")

    def clear(self, machine: Machine, model: str) -> None:
        """A worker has a server unload a model; one that another worker uses is loaded again for it at once."""
        machine.clearing.discard(model)
        in_use = any(
            other is not machine and other.alive and other.resident.get(model, NEVER).state in ("loading", "active")
            for other in self.machines.values()
        )
        if self.server is not None and not in_use:
            self.server.lies.pop(model, None)
            self.look(machine)

    def look(self, machine: Machine) -> None:
        """A worker asks its server what it holds."""
        if self.server is not None:
            machine.saw, machine.looked_ms = self.server.seen(self.now), self.now

    def may_assign(self, request: Request, worker: str, boot: str, epoch: int) -> None:
        hold(request.id not in self.ended, "what has ended is begun again")
        known = self.pool.workers[worker]
        hold(
            known.trusted and known.status.boot == boot and known.status.term == self.term,
            "an untrusted worker is used",
        )
        hold(not known.status.stopping, "a stopping worker is used")
        hold(request.model in self.models, "a model that was removed is used")
        model = self.models[request.model]
        hold(model.provider not in self.machines[worker].told_broken, "a broken provider is used")
        hold(request.id not in self.barred, "what nobody wants any more is begun")
        lease = self.pool.leases[worker, request.model]
        hold(len(lease.running) <= model.max_concurrency, "more is given to a model than it takes")
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
        """Somebody who may asks for a model, of an ingress that is there."""
        there = [f"{name}/{boot}" for name, boot in self.ingresses.items() if boot > 0]
        if not there or not self.apps[tenant].enabled:
            return
        number = len(self.asked)
        request = Request(
            f"r{number}", tenant, model, self.now, self.now + patience_ms, priority=priority, prompt_tokens=5
        )
        self.routed[request.id] = Routed(
            request.id, tenant, f"{tenant}{self.keys[tenant]}", model, model, "default", 0, BodyRef(0, 0),
            resume_s=1 + number % 5, ingress=there[number % len(there)],
        )  # fmt: skip
        self.asked[request.id] = request
        self.live.add(request.id)
        self.tell(messages.Arrived(request))

    def cancel(self, request_id: str, reason: str = LEFT) -> None:
        """A request is to end."""
        self.left.setdefault(request_id, reason)
        self.barred.add(request_id)
        asked = self.asked.get(request_id)
        self.tell(messages.CancelAsked(request_id, reason, asked.tenant if asked is not None else "a"))
        waits = asked is not None and request_id in self.pool.queues.get(asked.model, ())
        hold(not waits, "{} is to end, and waits on", request_id)

    def revoke(self, tenant: str, *, app: bool) -> None:
        """A tenant's key is revoked, for which it has another one, or its whole app is disabled or enabled again."""
        if app:
            self.apps[tenant] = App(tenant, tenant, enabled=not self.apps[tenant].enabled)
        else:
            self.revoked.add(f"{tenant}{self.keys[tenant]}")
            self.keys[tenant] += 1
        self.look_after_callers()

    def lose_ingress(self, name: str) -> None:
        """An ingress dies."""
        self.ingresses[name] = -abs(self.ingresses[name])

    def boot_ingress(self, name: str) -> None:
        """An ingress starts anew, in the place of the one that there was."""
        self.ingresses[name] = abs(self.ingresses[name]) + 1

    def look_after_callers(self) -> None:
        """End what nobody may have any more, and what nobody will have, as the scheduler's role does now and then."""
        held = [self.routed[id] for id in sorted(self.live.union(self.later).difference(self.unread, self.barred))]
        if self.revoked or not all(app.enabled for app in self.apps.values()):
            found = {
                name_of(one): Key(one.key_id, "", one.key_id, one.tenant, enabled=one.key_id not in self.revoked)
                for one in held
            }
            for one in held:
                if is_revoked(one, found, self.apps):
                    self.cancel(one.request_id, REVOKED)
        for one in self.heard.abandoned(held, self.now):
            if one.request_id not in self.barred:
                self.cancel(one.request_id, ABANDONED)

    def boot(self, name: str) -> None:
        self.excuses += 4 * len(MODELS)
        self.machines[name] = self.machines[name].next()

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
            self.tell(messages.WorkerSeen(self.status(name, stopping=True, left=True)))

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
        machine = self.machines[name]
        self.excuses += len(self.names)  # its models may be loaded elsewhere, and here again
        broken = {provider: "it does not answer"} if is_open else {}
        machine.broken = {one: why for one, why in machine.broken.items() if one != provider} | broken

    def resize(self, name: str, size: int) -> None:
        """Others take memory of a device, or give it back."""
        self.excuses += len(self.names)
        self.machines[name].size = size

    def fall_off(self, name: str) -> None:
        """A device is gone from its bus: engines and trainers on it die, and what they ran fails."""
        machine = self.machines[name]
        self.resize(name, 0)
        for key, (model, _) in list(machine.running.items()):
            if device_of(model) == "d":
                del machine.running[key]
                self.finish(*key, Status.FAILED)
        for model, held in machine.resident.items():
            if device_of(model) == "d" and held.state == "active":
                machine.resident[model] = held._replace(state="loading")  # under the same lease
        machine.trainers = {job: (epoch, "left") for job, (epoch, _) in machine.trainers.items()}

    def heartbeat(self, name: str, *, stopping: bool = False) -> None:
        machine = self.machines[name]
        if not machine.alive or machine.paused:
            return
        if self.now - machine.looked_ms >= LOOK_MS:
            self.look(machine)
        machine.told, machine.told_broken, machine.shown = machine.size, machine.broken, machine.saw
        self.tell(messages.WorkerSeen(self.status(name, stopping=stopping)))
        if self.server is not None and self.pool.workers[name].trusted:
            for model, lies in self.server.lies.items():
                lies.told |= model in machine.resident

    def status(self, name: str, *, stopping: bool = False, left: bool = False) -> WorkerStatus:
        """How a worker says that it is."""
        machine = self.machines[name]
        resident = [
            Resident(
                model, held.epoch, SHOWN.get(held.state, held.state),
                held.bytes if held.state != "failed" else 0, device=device_of(model),
            )
            for model, held in machine.resident.items()
        ]  # fmt: skip
        running = [
            RunningAttempt(
                key[0],
                key[1],
                machine.resident[model].epoch,
                tokens,
                goes_on=tokens > 0 and self.asked[key[0]].tenant != "c",
            )
            for key, (model, tokens) in machine.running.items()
        ]
        devices = [Device("d", machine.size, ["p"])]
        if self.server is not None:
            held = [
                ServerHeld([] if id in self.deleted or id[0] == "?" else [id], size) for id, size in machine.saw.items()
            ]
            devices.append(Device("s", self.server.size, ["o"], shared=True, held=held))
        return WorkerStatus(
            name, str(machine.boot), "default", machine.term, self.now,
            providers=["p", "q"] if self.server is None else ["p", "q", "o"],
            resident=resident, running=running, stopping=stopping, left=left,
            devices=devices, fence=machine.fence, broken=machine.broken,
            trainers=[
                Trainer(job, epoch, "d", JOBS[job].bytes, JOBS[job].notice_ms, left=state == "left")
                for job, (epoch, state) in machine.trainers.items()
            ],
        )  # fmt: skip

    def grant(self) -> None:
        """The oldest grant is durable."""
        if self.grants:
            granted = self.grants.pop(0)
            self.epoch += 1
            self.promises[self.epoch] = self.asked_for[granted_to(granted)]
            if isinstance(granted, messages.GrantTraining):
                self.tell(messages.TrainingGranted(granted.worker, granted.job, self.epoch))
            else:
                self.tell(messages.LeaseGranted(granted.worker, granted.boot, granted.model, self.epoch))

    def settle(self, name: str, state: str = "active") -> None:
        """Loads end in `state`, unloads have freed their memory."""
        machine = self.machines[name]
        if machine.paused:
            return
        for model, held in list(machine.resident.items()):
            if held.state == "loading":
                there = device_of(model) != "d" or machine.size
                self.excuses += state == "failed" or not there
                machine.resident[model] = held._replace(state=state if there else "failed")
                if self.server is not None and model in self.server.lies:
                    self.server.lies[model].from_ms = self.now  # also what did not answer in time
                    self.look(machine)
            elif held.state in ("unloading", "ghost"):
                del machine.resident[model]
                self.clear(machine, model)
        for model in list(machine.clearing):
            self.clear(machine, model)

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
        known = self.models.get(model)
        if kind == "load":
            self.parked.discard(model)
            self.tell(messages.LoadAsked(model, self.now + 10_000))
            laws.check_load(self, model)
        else:
            if known is not None and not known.pinned:
                self.parked.add(model)
            self.tell(messages.UnloadAsked(model, "an operator"))

    def release(self, name: str, model: str) -> None:
        """An operator saw that what is to be unloaded is gone, though the worker does not, and says so."""
        machine = self.machines[name]
        held = machine.resident.get(model, NEVER)
        if held.state == "unloading" and machine.alive:
            machine.resident[model] = held._replace(state="ghost")
            self.clear(machine, model)
            if self.server is not None and model in self.server.lies:
                return  # Another worker has it there.
            for _ in range(31):
                for worker in WORKERS:
                    self.heartbeat(worker)
                self.pass_time(1_000)
            lease = self.pool.leases.get((name, model))
            if lease is not None and (lease.epoch, lease.state) == (held.epoch, LeaseState.QUARANTINED):
                self.released[name, model] = held.epoch
            self.tell(messages.ReleaseAsked(name, model, "an operator"))

    def register(self, model: str, **fields: bool | int) -> None:
        """A model's record changes: it is pinned or not, or has another size or number of slots."""
        if model in self.models:
            self.excuses += 2 * len(WORKERS)
            self.models[model] = changed = structs.replace(self.models[model], **fields)
            self.widest[model] = max(self.widest[model], changed.max_concurrency)
            if changed.pinned:
                self.parked.discard(model)
            self.tell(messages.ModelsChanged(dict(self.models)))

    def remove(self, model: str, *, delete: bool) -> None:
        """A model is disabled or deleted."""
        if model in self.models:
            self.removed[model] = self.models.pop(model)
            self.parked.discard(model)
            if delete:
                self.deleted.add(model)
            self.tell(messages.ModelsChanged(dict(self.models)))

    def restore(self, model: str) -> None:
        """A model that was disabled or deleted is there again."""
        if model in self.removed:
            self.excuses += 2 * len(WORKERS)
            self.models[model] = self.removed.pop(model)
            self.deleted.discard(model)
            self.tell(messages.ModelsChanged(dict(self.models)))

    def others_load(self, name: str, size: int) -> None:
        """Others load something into the server, if it fits: a model of ours by its name, or else their own."""
        server = self.server
        if server is not None and name not in server.lies and server.used() + size <= server.size:
            self.others += 1
            self.excuses += len(self.names)
            server.lies[name if name in SERVED else f"?{self.others}"] = Lies(size, None, self.now)

    def others_unload(self) -> None:
        """Others unload what they have loaded, and what is of no model that anybody knows."""
        used = {id for machine in self.machines.values() for id in machine.resident}
        if self.server is not None:
            for name, lies in list(self.server.lies.items()):
                if (lies.by is None or name in self.deleted) and name not in used:
                    del self.server.lies[name]

    def pass_time(self, ms: int) -> None:
        """Time passes, of which the policy is told as often as in production, or nearly so."""
        end = self.now + ms
        if ms > policy.DEAF_MS or end - self.pool.taken_ms > policy.STRAYS_MS // 2:
            self.read_again()
        while self.now < end:
            self.now = min(end, self.now + policy.DEAF_MS)
            for name, boot in self.ingresses.items():
                if boot > 0:
                    self.heard.heard(IngressStatus(name, str(boot), self.now))
            self.tell(messages.Tick())
            laws.check_ticked(self)
            self.check_training()
        self.look_after_callers()

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
        self.tell(messages.ModelsChanged(dict(self.models)), complete=False)
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
        self.barred = {request_id for request_id in self.live if self.left.get(request_id) == LEFT}
        for request_id in sorted(self.barred):
            tenant = self.asked[request_id].tenant
            self.tell(messages.CancelAsked(request_id, LEFT, tenant), complete=False)
        self.heard = Ingresses()
        for lies in self.server.lies.values() if self.server is not None else ():
            lies.told = False  # unless it is shown
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
        self.machines[name].size = SIZE
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
            hold(len(lease.running) <= self.widest[lease.model], "more run than a model ever took")
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
        waiting = sum(len(queue) for queue in pool.queues.values())
        for request_id in self.live:
            request = self.asked[request_id]
            places = (request_id in pool.queues.get(request.model, ())) + (request_id in pool.running)
            places += request_id in pool.recovering
            hold(places == 1 - (request_id in self.unread), "{} is in {} places", request_id, places)
        hold(waiting <= len(self.live | set(self.later)), "what has ended waits")
        laws.check_queues(self)
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
            model
            for model, queue in pool.queues.items()
            if queue and device_of(model) == "d" and not pool.of_model(model)
        ]
        if len(without) != 1 or pool.wanted:  # Others may have been promised what is seen as free.
            return
        [model], oldest = without, pool.queue(without[0]).oldest(batch=False)
        if oldest is None or any(lease.state is LeaseState.DRAINING for lease in pool.trainers.values()):
            return
        for name, worker in pool.workers.items():
            since_ms = max(oldest.waiting_ms, pool.ready_ms.get(model, 0))
            if worker.offers("p") and self.now - since_ms > LIMITS.max_wait_ms:
                free = self.machines[name].told - laws.held(pool, name)
                trainers = [lease for lease in pool.trainers.values() if lease.worker == name]
                train = sum(lease.bytes for lease in trainers if lease.state in laws.TRAINS)
                size = self.models[model].bytes
                hold(not train or free + train < size, f"{model} waits, and jobs train in its place")

    def finish_all(self) -> None:
        """With healthy workers every request comes to its end within about a minute. Raises `Broken` otherwise.

        Operators unpin what they had pinned, and others leave the server: both could take all memory for ever. Models
        that are gone stay so.
        """
        for model in self.names:
            if model in self.models and self.models[model].pinned != (model == "pinned"):
                self.register(model, pinned=model == "pinned")
        for _ in range(60 + 2 * len(self.live)):
            if not self.live:
                return self.check_books()
            self.others_unload()
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
        for model in [id for id in self.names if id in self.models and not self.pool.of_model(id)][:1]:
            self.wish(model, "load")
        for name in WORKERS:
            self.healthy(name)
        for name, machine in self.machines.items():
            self.settle(name, "failed")
            self.heartbeat(name)
            self.heartbeat(name)  # the first may only have shown the worker a new term
            if machine.alive:
                held = sum(
                    lease.holds
                    for lease in self.pool.leases.values()
                    if (lease.worker, lease.device) == (name, "d") and lease.epoch is not None
                )
                hold(held == machine.used(), f"{name} holds {machine.used()} bytes, not {held}")
        self.check_server()

    def check_server(self) -> None:
        """What nobody has a lease on and nobody wants does not stay in a server. Raises `Broken` otherwise."""
        for _ in range(60 if self.server is not None else 0):
            strays = laws.strays(self)
            if not strays:
                return
            for name in WORKERS:
                self.healthy(name)
            while self.later or self.reads:
                self.read_log()
            self.others_unload()
            self.pass_time(500)
        hold(self.server is None, f"nobody's models stay in the server: {self.server}")
