"""The control plane in Redis, as it is written: generations of hashes, filled from Kafka and kept by source offset.

Keys: `hr:gen` names the generation in force. Under it stand hashes `hr:<n>:<kind>`, one a kind of `CONTROL_RECORDS`
(natural key -> JSON record), `hr:<n>:key_ids` (id of an API key -> its natural key), `hr:<n>:user_emails` (address ->
id of the user), `hr:<n>:offsets` (source topic -> next offset), the counter `hr:<n>:version` and `hr:<n>:complete`.
The marker holds the `run_id` of the server it was written to: a server that came back, empty or from an old snapshot,
has another one, so that its content counts as incomplete until the control processor has compared it with Kafka.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from headrace.errors import Unavailable
from topics.catalogue import CONTROL_RECORDS

CHANGES = "hr:changes"
"""Channel that carries the new version after every change."""
FILL_TTL_S = 900
"""An unfinished generation, whose builder died, is forgotten after this long."""
_CHUNK = 500
OUTCOME_TTL_S = 3600
"""How long it can be asked what became of a command."""

LUA_STATE = """
local gen = redis.call('GET', 'hr:gen')
local version, whole, offsets = '0', 0, {}
if gen then
  version = redis.call('GET', 'hr:'..gen..':version') or '0'
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  if redis.call('GET', 'hr:'..gen..':complete') == run then whole = 1 end
end
"""
"""Prefix of every reading script: the generation in force, its version, and whether it is whole on this server."""

_READ_OFFSETS = (
    LUA_STATE + "return {gen or '', version, whole, gen and redis.call('HGETALL', 'hr:'..gen..':offsets') or {}}"
)

_READ_KIND = LUA_STATE + "return {whole, whole == 1 and redis.call('HVALS', 'hr:'..gen..':'..ARGV[1]) or {}}"

_READ_SOME = (
    LUA_STATE + "return {whole, whole == 1 and redis.call('HMGET', 'hr:'..gen..':'..ARGV[1], unpack(ARGV, 2)) or {}}"
)

_APPLY = (
    LUA_STATE
    + """
