"""Training holds what nobody needs: what it is lent, when it gives way, and what it costs those who wait."""

from __future__ import annotations

from itertools import count

import pytest

from processors.scheduler import messages, training
from processors.scheduler.messages import Action, Event
from processors.scheduler.policy import step
from processors.scheduler.state import Job, LeaseState, Limits, Pool, Request
from schemas.control import Model
from schemas.events import Device, Resident, Trainer, WorkerStatus

TERM = 7
SIZE = 10
MODELS = {
    "a": Model("a", "p", "t", bytes=4, load_ms=1_000, preload=False),
    "b": Model("b", "p", "t", bytes=6, load_ms=1_000, preload=False),
}
JOB = Job("j", 5, notice_ms=2_000)


class Room:
    """One worker with one device, which does at once what it is told, but for trainers, which leave when told here."""

    def __init__(self, models: dict[str, Model] = MODELS, limits: Limits | None = None, size: int = SIZE) -> None:
        self.pool = Pool(term=TERM, models=dict(models), limits=limits or Limits())
        self.size = size
        self.now = 0
        self.boot = "b1"
        self.resident: dict[str, int] = {}
        self.trainers: dict[str, Trainer] = {}
        self.did: list[Action] = []
        self._epochs = count(1)
        self.beat()

    def tell(self, event: Event) -> list[Action]:
        actions = step(self.pool, event, self.now)
        self.did += actions
        for action in actions:
            match action:
                case messages.Grant(worker, boot, model):
                    self.tell(messages.LeaseGranted(worker, boot, model, next(self._epochs)))
                case messages.GrantTraining(worker, _, job):
                    self.tell(messages.TrainingGranted(worker, job, next(self._epochs)))
                case messages.BeginTraining(_, _, job, epoch, device, size, notice_ms):
                    self.trainers[job] = Trainer(job, epoch, device, size, notice_ms)
                case messages.Load(_, _, model, epoch):
                    self.resident[model] = epoch
                case messages.Unload(_, _, model):
                    del self.resident[model]
                case _:
                    pass
        return actions

    def beat(self) -> list[Action]:
        resident = [Resident(model, epoch, "active", device="d") for model, epoch in self.resident.items()]
        status = WorkerStatus(
            "w", self.boot, "default", TERM, self.now, ["p"], resident, devices=[Device("d", self.size, ["p"])],
            trainers=list(self.trainers.values()),
        )  # fmt: skip
        return self.tell(messages.WorkerSeen(status))

    def go_on(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1_000
            self.beat()
            self.tell(messages.Tick())

    def use(self, model: str, name: str, *, slo_ms: int = 60_000) -> None:
        """A request comes, and is done at once if it has its turn."""
        self.tell(messages.Arrived(Request(name, "t", model, self.now, self.now + slo_ms)))
        self.beat()
        if name in self.pool.running:
            self.tell(messages.Finished(name, 1, 1))

    def leave(self, job: str = "j") -> None:
        trainer = self.trainers[job]
        self.trainers[job] = Trainer(job, trainer.epoch, trainer.device, trainer.bytes, left=True)
        self.beat()

    @property
    def notices(self) -> list[messages.NoticeTraining]:
        return [action for action in self.did if isinstance(action, messages.NoticeTraining)]

    @property
    def state(self) -> LeaseState | None:
        lease = self.pool.trainers.get(("w", "j"))
        return lease.state if lease is not None else None


def test_a_job_is_lent_free_memory_and_told_what_it_may_take() -> None:
    room = Room()
    room.tell(messages.TrainingAsked(JOB))
    [begin] = [action for action in room.did if isinstance(action, messages.BeginTraining)]
    assert (begin.job, begin.device, begin.bytes, begin.notice_ms) == ("j", "d", 5, 2_000)
    room.beat()
    assert room.state is LeaseState.ACTIVE
    room.tell(messages.TrainingAsked(JOB))
    assert len(room.pool.trainers) == 1, "asked again it has what it has"


def test_a_request_has_a_job_leave_and_its_bytes_are_granted_when_it_is_seen_to_have_left() -> None:
    room = Room()
    room.tell(messages.TrainingAsked(JOB))
    room.use("b", "r")
    [notice] = room.notices
    assert notice.by_ms == 2_000 and room.state is LeaseState.DRAINING
    room.go_on(1)
    assert not room.resident, "its bytes are not given away on a promise"
    room.leave()
    assert "b" in room.resident and room.state is None
    room.go_on(30)
    assert len(room.notices) == 1 and room.state is None, "it waits while somebody may still ask for the model"
    room.tell(messages.Finished("r", 1, 1))
    room.go_on(600)
    assert room.state is LeaseState.ACTIVE and not room.resident, "a model that nobody asks for any more gives way"


def test_a_model_that_is_used_or_at_hand_or_was_asked_for_of_late_does_not_give_way_to_training() -> None:
    pinned = Model("b", "p", "t", bytes=6, load_ms=1_000, preload=False, pinned=True)
    for models in (MODELS, {"b": pinned}, {"b": Model("b", "p", "t", bytes=6, load_ms=1_000)}):
        room = Room(models)
        room.use("b", "r")
        room.tell(messages.TrainingAsked(JOB))
        room.go_on(200)
        assert "b" in room.resident and room.state is None
    room = Room()
    room.tell(messages.Arrived(Request("long", "t", "b", 0, 10**7)))
    room.beat()
    room.tell(messages.TrainingAsked(JOB))
    room.go_on(900)
    assert "b" in room.resident and room.state is None, "it is in use"


def test_what_has_not_left_when_its_notice_ends_is_lost_until_it_has() -> None:
    room = Room()
    room.tell(messages.TrainingAsked(JOB))
    room.use("b", "r")
    room.go_on(3)
    assert room.state is LeaseState.QUARANTINED and not room.resident
    room.leave()
    assert "b" in room.resident


def test_a_notice_is_no_longer_than_half_of_the_longest_wait() -> None:
    room = Room(limits=Limits(max_wait_ms=6_000))
    room.tell(messages.TrainingAsked(Job("j", 5, notice_ms=60_000)))
    room.use("b", "r")
    assert [notice.by_ms for notice in room.notices] == [3_000]


def test_a_job_that_must_give_way_before_it_began_never_begins() -> None:
    room = Room()
    pool = room.pool
    [grant] = step(pool, messages.TrainingAsked(JOB), 0)
    assert isinstance(grant, messages.GrantTraining)
    step(pool, messages.Arrived(Request("r", "t", "b", 0, 60_000)), 0)
    [free] = step(pool, messages.TrainingGranted("w", "j", 5), 0)
    assert isinstance(free, messages.TrainingMoved) and free.state == "free"
    assert [type(one) for one in step(pool, messages.Tick(), 1)] == [messages.Grant], "the model has its place"


@pytest.mark.parametrize(("notice_ms", "leaves"), [(500, True), (50_000, False)])
def test_the_job_or_an_idle_model_gives_way_whichever_costs_less(notice_ms: int, leaves: bool) -> None:
    small = {name: Model(name, "p", "t", bytes=4, load_ms=2_000, preload=False) for name in ("a", "c")}
    room = Room(small)
    for number in range(3):
        room.use("a", f"r{number}")  # three expected requests of 2 s each
    room.tell(messages.TrainingAsked(Job("j", 5, notice_ms)))
    room.beat()
    room.use("c", "new")
    assert (bool(room.notices), "a" in room.resident) == (leaves, leaves)


def test_a_job_and_a_model_give_way_together_where_neither_suffices() -> None:
    room = Room(MODELS | {"whole": Model("whole", "p", "t", bytes=10, load_ms=1_000, preload=False)})
    room.use("a", "r")
    room.tell(messages.TrainingAsked(JOB))
    room.use("whole", "all")
    assert len(room.notices) == 1 and "a" not in room.resident
    room.leave()
    assert list(room.resident) == ["whole"]


def test_a_job_leaves_when_its_device_shrinks_or_it_is_done() -> None:
    room = Room()
    room.tell(messages.TrainingAsked(JOB))
    room.size = 4
    room.beat()
    assert [notice.reason for notice in room.notices] == ["its device has less memory than is held"]
    room = Room()
    room.tell(messages.TrainingAsked(JOB))
    room.tell(messages.TrainingDone("j"))
    assert [notice.reason for notice in room.notices] == ["the job is done"]
    room.leave()
    room.go_on(5)
    assert room.state is None


def test_a_worker_that_starts_anew_holds_no_trainer_and_its_job_begins_again() -> None:
    room = Room()
    room.tell(messages.TrainingAsked(JOB))
    room.boot, room.trainers = "b2", {}
    room.beat()
    began = [action for action in room.did if isinstance(action, messages.BeginTraining)]
    assert [one.boot for one in began] == ["b1", "b2"] and began[0].epoch < began[1].epoch


@pytest.mark.parametrize("asked", [True, False])
def test_a_trainer_that_is_found_goes_on_if_its_job_is_still_wanted(asked: bool) -> None:
    room = Room()
    room.trainers["j"] = Trainer("j", 99, "d", 5, 2_000)
    if asked:
        training.ask(room.pool, JOB)
    room.beat()
    assert room.state is (LeaseState.ACTIVE if asked else LeaseState.DRAINING)
    assert not [action for action in room.did if isinstance(action, messages.GrantTraining)]


def test_a_job_leaves_for_a_late_queue_also_where_other_memory_is_on_its_way_back() -> None:
    room = Room(limits=Limits(max_wait_ms=20_000))
    room.tell(messages.Arrived(Request("stays", "t", "a", 0, 600_000)))
    room.beat()
    room.tell(messages.TrainingAsked(Job("j", 2, notice_ms=1_000)))
    room.tell(messages.ModelsChanged({"b": MODELS["b"]}))
    assert room.pool.leases["w", "a"].state is LeaseState.DRAINING and "stays" in room.pool.running
    room.tell(messages.Arrived(Request("waits", "t", "b", 0, 600_000)))
    room.go_on(20)
    assert [notice.job for notice in room.notices] == ["j"], "nobody knows when the model gives its memory back"
    assert room.notices[0].by_ms <= 12_000
