"""Sessions in Redis: short-lived by nature. What is lost there is a new sign-in, never a revoked token reborn.

A session belongs to the run of the server that it was written to: one that comes back with old data has none.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.errors import InvalidToken, Unavailable
from schemas.control import User

LIFE_S = 14 * 86_400
"""A session that is not refreshed for so long has ended."""
AGE_S = 0.5
"""How long a session is taken to go on without asking again."""
CACHE_SIZE = 10_000

_NAME = """
local name = 'hr:session:'..string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')..':'..ARGV[1]
"""
_BEGIN = _NAME + "redis.call('SET', name, ARGV[2], 'EX', ARGV[3])"
_GET = _NAME + "return redis.call('GET', name)"
_END = _NAME + "return redis.call('DEL', name)"
_ROTATE = (
    _NAME
    + """
local raw = redis.call('GET', name)
if not raw then return false end
local session = cjson.decode(raw)
if session.refresh ~= ARGV[2] then
  redis.call('DEL', name)
  return false
end
session.refresh = ARGV[3]
redis.call('SET', name, cjson.encode(session), 'EX', ARGV[4])
return raw
"""
)


class Session(msgspec.Struct, frozen=True):
    """What Redis holds of a session."""

    user: str
    stamp: str
    """Of the user as it signed in; see `stamp_of`."""
    refresh: str
    """SHA-256 of the refresh token that is good."""

    def is_of(self, user: User) -> bool:
        """Whether it began under the role and the password that the user has now."""
        return self.stamp == stamp_of(user)


def stamp_of(user: User) -> str:
    """What changes when a user's role or password does."""
    return hashlib.sha256(f"{user.role}|{user.password_hash}".encode()).hexdigest()[:32]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Sessions:
    """Begins, refreshes and ends sessions. Every method raises `Unavailable` when Redis is away."""

    def __init__(self, redis: Redis, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._begin = redis.register_script(_BEGIN)
        self._get = redis.register_script(_GET)
        self._rotate = redis.register_script(_ROTATE)
        self._end = redis.register_script(_END)
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, Session]] = OrderedDict()

    async def begin(self, user: User) -> tuple[str, str]:
        """A new session: its id, and the refresh token, of which only the SHA-256 is kept."""
        session_id, secret = secrets.token_urlsafe(18), secrets.token_urlsafe(32)
        session = Session(user.id, stamp_of(user), _digest(secret))
        try:
            await self._begin(args=[session_id, msgspec.json.encode(session), LIFE_S])
        except (RedisError, OSError) as error:
            raise _away() from error
        return session_id, f"{session_id}.{secret}"

    async def get(self, session_id: str) -> Session | None:
        """A session that goes on; one that was ended elsewhere is seen to have within `AGE_S`."""
        now = self._clock()
        known = self._known.get(session_id)
        if known is not None and now - known[0] <= AGE_S:
            return known[1]
        try:
            raw = await self._get(args=[session_id])
        except (RedisError, OSError) as error:
            raise _away() from error
        if raw is None:
            self._known.pop(session_id, None)
            return None
        session = msgspec.json.decode(raw, type=Session)
        self._known[session_id] = (now, session)
        self._known.move_to_end(session_id)
        if len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        return session

    async def refresh(self, token: str) -> tuple[str, Session, str]:
        """The id of a session, the session, and its next refresh token.

        A token that was used before ends the session: one of the two who had it has stolen it. Raises `InvalidToken`.
        """
        session_id, _, secret = token.partition(".")
        following = secrets.token_urlsafe(32)
        try:
            raw = await self._rotate(args=[session_id, _digest(secret), _digest(following), LIFE_S])
        except (RedisError, OSError) as error:
            raise _away() from error
        if raw is None:
            self._known.pop(session_id, None)
            raise InvalidToken("The refresh token is not good, or was used before; sign in again.")
        return session_id, msgspec.json.decode(raw, type=Session), f"{session_id}.{following}"

    async def end(self, session_id: str) -> None:
        """End a session: here at once, on every replica within `AGE_S`."""
        self._known.pop(session_id, None)
        try:
            await self._end(args=[session_id])
        except (RedisError, OSError) as error:
            raise _away() from error


def _away() -> Unavailable:
    return Unavailable("Sessions cannot be checked now (Redis does not answer). Try again in a moment.")
