"""The machines of the small world: workers with a device each, and a server that several of them use, as they are.

Nothing here knows of the policy. What a machine or a server holds is counted here, not in anybody's books.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from processors.scheduler.messages import Action
from processors.scheduler.state import Job
from schemas.control import Model

SIZE = 10
"""Bytes of each machine's device while nobody else takes any."""
MODELS = {
    "one": Model("one", "p", "t", max_concurrency=1, bytes=6, load_ms=400),
    "two": Model("two", "p", "t", max_concurrency=2, bytes=5, load_ms=200, preload=False),
    "three": Model("three", "p", "t", max_concurrency=2, bytes=4, load_ms=100, preload=False, keep_alive_ms=5_000),
    "pinned": Model("pinned", "p", "t", max_concurrency=1, bytes=1, load_ms=100, preload=False, pinned=True),
    "remote": Model("remote", "q", "t", max_concurrency=2),
}
SERVER_SIZE = 8
SERVED = {
    "lama": Model("lama", "o", "t", max_concurrency=2, bytes=5, load_ms=300, preload=False),
    "lamb": Model("lamb", "o", "t", max_concurrency=1, bytes=4, load_ms=200),
}
"""Models that lie in the server, where there is one."""
DEVICES = {"p": "d", "q": "", "o": "s"}
"""Provider -> the device on which its models lie."""
WORKERS = ("w1", "w2")
JOBS = {"small": Job("small", 3, 500), "big": Job("big", 4, 1_000), "there": Job("there", 2, 60_000, device="d")}
GONE = ("failed", "ghost")
LOOK_MS = 1_000
"""How old what a worker knows of its server is at most when it tells of it."""


def device_of(model: str) -> str:
    """Where a model lies; empty where its memory is not counted."""
    return DEVICES[(MODELS.get(model) or SERVED[model]).provider]


class Held(NamedTuple):
    """A model on a worker."""

    epoch: int
    state: str
    """All take memory but failed ones and ghosts: gone, and shown as if they were not."""
    bytes: int = 0
    granted: int = 0


class Told(NamedTuple):
    """What the scheduler was told of a device when it granted memory there."""

    bytes: int
    others: frozenset[str] = frozenset()
    """What lay in the server, as far as somebody had told."""


@dataclass(slots=True)
class Lies:
    """A model in the server."""

    bytes: int
    by: tuple[str, int] | None
    """(worker, boot) that had it loaded; None for others."""
    from_ms: float
    """When its load is done, and it can be seen."""
    told: bool = True
    """Whether the scheduler must know of it: it gave the memory, and saw the worker go that had it."""


@dataclass
class Server:
    """A server that keeps what it was asked to load, whoever asked and is there."""

    size: int = SERVER_SIZE
    lies: dict[str, Lies] = field(default_factory=dict)

    def used(self, names: Iterable[str] | None = None) -> int:
        """Bytes of all that lies there, or of these."""
        return sum(self.lies[name].bytes for name in (self.lies if names is None else names))

    def seen(self, now_ms: int) -> dict[str, int]:
        """What it tells who asks: all that is loaded."""
        return {name: one.bytes for name, one in self.lies.items() if one.from_ms <= now_ms}


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
    size: int = SIZE
    """Bytes that models may take on its device: what others take is not among them."""
    told: int = SIZE
    """The same, as its last heartbeat had it."""
    broken: dict[str, str] = field(default_factory=dict)
    """Providers whose breaker is open."""
    resident: dict[str, Held] = field(default_factory=dict)
    running: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """(request, attempt) -> (model, tokens so far)."""
    trainers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Job -> (epoch, `trains`, `saves` after its notice, or `left`)."""
    clearing: set[str] = field(default_factory=set)
    """Models that it has the server unload though it did not load them."""
    saw: dict[str, int] = field(default_factory=dict)
    """What it saw in the server when it last looked."""
    looked_ms: int = -LOOK_MS
    shown: dict[str, int] = field(default_factory=dict)
    """The same, as its last heartbeat had it."""
    told_broken: dict[str, str] = field(default_factory=dict)
    """And so its open breakers."""

    def next(self) -> Machine:
        """The process that comes after this one on the same hardware."""
        return Machine(
            self.boot + 1, alive=True, size=self.size, told=self.told, shown=self.shown, told_broken=self.told_broken
        )

    def used(self) -> int:
        """Bytes that are taken on its device."""
        held = sum(held.bytes for model, held in self._on_device())
        return held + self.trained()

    def sold(self) -> int:
        """The same without what models take beyond what was granted to them."""
        return sum(min(held.bytes, held.granted) for _, held in self._on_device()) + self.trained()

    def trained(self) -> int:
        """Bytes of its trainers."""
        return sum(JOBS[job].bytes for job, (_, state) in self.trainers.items() if state != "left")

    def epochs(self) -> list[int]:
        """The epochs of all that lies on its device."""
        epochs = [held.epoch for _, held in self._on_device()]
        return epochs + [epoch for epoch, state in self.trainers.values() if state != "left"]

    def _on_device(self) -> list[tuple[str, Held]]:
        return [
            (model, held)
            for model, held in self.resident.items()
            if held.state not in GONE and device_of(model) == "d"
        ]  # fmt: skip


class Broken(AssertionError):
    """Something that must always hold does not."""


def hold(truth: object, what: str, *about: object) -> None:
    """Raise `Broken` unless `truth`; only then is `what` put together with `about`, since it is asked so often."""
    if not truth:
        raise Broken(what.format(*about) if about else what)
