"""Follows one request to its end: its frames, from our own partition or from another's past, and its result."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import structlog
from aiokafka.errors import KafkaError

from headrace.errors import Unavailable
from ingress.lookup import CLOCK_SLACK_MS
from ingress.replies import replay
from ingress.services import Services
from ingress.streams import Stream
from schemas.events import Status, Terminal
from schemas.ids import PublicId
from topics.frames import Delta, Kind, Moved, StreamView

log = structlog.get_logger(__name__)

REPLAY_AGAIN_S = 1.0
"""Until a replay that the brokers broke off is begun again."""
LOST_AFTER_SILENCES = 3
"""Waits in vain, all that is kept having been read, after which what is still missing is taken for lost."""

_terminal = msgspec.json.Decoder(Terminal)


class Following:
    """One caller's way through one request's steps, in their order, without a gap, each once.

    The request's end is known from its terminal frame, or, when that does not come, from `inference.log`. The log may
    be ahead of our reader of frames, when that had to connect anew: then the frames that are missed are read first.
    """

    def __init__(self, services: Services, public: PublicId, *, seen: int = 0, steps: bool = True) -> None:
        """`seen` is the last step that a resuming caller has had. Without `steps` only the end matters."""
        self.stream = Stream(bytes.fromhex(public.request_id), StreamView(seq=seen))
        self.terminal: Terminal | None = None
        """The end, once `next` has given all that comes before it."""
        self.gone = asyncio.Event()
        """Whether the caller has left."""
        self._services = services
        self._public = public
        self._steps = steps
        self._since_ms = public.created_ms
        """Unix ms from which on the log may hold the end: a request that was asked before has ended before."""
        self._seq = seen
        """Last step that was given."""
        self._whole: list[Delta] = []
        """The answer as its terminal holds it, where that is given in place of its steps."""
        self._ended: Terminal | None = None
        """The end of the request, as frames or log told it."""
        self._silences = 0
        """Waits in vain since the last step."""
        self._attached = False
        self._replaying: asyncio.Task[None] | None = None
        self._catching_up = False
        """Whether the frames that are missed are being read."""
        self._caught_up = False
        """Whether all that was kept when the reading began has been read."""
        self._log = log.bind(request_id=public.request_id)

    # --- where the frames come from ---------------------------------------------------------------------------

    def attach(self) -> None:
        """Read our own reply partition from now on."""
        self._services.replies.attach(self.stream)
        self._attached = True

    def detach(self) -> None:
        """Read nothing any more."""
        if self._attached:
            self._services.replies.detach(self.stream)
            self._attached = False
        if self._replaying is not None:
            self._replaying.cancel()
            self._replaying = None

    def replay(self) -> None:
        """Read the frames from the past of the partition that the request's id names."""
        self._replay(self._public.reply_partition, self._public.created_ms - CLOCK_SLACK_MS)

    async def join(self) -> None:
        """Take part in a request that was published before: give its result if it has one, else its frames."""
        found = await self._ask_log()
        if found is None:
            self.replay()
        else:
            self._end_whole(found)

    def _replay(self, partition: int, since_ms: int) -> None:
        self.detach()
        self.stream.moved = None
        self._caught_up = False
        self._replaying = asyncio.create_task(self._feed(partition, since_ms))
        self._replaying.add_done_callback(self._replay_ended)

    async def _feed(self, partition: int, since_ms: int) -> None:
        cluster = self._services.settings.kafka
        while True:
            try:
                async with contextlib.aclosing(replay(cluster, partition, since_ms, self.stream.rid)) as pieces:
                    async for piece in pieces:
                        for delta in piece.deltas:
                            # Nobody else waits for this reader: what is kept may be more than a buffer holds.
                            await self.stream.room()
                            self.stream.push(delta)
                        self._caught_up |= piece.caught_up
            except KafkaError as error:
                # What is read twice is given once: the stream's view knows each step.
                self._log.warning("replay_broken_off", partition=partition, error=repr(error))
                await asyncio.sleep(REPLAY_AGAIN_S)

    def _replay_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("replay_failed", error=repr(error))

    def leave(self) -> None:
        """The caller is gone: let `next` return."""
        self.gone.set()
        self.stream.wake()

    @property
    def broken_off(self) -> bool:
        """Whether the caller must go, before the end: it read too slowly, or this process stops."""
        return self._services.draining.is_set() or self.stream.dropped

    # --- steps ------------------------------------------------------------------------------------------------

    async def next(self) -> list[Delta]:
        """The next steps, as soon as there are any; none after a wake or a silence, and at the end."""
        if self.terminal is not None:
            return self._take_whole()
        steps = []
        for delta in await self.stream.take():
            if delta.kind == Kind.TERMINAL:
                self._ended = _terminal.decode(delta.data)
            else:
                steps.append(delta)
                self._seq = delta.seq
        if steps:
            self._silences = 0
        elif self._ended is None or self._catching_up:
            await self._silence()
        if self._ended is not None:
            self._settle(self._ended)
        return steps + self._take_whole()

    def _take_whole(self) -> list[Delta]:
        taken, self._whole = self._whole, []
        return taken

    async def _silence(self) -> None:
        """The stream woke without steps: its frames are elsewhere, or nothing came, or the caller or we must stop."""
        if self.gone.is_set() or self.broken_off:
            return
        if self.stream.moved is not None:
            moved = msgspec.json.decode(self.stream.moved, type=Moved)
            self._since_ms = min(self._since_ms, moved.since_ms)
            if moved.partition is not None:
                self._replay(moved.partition, moved.since_ms - CLOCK_SLACK_MS)
                return
            self.stream.moved = None
            self._silences = 0
        if self._ended is None and _asks_log(self._silences):
            self._ended = await self._ask_log()
        self._silences += 1

    def _settle(self, ended: Terminal) -> None:
        """Let the stream end if nothing is missing, else see to what is."""
        if not self._steps or self._seq >= ended.last_seq:
            self.terminal = ended
        elif self._seq == 0 and ended.choices and not self._catching_up:
            self._end_whole(ended)
        elif not self._catching_up:
            self._log.warning("frames_missed", seen=self._seq, last=ended.last_seq)
            self._catching_up = True
            self._silences = 0
            self.stream.clear()  # The replay brings them again.
            self.stream.view = StreamView(seq=self._seq)
            self._replay(ended.reply_partition, self._public.created_ms - CLOCK_SLACK_MS)
        elif self._caught_up and self._silences >= LOST_AFTER_SILENCES and not self.stream.pending:
            self._log.error("frames_lost", seen=self._seq, last=ended.last_seq)
            path = f"/v1/requests/{self._public}"
            lost = Unavailable(f"A part of this stream is lost; GET {path} tells how the request ended.")
            self.terminal = msgspec.structs.replace(ended, status=Status.FAILED, error=lost.info())

    def _end_whole(self, ended: Terminal) -> None:
        self.terminal = ended
        self._whole = whole_deltas(ended) if self._steps else []

    async def _ask_log(self) -> Terminal | None:
        try:
            async with asyncio.timeout(10):
                found = await self._services.lookup.terminal(self._public.request_id, self._since_ms)
        except Exception as error:
            # Best effort: the frames may still come, and the next silence asks again.
            self._log.warning("lookup_failed", error=repr(error))
            return None
        if found is not None:
            self._log.warning("terminal_found_in_log", status=found.status.value)
        return found


def _asks_log(silence: int) -> bool:
    """Whether the log is asked after so many silences before this one: soon at first, then once a minute."""
    return silence in (0, 2, 5) or silence % 12 == 11


def whole_deltas(terminal: Terminal) -> list[Delta]:
    """The answer that a terminal holds, as one delta a choice: for a caller that comes when the frames are gone.

    The last one bears the answer's last `seq` and the others none: whoever resumes after it has had everything.
    """
    rid = bytes.fromhex(terminal.request_id)
    choices = msgspec.json.decode(terminal.choices) if terminal.choices else []
    deltas = []
    for choice in choices:
        chunk = {
            "index": choice["index"],
            "delta": {name: value for name, value in choice["message"].items() if name != "role" and value is not None},
            "logprobs": choice.get("logprobs"),
            "finish_reason": choice["finish_reason"],
        }
        data = msgspec.json.encode([chunk]).decode()
        seq = terminal.last_seq if choice is choices[-1] else 0
        deltas.append(Delta(rid, terminal.attempt, seq, Kind.CHOICES, 0, data))
    return deltas
