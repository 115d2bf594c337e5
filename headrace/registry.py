"""The read model of the control plane: models, providers and apps in memory, keys and users asked of Redis.

An answer is given only from a whole projection that was confirmed a moment ago; otherwise `Unavailable` is raised, so
that a caller sees 503 and never a 401 for a key that exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.cancellation import end
from headrace.errors import Unavailable
from headrace.projection import CHANGES, LUA_STATE, Projection, text
from schemas.control import App, Key, Model, Provider, User

__all__ = ["Projection", "Registry", "Snapshot"]

log = structlog.get_logger(__name__)

MAX_AGE_S = 5.0
"""A snapshot that Redis has not confirmed for longer is not answered from."""
POLL_S = 1.0
"""How often the version is asked for when no change is announced."""
KEY_AGE_S = 0.5
"""How long a key's record is used without asking again, while the version stands."""
KEY_CACHE_SIZE = 10_000
LOOKUP_TIMEOUT_S = 1.0

_READ_STATE = LUA_STATE + "return {gen or '', version, whole}"
_READ_ALL = (
    LUA_STATE
    + """
if whole == 0 then return {gen or '', version, 0, {}, {}, {}} end
local base = 'hr:'..gen..':'
return {gen, version, 1, redis.call('HVALS', base..'models'), redis.call('HVALS', base..'providers'),
        redis.call('HVALS', base..'apps')}
"""
)
_FIND = """
local function find(base, kind, name)
  if kind == 'user' then return redis.call('HGET', base..'users', name) end
  if kind == 'email' then
    local id = redis.call('HGET', base..'user_emails', name)
    return id and redis.call('HGET', base..'users', id)
  end
  if kind == 'id' then name = redis.call('HGET', base..'key_ids', name) end
  return name and redis.call('HGET', base..'keys', name)
end
"""
_READ_KEY = (
    LUA_STATE
    + _FIND
    + """
if whole == 0 then return {gen or '', version, 0, false} end
return {gen, version, 1, find('hr:'..gen..':', ARGV[2], ARGV[1])}
"""
)
_READ_CALLERS = (
    LUA_STATE
    + _FIND
    + """
local found = {}
for i = 1, #ARGV, 2 do found[#found + 1] = whole == 1 and find('hr:'..gen..':', ARGV[i], ARGV[i + 1]) end
return {whole, found}
"""
)


class Snapshot(msgspec.Struct, frozen=True):
    """The control plane at one version, as every part of one decision should see it."""

    models: Mapping[str, Model]
    aliases: Mapping[str, str]
    """Alias -> model id; only of enabled models."""
    providers: Mapping[str, Provider]
    apps: Mapping[str, App]
    version: int

    def resolve(self, name: str) -> Model | None:
        """The enabled model with this id or alias, or that of a name `id:adapter`; None when there is none."""
        model = self._named(name)
        if model is not None:
            return model
        model = self._named(name.rpartition(":")[0])
        return model if model is not None and model.adapter(name) else None

    def _named(self, name: str) -> Model | None:
        model = self.models.get(name)
        if model is None or not model.enabled:  # The name of a model that is gone may live on as another's alias.
            model = self.models.get(self.aliases.get(name, ""))
        return model


def snapshot_of(models: list[bytes], providers: list[bytes], apps: list[bytes], version: int) -> Snapshot:
    """A snapshot made of JSON records."""
    decoded = sorted((msgspec.json.decode(raw, type=Model) for raw in models), key=lambda model: model.id)
    return Snapshot(
        models={model.id: model for model in decoded},
        aliases={alias: model.id for model in decoded if model.enabled for alias in model.aliases},
        providers={found.name: found for found in (msgspec.json.decode(raw, type=Provider) for raw in providers)},
        apps={found.id: found for found in (msgspec.json.decode(raw, type=App) for raw in apps)},
        version=version,
    )


_Name = tuple[str, str]
"""By what a key or a user is asked for: (`sha256` or `id` of a key, `user` for a user's id, or `email`; its value)."""
Caller = Key | User


