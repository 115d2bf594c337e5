"""The engine: a thread that takes all running answers through the model together, one step after the other."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from processors.generation.providers.hf.adapters import Adapters
from processors.generation.providers.hf.answer import Answer, Event
from processors.generation.providers.hf.batching import Span, plan
from processors.generation.providers.hf.loading import Loaded

Deliver = Callable[[Sequence[tuple[Answer, Event]]], None]


class Engine:
    """Runs answers in `slots` slots; those that find none wait in order of arrival.

    A step that fails ends the process: what the accelerator holds after an error is not to be trusted, and the worker
    loads the model again.
    """

    def __init__(self, loaded: Loaded, adapters: Adapters, *, slots: int, budget: int, deliver: Deliver) -> None:
        self._loaded = loaded
        self._adapters = adapters
        self._budget = budget
        self._deliver = deliver
        self._free = list(range(slots - 1, -1, -1))
        self._waiting: deque[Answer] = deque()
        self._running: list[tuple[int, Answer]] = []
        self._changed = threading.Condition()
        self.slots = slots
        self.steps = 0
        self._step_began = 0.0
        """When the step that runs began; 0 between steps."""
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work, warm: what the first step has to allocate and to compile belongs to the load."""
        self._adapters.begin([""])
        self._loaded.scores([0], [Span(0, 0, 1)], [0])
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Take an answer on; its events come by `deliver`, in the engine's thread."""
        with self._changed:
            self._waiting.append(answer)
            self._changed.notify()

    def cancel(self, answer: Answer) -> None:
        """Nobody wants the answer any more: its slot is free with the next step."""
        with self._changed:
            answer.cancelled = True
            self._changed.notify()

    @property
    def busy(self) -> list[int]:
        """Slots in use."""
        with self._changed:
            return [slot for slot, _ in self._running]

    def hangs(self, step_s: float) -> bool:
        """Whether the engine is in one step for longer than this: an accelerator, or a lock, does not come back."""
        began = self._step_began
        return bool(began) and time.monotonic() - began > step_s

    def _live(self) -> None:
        try:
            while True:
                running = self._admit()
                self._step_began = time.monotonic()
                self._step(running)
                self._step_began = 0.0
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _admit(self) -> list[tuple[int, Answer]]:
        """Wait for work; give free slots to those who wait."""
        with self._changed:
            while True:
                self._waiting = deque(answer for answer in self._waiting if not answer.cancelled)
                self._release(lambda answer: answer.cancelled)
                while self._free and self._waiting:
                    self._running.append((self._free.pop(), self._waiting.popleft()))
                if self._running:
                    return list(self._running)
                self._changed.wait()

    def _release(self, ended: Callable[[Answer], bool]) -> None:
        self._free += [slot for slot, answer in self._running if ended(answer)]
        self._running = [(slot, answer) for slot, answer in self._running if not ended(answer)]

    def _step(self, running: list[tuple[int, Answer]]) -> None:
        planned = plan(running, self._budget)
        tokens: list[int] = []
        lasts: list[int] = []
        rows: list[str] = []
        spans: list[Span] = []
        for answer, span in planned:
            tokens += answer.tokens[span.start : span.end]
            rows += [answer.adapter] * span.size
            spans.append(span)
            if span.end == answer.length:
                lasts.append(len(tokens) - 1)
        self._adapters.begin(rows)
        scores = iter(self._loaded.scores(tokens, spans, lasts))
        events: list[tuple[Answer, Event]] = []
        for answer, span in planned:
            answer.computed = span.end
            if span.end == answer.length:
                events.append((answer, answer.take(next(scores))))
        self.steps += 1
        with self._changed:
            self._release(lambda answer: answer.ended)
        if events:
            self._deliver(events)
