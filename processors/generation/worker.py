"""The worker: obeys its scheduler's commands, holds models, runs attempts, and reports what it holds and runs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

import structlog

from headrace import metrics
from headrace.errors import HeadraceError, ProviderError
from processors.generation.attempt import Attempt, unable
from processors.generation.bodies import Bodies
from processors.generation.breakers import Breakers
from processors.generation.frames_out import FrameWriter
from processors.generation.memory import Held, Memory
from processors.generation.providers.base import Provider
from schemas import control
from schemas.events import (
    NO_EPOCH,
    CancelCommand,
    Command,
    GenerateCommand,
    LoadCommand,
    Resident,
    RunningAttempt,
    TermCommand,
    UnloadCommand,
    WorkerStatus,
)
from topics.outcomes import Outcomes, now_ms

log = structlog.get_logger(__name__)

MAX_RUNNING = 4096
"""Hard bound on attempts at once, whatever a scheduler says."""
UNLOAD_AGAIN_S = 5.0
"""Until an unload that failed is tried again."""
LEAVE_S = 3.0
"""How long what still runs may take to end when the worker leaves."""
REMEMBERED = 20_000
"""Attempts that ended are remembered, so that a command that comes twice is obeyed once."""

MakeProvider = Callable[[control.Provider], Provider]


class _Held:
    """A model that this worker holds, is loading, or failed to load."""

    def __init__(self, command: LoadCommand, provider: Provider | None) -> None:
        self.model = command.model
        self.epoch = command.epoch
        self.device = command.device
        self.provider = provider
        self.state = "loading"
        self.error = ""
        self.loads: list[tuple[int, int]] = []
        """From when to when it was loaded, each time (Unix ms)."""
        self.revivals = 0
        """How often its engine died and it was loaded again."""
        self.settled = asyncio.Event()
        """Set unless the model is being loaded."""

    @property
    def progress(self) -> str:
        """How far a load is that takes long."""
        return self.provider.progress(self.model) if self.state == "loading" and self.provider is not None else ""

    def settle(self, state: str, error: str = "") -> None:
        """The load has ended; a wish to unload that came meanwhile stays."""
        if self.state == "loading":
            self.state = state
        self.error = error
        self.settled.set()


class Worker:
    """One worker's whole state. Commands are handled in order, and none waits for a model or a generation."""

    def __init__(
        self,
        worker_id: str,
        pool: str,
        boot: str,
        make_provider: MakeProvider,
        memory: Memory,
        writer: FrameWriter,
        outcomes: Outcomes,
        bodies: Bodies,
        fail: Callable[[BaseException], None],
    ) -> None:
        self.id = worker_id
        self.boot = boot
        self.providers: list[str] = []
        """Names of the providers that this worker serves; follows the registry."""
        self.served: dict[str, tuple[control.Provider, Provider]] = {}
        """Those providers by name, with their records."""
        self.memory = memory
        self.changed = asyncio.Event()
        """Set when the next heartbeat should not wait."""
        self._pool = pool
        self._make_provider = make_provider
        self._writer = writer
        self._outcomes = outcomes
        self._bodies = bodies
        self._fail = fail
        self._term = -1
        self._fence = 0
        self._stopping = self._leaving = False
        self._breakers = Breakers(self.changed)
        self._made: dict[str, tuple[control.Provider, Provider]] = {}
        self._retired: list[Provider] = []
        """Of records that have changed since; they are closed when they hold no model any more."""
        self._unusable: dict[str, control.Provider] = {}
        self._models: dict[str, control.Model] = {}
        """Of the providers that it serves."""
        self._held: dict[str, _Held] = {}
        self._clearing: dict[str, asyncio.Task[None]] = {}
        """Models that a server is asked to unload though they were not loaded by this worker."""
        self._running: dict[str, Attempt] = {}
        self._ended: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    # --- commands ---------------------------------------------------------------------------------------------

    async def obey(self, command: Command) -> None:
        """Carry out one command. Long work is spawned."""
        if command.term < self._term:
            log.warning("stale_term", command=type(command).__name__, term=command.term, newest=self._term)
            return
        match command:
            case TermCommand(term, _, fence):
                self._fence = max(fence, self._fence) if term == self._term else fence
                self._term = term
                self.changed.set()
            case CancelCommand(_, request_id):
                attempt = self._running.get(request_id)
                if attempt is not None and command.attempt in (0, attempt.command.attempt):
                    attempt.cancel(command)
            case LoadCommand() | GenerateCommand() if self._leaving and command.boot == self.boot:
                log.info("left_to_others", command=type(command).__name__)  # as all that ran here
            case LoadCommand() if command.boot == self.boot:
                self._load(command)
            case UnloadCommand() if command.boot == self.boot:
                self._unload(command)
            case GenerateCommand() if command.boot == self.boot:
                self._generate(command)
            case _:
                log.info("earlier_boot", command=type(command).__name__)

    def _provider(self, record: control.Provider) -> Provider:
        known = self._made.get(record.name)
        if known is not None and known[0] == record:
            return known[1]
        made = self._make_provider(record)
        if known is not None:
            self._retired.append(known[1])
            self._close_retired()
        self._made[record.name] = (record, made)
        self._breakers.watch(made)
        return made

    def _close_retired(self) -> None:
        in_use = {id(held.provider) for held in self._held.values()}
        for provider in [retired for retired in self._retired if id(retired) not in in_use]:
            self._retired.remove(provider)
            self._spawn(provider.close())

    def _load(self, command: LoadCommand) -> None:
        known = self._held.get(command.model.id)
        if known is not None and known.epoch >= command.epoch:
            return
        try:
            provider = self._provider(command.provider)
        except HeadraceError as error:
            log.error("provider_unusable", provider=command.provider.name, error=error.message)
            self._held[command.model.id] = held = _Held(command, None)
            held.settle("failed", error.message)
            self.changed.set()
            return
        self._held[command.model.id] = held = _Held(command, provider)
        self.changed.set()
        self._spawn(self._bring(held, provider))

    async def _bring(self, held: _Held, provider: Provider) -> None:
        began, began_ms = time.monotonic(), now_ms()
        try:
            if (clearing := self._clearing.get(held.model.id)) is not None:
                await asyncio.wait((clearing,))
            if held.device:
                await self.memory.check_room(held.model.id, held.device)
            loaded = await provider.load(held.model, held.device)
            await self.memory.loaded(provider, held.device, loaded)
            held.loads.append((began_ms, now_ms()))
            held.settle("active")
            metrics.MODEL_LOAD_SECONDS.labels(model=held.model.id).observe(time.monotonic() - began)
            log.info("model_loaded", model=held.model.id, epoch=held.epoch, device=held.device, bytes=loaded.bytes)
        except HeadraceError as error:
            await self.memory.look_at_server(provider)  # It may have the model all the same.
            held.settle("failed", error.message)
            log.error("model_load_failed", model=held.model.id, epoch=held.epoch, error=error.message)
        self.changed.set()

    def _unload(self, command: UnloadCommand) -> None:
        held = self._held.get(command.model)
        if held is None:
            if command.epoch == NO_EPOCH:
                self._clear(command.model)
            return
        if held.epoch > command.epoch or held.state == "unloading":
            return
        held.state = "unloading"
        self.changed.set()
        self._spawn(self._give_back(held))

    def _clear(self, name: str) -> None:
        """Unload what a provider's server holds and nobody has a lease on: the worker that loaded it is gone."""
        model = self._models.get(name)
        if model is not None and name not in self._clearing:
            _, provider = self.served[model.provider]
            self._clearing[name] = self._spawn(self._unload_stray(model, provider))

    async def _unload_stray(self, model: control.Model, provider: Provider) -> None:
        try:
            await provider.unload(model)
            log.info("stray_unloaded", model=model.id, provider=provider.name)
        except HeadraceError as error:
            log.warning("stray_not_unloaded", model=model.id, error=error.message)
        finally:
            del self._clearing[model.id]
        await self.memory.look_at_server(provider)
        self.changed.set()

    async def _give_back(self, held: _Held) -> None:
        """Unload; the heartbeat shows the model until its memory is free."""
        await held.settled.wait()
        while held.provider is not None:
            try:
                await self.memory.unload(held.model, held.provider, held.device)
                break
            except HeadraceError as error:
                # The scheduler holds the bytes for lost meanwhile; running streams of other models go on.
                log.error("model_not_unloaded", model=held.model.id, epoch=held.epoch, error=error.message)
                await asyncio.sleep(UNLOAD_AGAIN_S)
        if self._held.get(held.model.id) is held:
            del self._held[held.model.id]
        self._close_retired()
        log.info("model_unloaded", model=held.model.id, epoch=held.epoch)
        self.changed.set()

    def _generate(self, command: GenerateCommand) -> None:
        request_id = command.request.request_id
        running = self._running.get(request_id)
        if (request_id, command.attempt) in self._ended or (
            running is not None and running.command.attempt >= command.attempt
        ):
            log.info("command_again", request_id=request_id, attempt=command.attempt)
            return
        if running is not None:
            # It was taken for lost: what it writes is void, and it holds a slot of the engine.
            running.cancel(CancelCommand(command.term, request_id, "The attempt was superseded."))
        held = self._held.get(command.request.model)
        if (
            held is None
            or held.provider is None
            or held.state == "unloading"
            or held.epoch != command.epoch
            or len(self._running) >= MAX_RUNNING
        ):
            error = ProviderError("The worker no longer holds this model, or is full; send the request again.")
            self._spawn(self._outcomes.end(unable(command, self.id, error)))
            return
        attempt = Attempt(
            command, held.model, held.provider,
            worker=self.id, writer=self._writer, outcomes=self._outcomes, bodies=self._bodies,
            engine_again=self._watch_engine(held, held.provider), loads=held.loads,
        )  # fmt: skip
        self._running[request_id] = attempt
        self._idle.clear()
        metrics.GENERATING.set(len(self._running))
        self._spawn(self._run(attempt, held, held.provider))

    async def _run(self, attempt: Attempt, held: _Held, provider: Provider) -> None:
        request_id = attempt.command.request.request_id
        try:
            await held.settled.wait()
            if self._leaving:
                return  # It is for others to go on with.
            if held.state == "failed":
                error = ProviderError(f"The model's engine died and could not be started again: {held.error}")
                await self._outcomes.end(unable(attempt.command, self.id, error))
            else:
                await attempt.run()
                if attempt.answered:
                    self._breakers.outcome(provider, attempt.failure)
        finally:
            if self._running.get(request_id) is attempt:
                del self._running[request_id]
            if not self._running:
                self._idle.set()
            metrics.GENERATING.set(len(self._running))
            self._ended[request_id, attempt.command.attempt] = None
            while len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
        await self._look_after(held, provider)

    def _watch_engine(self, held: _Held, provider: Provider) -> Callable[[], Awaitable[bool]]:
        """What tells an attempt whether the model's engine died after this call, and has a successor."""
        before = held.revivals

        async def again() -> bool:
            await self._look_after(held, provider)
            await held.settled.wait()
            return held.revivals > before and held.state == "active"

        return again

    async def _look_after(self, held: _Held, provider: Provider) -> None:
        """Load a model again, under the same lease, whose engine died."""
        with contextlib.suppress(HeadraceError):  # one that cannot be asked is for the breaker
            if await provider.on_dead(held.model):
                self._revive(held, provider)

    def _revive(self, held: _Held, provider: Provider) -> None:
        if held.state == "active" and self._held.get(held.model.id) is held:
            log.error("engine_died", model=held.model.id, epoch=held.epoch)
            held.revivals += 1
            held.state = "loading"
            held.settled.clear()
            self.changed.set()
            self._spawn(self._bring(held, provider))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    # --- following --------------------------------------------------------------------------------------------

    async def follow(self, providers: Collection[control.Provider], models: Collection[control.Model]) -> None:
        """Serve these providers, and look at the memory of what they hold; `models` are those of the pool."""
        for record in providers:
            try:
                self._provider(record)
            except HeadraceError as error:
                if self._unusable.get(record.name) != record:  # Whoever asks for its models is told each time.
                    self._unusable[record.name] = record
                    log.error("provider_unusable", provider=record.name, error=error.message)
        names = {record.name for record in providers}
        self.served = {name: made for name, made in self._made.items() if name in names}
        somewhere = {
            model: Held(held.device, held.provider)
            for model, held in self._held.items()
            if held.state != "failed" and held.provider is not None
        }
        self._models = {model.id: model for model in models if model.provider in self.served}
        await self.memory.look(self.served, self._models.values(), somewhere)
        if self.memory.ready:
            self.providers = sorted(names)

    def loads(self) -> dict[str, int]:
        """Models that are in memory -> a number that is another after each load of them."""
        return {
            model: hash((held.epoch, held.revivals)) for model, held in self._held.items() if held.state == "active"
        }

    # --- reporting --------------------------------------------------------------------------------------------

    def status(self) -> WorkerStatus:
        """The heartbeat as it is now."""
        return WorkerStatus(
            worker=self.id,
            boot=self.boot,
            pool=self._pool,
            term=self._term,
            at_ms=now_ms(),
            providers=list(self.providers),
            resident=[
                Resident(
                    model_id,
                    held.epoch,
                    held.state,
                    self.memory.peak(model_id) or (held.model.bytes if held.device else 0),
                    held.error,
                    held.device,
                    progress=held.progress,
                )
                for model_id, held in self._held.items()
            ],
            running=[
                RunningAttempt(id, attempt.command.attempt, attempt.command.epoch, attempt.tokens, attempt.goes_on)
                for id, attempt in self._running.items()
            ],
            stopping=self._stopping,
            fence=self._fence,
            devices=self.memory.devices,
            utilisation=self.memory.utilisation(),
            needs=self.memory.needs,
            broken=self._breakers.broken(),
        )

    # --- leaving ----------------------------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """Take no more work: the next heartbeat says so."""
        self._stopping = True
        self.changed.set()

    async def drain(self, timeout_s: float) -> None:
        """Wait for running attempts; leave to other workers what still runs then; close the providers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._leaving = True
        for attempt in list(self._running.values()):
            attempt.leave()
        await self._breakers.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=LEAVE_S)
            for task in late:
                task.cancel()
        for provider in [*(made for _, made in self._made.values()), *self._retired]:
            await provider.close()
