"""Lockout: sign-ins that fail make the next ones wait, by account and by address, twice as long each time.

An attempt counts before its password is looked at, so that many at once are not many guesses; one that succeeds takes
back what it counted. Accounts that do not exist are counted like others.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace.errors import TooManyAttempts, Unavailable

FREE_BY_ACCOUNT, FREE_BY_ADDRESS = 5, 50
"""Failures in a row that cost no wait; many people may share an address."""
FIRST_WAIT_MS, LONGEST_WAIT_MS = 1_000, 900_000
FORGOTTEN_S = 3_600
"""After so long without an attempt the counts begin anew."""

_ATTEMPT = """
local left = 0
for i = 1, 2 do left = math.max(left, redis.call('PTTL', ARGV[i]..':locked')) end
if left > 0 then return {left, 0} end
local locked = 0
for i = 1, 2 do
  local count = redis.call('INCR', ARGV[i])
  redis.call('EXPIRE', ARGV[i], ARGV[7])
  local over = count - tonumber(ARGV[i + 2])
  if over > 0 then
    local wait = math.min(tonumber(ARGV[5]) * 2 ^ math.min(over - 1, 30), tonumber(ARGV[6]))
    redis.call('SET', ARGV[i]..':locked', '1', 'PX', string.format('%.0f', wait))
    if i == 2 then locked = 1 end
  end
end
return {0, locked}
"""
_SUCCEEDED = """
redis.call('DEL', ARGV[1], ARGV[1]..':locked')
if redis.call('EXISTS', ARGV[2]) == 1 then redis.call('DECR', ARGV[2]) end
if ARGV[3] == '1' then redis.call('DEL', ARGV[2]..':locked') end
"""


class Attempt(NamedTuple):
    """An attempt that was let through."""

    account: str
    address: str
    locked: int
    """Whether it made others from its address wait."""


class Attempts:
    """Counts over Redis. Every method raises `Unavailable` when it is away: then nobody signs in."""

    def __init__(self, redis: Redis) -> None:
        self._attempt = redis.register_script(_ATTEMPT)
        self._succeeded = redis.register_script(_SUCCEEDED)

    async def begin(self, account: str, address: str) -> Attempt:
        """Count an attempt. Raises `TooManyAttempts` while the account or the address has to wait."""
        names = _name("account", account), _name("address", address)
        bounds = FREE_BY_ACCOUNT, FREE_BY_ADDRESS, FIRST_WAIT_MS, LONGEST_WAIT_MS, FORGOTTEN_S
        try:
            left_ms, locked = await self._attempt(args=[*names, *bounds])
        except (RedisError, OSError) as error:
            raise Unavailable("Nobody can sign in now (Redis does not answer). Try again in a moment.") from error
        if left_ms > 0:
            wait_s = math.ceil(left_ms / 1000)
            raise TooManyAttempts(f"Too many sign-ins failed; try again in {wait_s} s.", retry_after_s=wait_s)
        return Attempt(*names, locked)

    async def succeeded(self, attempt: Attempt) -> None:
        """The password was right: the account's count begins anew."""
        try:
            await self._succeeded(args=list(attempt))
        except (RedisError, OSError) as error:
            raise Unavailable("Nobody can sign in now (Redis does not answer). Try again in a moment.") from error


def _name(kind: str, value: str) -> str:
    return f"hr:signin:{kind}:{hashlib.sha256(value.encode()).hexdigest()[:32]}"