local outcomes, known, moved, base = {}, {}, {}, 'hr:'..(gen or '')..':'
for i = 1, #ARGV, 6 do
  local kind, key, topic, offset, value = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), nil
  if ARGV[i + 4] == '1' then value = ARGV[i + 5] end
  if whole == 1 and not known[topic] then known[topic] = tonumber(redis.call('HGET', base..'offsets', topic) or '0') end
  if whole == 0 then
    outcomes[#outcomes + 1] = 'incomplete'
  elseif offset < known[topic] then
    outcomes[#outcomes + 1] = 'known'
  else
    if kind == 'keys' then
      local before = redis.call('HGET', base..kind, key)
      if before then redis.call('HDEL', base..'key_ids', cjson.decode(before).id) end
      if value then redis.call('HSET', base..'key_ids', cjson.decode(value).id, key) end
    elseif kind == 'users' then
      local before = redis.call('HGET', base..kind, key)
      if before then
        local email = cjson.decode(before).email
        if redis.call('HGET', base..'user_emails', email) == key then redis.call('HDEL', base..'user_emails', email) end
      end
      if value then redis.call('HSET', base..'user_emails', cjson.decode(value).email, key) end
    end
    if kind ~= '' then
      if value then redis.call('HSET', base..kind, key, value) else redis.call('HDEL', base..kind, key) end
    end
    known[topic], moved[topic] = offset + 1, true
    outcomes[#outcomes + 1] = 'applied'
  end
end
for topic in pairs(moved) do redis.call('HSET', base..'offsets', topic, string.format('%.0f', known[topic])) end
if next(moved) then redis.call('PUBLISH', 'hr:changes', redis.call('INCR', base..'version')) end
return outcomes
"""
)

_TELL = f"""
for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[i], 'EX', {OUTCOME_TTL_S}, 'NX') end
"""

_FLIP = """
local gen, token, force = ARGV[1], ARGV[2], ARGV[3]
local base = 'hr:'..gen..':'
if redis.call('GET', base..'filling') ~= token then return 'lost' end
local old = redis.call('GET', 'hr:gen')
local time = redis.call('TIME')
local version = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if old then
  for i = 4, #ARGV, 2 do
    local known = tonumber(redis.call('HGET', 'hr:'..old..':offsets', ARGV[i]) or '0')
    if force ~= '1' and known > tonumber(ARGV[i + 1]) then return 'behind' end
  end
  version = math.max(version, tonumber(redis.call('GET', 'hr:'..old..':version') or '0') + 1)
end
for _, part in ipairs({'models', 'providers', 'apps', 'users', 'keys', 'replays', 'erasures', 'key_ids', 'user_emails',
                       'offsets'}) do
  redis.call('PERSIST', base..part)
  if old and old ~= gen then redis.call('UNLINK', 'hr:'..old..':'..part) end
end
if old and old ~= gen then redis.call('UNLINK', 'hr:'..old..':version', 'hr:'..old..':complete') end
redis.call('DEL', base..'filling')
redis.call('SET', base..'version', string.format('%.0f', version))
redis.call('SET', base..'complete', string.match(redis.call('INFO', 'server'), 'run_id:(%w+)'))
redis.call('SET', 'hr:gen', gen)
redis.call('PUBLISH', 'hr:changes', string.format('%.0f', version))
return 'flipped'
"""


class Outcome(StrEnum):
    """What became of a record that was applied."""

    APPLIED = "applied"
    KNOWN = "known"
    """The projection already held this offset."""
    INCOMPLETE = "incomplete"
    """There is no whole generation to apply it to: rebuild, then apply again."""


PRECONDITION, EXISTS = "precondition", "exists"
"""Codes of refusals: the record is not the one that was seen; there is one where there should be none."""


class CommandOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the control processor made of a command: `applied`, `unchanged` or `refused`, and why."""

    id: str
    status: str
    reason: str = ""
    code: str = ""
    """Of a refusal: `PRECONDITION`, `EXISTS`, or empty for what no other command would mend."""


class Applied(NamedTuple):
    """A durable record that is to come into force; see `Projection.apply`."""

    kind: str
    key: str
    value: bytes | None
    topic: str
    offset: int


class State(NamedTuple):
    """How far the projection is."""

    generation: str
    version: int
    complete: bool
    offsets: dict[str, int]
    """Next offset of each source topic."""


def text(value: bytes | str) -> str:
    """A Redis answer as text, whether the client decodes answers or not."""
    return value.decode() if isinstance(value, bytes) else value


class Projection:
    """Writes control records into Redis, each once, in the order of its source topic."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._apply = redis.register_script(_APPLY)
        self._state = redis.register_script(_READ_OFFSETS)
        self._flip = redis.register_script(_FLIP)
        self._tell = redis.register_script(_TELL)
        self._kind = redis.register_script(_READ_KIND)
        self._some = redis.register_script(_READ_SOME)

    async def state(self) -> State:
        """How far the projection is, in one atomic read."""
        generation, version, whole, pairs = await self._state()
        names = [text(item) for item in pairs]
        offsets = {topic: int(offset) for topic, offset in zip(names[::2], names[1::2], strict=True)}
        return State(text(generation), int(version), bool(whole), offsets)

    async def apply(self, kind: str, key: str, value: bytes | None, *, topic: str, offset: int) -> Outcome:
        """Put one record of `topic` at `offset` into force; None deletes it.

        An empty `kind` only moves the offset on.
        """
        [outcome] = await self.apply_all([Applied(kind, key, value, topic, offset)])
        return outcome

    async def apply_all(self, records: Sequence[Applied]) -> list[Outcome]:
        """Put records into force one after the other, some hundred in each round trip; what became of each."""
        outcomes: list[Outcome] = []
        for start in range(0, len(records), _CHUNK):
            arguments: list[str | bytes | int] = []
            for one in records[start : start + _CHUNK]:
                arguments += (one.kind, one.key, one.topic, one.offset, int(one.value is not None), one.value or b"")
            outcomes += [Outcome(text(answer)) for answer in await self._apply(args=arguments)]
        return outcomes

    async def records(self, kind: str) -> list[bytes]:
        """All records of one kind, as JSON. Raises `Unavailable` when the projection is incomplete."""
        return await self._whole(self._kind(args=[kind]))

    async def some(self, kind: str, keys: Sequence[str]) -> list[bytes]:
        """Those of some records of one kind that there are, as JSON. Raises `Unavailable` as `records` does."""
        return await self._whole(self._some(args=[kind, *keys])) if keys else []

    async def _whole(self, reading: Awaitable[tuple[int, list[bytes | str | None]]]) -> list[bytes]:
        whole, values = await reading
        if not whole:
            raise Unavailable("The control plane is not complete. Is the control role running? Try again in a moment.")
        return [value.encode() if isinstance(value, str) else value for value in values if value is not None]

    async def tell(self, outcomes: Sequence[CommandOutcome]) -> None:
        """Let senders of commands know what became of them. What was told first stands: a command may come twice."""
        for start in range(0, len(outcomes), _CHUNK):
            chunk = outcomes[start : start + _CHUNK]
            await self._tell([_outcome_key(one.id) for one in chunk], [msgspec.json.encode(one) for one in chunk])

    async def outcome(self, command_id: str) -> CommandOutcome | None:
        """What became of a command; None when that is not known (yet, or any more)."""
        raw = await self._redis.get(_outcome_key(command_id))
        return msgspec.json.decode(raw, type=CommandOutcome) if raw is not None else None

    async def begin(self, records: Mapping[str, Mapping[str, bytes]], offsets: Mapping[str, int]) -> Fill:
        """Write a whole new generation beside the one in force."""
        seconds, micros = await self._redis.time()
        fill = Fill(f"{seconds * 1_000_000 + micros}", secrets.token_hex(8))
        base = f"hr:{fill.generation}:"
        await self._redis.set(base + "filling", fill.token, ex=FILL_TTL_S)
        ids = {msgspec.json.decode(raw, type=_KeyId).id: digest for digest, raw in records.get("keys", {}).items()}
        emails = {
            msgspec.json.decode(raw, type=_UserEmail).email: name for name, raw in records.get("users", {}).items()
        }
        hashes: dict[str, Mapping[str, bytes | str]] = {**records, "key_ids": ids, "user_emails": emails}
        for kind, held in hashes.items():
            items = list(held.items())
            for start in range(0, len(items), _CHUNK):
                await self._redis.hset(base + kind, mapping=dict(items[start : start + _CHUNK]))
                await self._redis.expire(base + kind, FILL_TTL_S)
        if offsets:
            await self._redis.hset(base + "offsets", mapping={topic: str(offset) for topic, offset in offsets.items()})
            await self._redis.expire(base + "offsets", FILL_TTL_S)
        return fill

    async def flip(self, fill: Fill, offsets: Mapping[str, int], *, force: bool = False) -> str:
        """Put a filled generation into force: `flipped`, or `behind` the one in force, or `lost` by the server."""
        pairs: list[str | int] = [part for item in offsets.items() for part in item]
        return text(await self._flip(args=[fill.generation, fill.token, int(force), *pairs]))

    async def drop(self, fill: Fill) -> None:
        """Forget a filled generation that will not be put into force."""
        parts = (*CONTROL_RECORDS, "key_ids", "user_emails", "offsets", "filling")
        await self._redis.unlink(*(f"hr:{fill.generation}:{part}" for part in parts))


class Fill(NamedTuple):
    """A generation being filled; the token tells whether the server has forgotten it meanwhile."""

    generation: str
    token: str


class _KeyId(msgspec.Struct):
    """The part of a key's record by which it is found."""

    id: str


class _UserEmail(msgspec.Struct):
    """The part of a user's record by which it is found."""

    email: str


def _outcome_key(command_id: str) -> str:
    return f"hr:control:outcome:{command_id}"