_TYPES: dict[str, type[Caller]] = {"sha256": Key, "id": Key, "user": User, "email": User}


class _Cached(NamedTuple):
    record: Caller
    generation: str
    version: int
    read_at: float


class Registry:
    """Follows the control plane; a change is seen within 250 ms. `clock` gives monotonic seconds."""

    def __init__(self, redis: Redis, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._read_state = redis.register_script(_READ_STATE)
        self._read_all = redis.register_script(_READ_ALL)
        self._read_key = redis.register_script(_READ_KEY)
        self._read_callers = redis.register_script(_READ_CALLERS)
        self._snapshot: Snapshot | None = None
        self._generation = ""
        self._confirmed_at = float("-inf")
        self._cached: OrderedDict[_Name, _Cached] = OrderedDict()
        self._lookups: dict[_Name, asyncio.Task[Caller | None]] = {}
        self._announced = asyncio.Event()
        self._refreshing = asyncio.Lock()
        """Of two that read at once, the one with the older answer must not come last."""
        self._refreshed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read the control plane once, if it can be read, and follow it from here on."""
        await self._try_refresh()
        self._tasks = [
            asyncio.create_task(self._poll(), name="registry-poll"),
            asyncio.create_task(self._listen(), name="registry-listen"),
        ]

    async def stop(self) -> None:
        """Stop following. The Redis client stays open; it is its maker's."""
        await end(*self._tasks)
        self._tasks = []

    @property
    def snapshot(self) -> Snapshot:
        """The control plane as it is. Raises `Unavailable` when it is not known to be whole and current."""
        if self._snapshot is None:
            raise Unavailable("The control plane is not complete yet. Try again in a moment.")
        if self._clock() - self._confirmed_at > MAX_AGE_S:
            raise Unavailable("The control plane cannot be reached. Try again in a moment.")
        return self._snapshot

    async def confirmed(self) -> Snapshot:
        """The control plane as Redis has it now, for who must not judge by an older one. Raises `Unavailable`."""
        if not await self._try_refresh():
            raise Unavailable("The control plane cannot be reached. Try again in a moment.")
        return self.snapshot

    async def moved(self, seen: int, timeout: float) -> int:
        """The version of the control plane, as soon as it is another than `seen`, at the latest after `timeout` s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._refreshed:
                await self._refreshed.wait_for(lambda: self._version() != seen)
        return self._version()

    async def wait_complete(self, timeout: float) -> Snapshot:
        """Wait until there is a snapshot. Raises `Unavailable` after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout), self._refreshed:
                while True:
                    with contextlib.suppress(Unavailable):
                        return self.snapshot
                    await self._refreshed.wait()
        except TimeoutError:
            raise Unavailable(f"The control plane was not complete within {timeout:g} s.") from None

    async def key(self, sha256_hex: str) -> Key | None:
        """The key with this digest, enabled or not; None when there is none.

        What is not cached is asked of Redis, so that a new key works at once. Raises `Unavailable` when Redis is away
        or its projection is incomplete.
        """
        return _if_key(await self._find(("sha256", sha256_hex)))

    async def key_by_id(self, key_id: str) -> Key | None:
        """The key with this id, as `key` finds it by its digest: for those who handle requests that it has sent."""
        return _if_key(await self._find(("id", key_id)))

    async def user(self, user_id: str, *, fresh: bool = False) -> User | None:
        """The user with this id, enabled or not. `fresh` asks Redis in any case. Raises `Unavailable`."""
        name = ("user", user_id)
        return _if_user(await (self._lookup(name) if fresh else self._find(name)))

    async def user_by_email(self, email: str) -> User | None:
        """The user with this address, as Redis has it now. Raises `Unavailable`."""
        return _if_user(await self._lookup(("email", email)))

    async def callers(self, names: Sequence[_Name]) -> list[Caller | None]:
        """Keys and users as Redis has them now, in one question, in the order of their names. Raises `Unavailable`."""
        if not names:
            return []
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                whole, found = await self._read_callers(args=[part for name in names for part in name])
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("Keys cannot be checked now. Try again in a moment.") from error
        if not whole:
            raise Unavailable("The control plane is not complete yet. Try again in a moment.")
        return [
            msgspec.json.decode(raw, type=_TYPES[name[0]]) if raw is not None else None
            for name, raw in zip(names, found, strict=True)
        ]

    async def _find(self, name: _Name) -> Caller | None:
        now, snapshot = self._clock(), self.snapshot
        cached = self._cached.get(name)
        if (
            cached is not None
            and now - cached.read_at <= KEY_AGE_S
            and (cached.generation, cached.version) == (self._generation, snapshot.version)
        ):
            return cached.record
        running = self._lookups.get(name)
        if running is not None:
            found = await asyncio.shield(running)
            if found is not None:
                return found
            # That question may have been put before the record was made, so ask once more.
        task = asyncio.create_task(self._lookup(name))
        self._lookups[name] = task
        task.add_done_callback(lambda done: self._forget_lookup(name, done))
        return await asyncio.shield(task)

    def _forget_lookup(self, name: _Name, task: asyncio.Task[Caller | None]) -> None:
        if self._lookups.get(name) is task:
            del self._lookups[name]
        if not task.cancelled():
            task.exception()  # Its callers have it; without one, nobody waits for it.

    async def _lookup(self, name: _Name) -> Caller | None:
        asked_at = self._clock()
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                generation, version, whole, raw = await self._read_key(args=[name[1], name[0]])
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("The key cannot be checked now. Try again in a moment.") from error
        if not whole:
            self._snapshot = None
            self._announced.set()
            raise Unavailable("The control plane is not complete yet. Try again in a moment.")
        if (text(generation), int(version)) != (self._generation, self._version()):
            self._announced.set()
        if raw is None:
            self._cached.pop(name, None)
            return None
        record = msgspec.json.decode(raw, type=_TYPES[name[0]])
        self._cached[name] = _Cached(record, text(generation), int(version), asked_at)
        self._cached.move_to_end(name)
        if len(self._cached) > KEY_CACHE_SIZE:
            self._cached.popitem(last=False)
        return record

    def _version(self) -> int:
        return self._snapshot.version if self._snapshot is not None else 0

    async def _poll(self) -> None:
        while True:
            wait = POLL_S if self._snapshot is not None else POLL_S / 5
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._announced.wait()
            self._announced.clear()
            await self._try_refresh()

    async def _try_refresh(self) -> bool:
        """Ask Redis how the control plane is now; whether it answered."""
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S), self._refreshing:
                await self._refresh()
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("registry_unconfirmed", error=repr(error))
        except (msgspec.DecodeError, ValueError) as error:
            log.error("registry_unreadable", error=repr(error))
        else:
            async with self._refreshed:
                self._refreshed.notify_all()
            return True
        return False

    async def _refresh(self) -> None:
        asked_at = self._clock()
        generation, version, whole = await self._read_state()
        held = (self._generation, self._version())
        if whole and self._snapshot is not None and (text(generation), int(version)) == held:
            self._confirmed_at = asked_at
            return
        generation, version, whole, models, providers, apps = await self._read_all()
        if not whole:
            self._snapshot = None
            return
        self._snapshot = snapshot_of(models, providers, apps, int(version))
        self._generation = text(generation)
        self._confirmed_at = asked_at
        self._cached.clear()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(CHANGES)
                    self._announced.set()
                    while True:
                        message = await channel.get_message(timeout=POLL_S)
                        if message is not None:
                            self._announced.set()
            except (RedisError, OSError, RuntimeError) as error:  # the last is uvloop's, of a closed transport
                log.warning("registry_not_listening", error=repr(error))
                await asyncio.sleep(POLL_S)


def _if_key(found: Caller | None) -> Key | None:
    return found if isinstance(found, Key) else None


def _if_user(found: Caller | None) -> User | None:
    return found if isinstance(found, User) else None
