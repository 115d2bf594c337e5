"""The scripts that admit, bind, settle and restore: each one atomic step in Redis, timed by its clock alone.

Keys, all below `hr:lim:`. A `ref` is `tenant:request_id`, a scope `key:…`, `app:…` or `model:…`.

| key | holds |
|---|---|
| `r:<ref>` | a reservation, packed: see `FIELDS` |
| `pending` | ref -> microsecond at which a reservation that is not bound yet is gone |
| `bound` | ref -> microsecond at which it was bound; only its terminal ends it |
| `w:<scope>` | the requests of the last 60 s: `ref:tokens` -> microsecond of admission |
| `t:<scope>` | sum of the tokens in its window |
| `open` | scope -> requests without a terminal |
| `held:<month>`, `spent:<month>` | scope -> money reserved, and settled: `whole pico` |
| `log` | partition of `inference.log` -> next offset to settle |
| `whole` | `run_id` of the server on which all this is known to be complete |
"""

from __future__ import annotations

PREFIX = "hr:lim:"
PENDING_US = 10_000_000
"""A reservation whose request the brokers have not taken within this time is gone."""
SWEEP = 64
"""Reservations that one call clears away at most; what is left still counts as held, so that nothing is exceeded."""

FIELDS = ("state", "at", "month", "tokens", "whole", "pico", "completion", "model", "names", "windowed")
"""A packed reservation. States: `p`ending, `a`ccepted by the brokers, `r`outed, `d`one; `x` is refused by the router,
and then holds the answer in place of the rest."""

_COMMON = """
local UNIT, WINDOW = 1000000000000, 60000000
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

local function whole()
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  return redis.call('GET', 'hr:lim:whole') == run
end

local function int(number) return string.format('%.0f', number) end

local function plus(w, p, w2, p2)
  w, p = w + w2, p + p2
  if p >= UNIT then w, p = w + 1, p - UNIT end
  return w, p
end

local function minus(w, p, w2, p2)
  w, p = w - w2, p - p2
  if p < 0 then w, p = w - 1, p + UNIT end
  return w, p
end

local function over(w, p, w2, p2) return w > w2 or (w == w2 and p > p2) end

local function amount(key, name)
  local held = redis.call('HGET', key, name)
  if not held then return 0, 0 end
  local w, p = string.match(held, '^(%d+) (%d+)$')
  return tonumber(w), tonumber(p)
end

local function set_amount(key, name, w, p)
  if w < 0 or (w == 0 and p == 0) then redis.call('HDEL', key, name)
  else redis.call('HSET', key, name, int(w)..' '..int(p)) end
end

local function count(key, name, change)
  if redis.call('HINCRBY', key, name, int(change)) <= 0 then redis.call('HDEL', key, name) end
end

-- Both keys of a window end together, when nothing in it could count any more.
local function window_tokens(name, change)
  local key = 'hr:lim:t:'..name
  if redis.call('INCRBY', key, int(change)) <= 0 then redis.call('DEL', key) end
  redis.call('PEXPIRE', key, WINDOW / 1000)
  redis.call('PEXPIRE', 'hr:lim:w:'..name, WINDOW / 1000)
end

local function window_add(name, ref, at, tokens)
  if redis.call('ZADD', 'hr:lim:w:'..name, 'NX', int(at), ref..':'..int(tokens)) == 1 then
    window_tokens(name, tokens)
  end
end

-- Let a request leave the window, or stay in it with other tokens than it entered with.
local function window_change(name, ref, at, from, to)
  local key = 'hr:lim:w:'..name
  if redis.call('ZREM', key, ref..':'..int(from)) == 1 then
    if to then redis.call('ZADD', key, int(at), ref..':'..int(to)) end
    window_tokens(name, (to or 0) - from)
  end
end

local function trim(name)
  local key, past = 'hr:lim:w:'..name, int(now - WINDOW)
  local old, gone = redis.call('ZRANGEBYSCORE', key, '-inf', past), 0
  if #old == 0 then return end
  for _, member in ipairs(old) do gone = gone + tonumber(string.match(member, ':(%d+)$')) end
  redis.call('ZREMRANGEBYSCORE', key, '-inf', past)
  window_tokens(name, -gone)
end

local function split(names)
  local found = {}
  for name in string.gmatch(names, '[^\\n]+') do found[#found + 1] = name end
  return found
end

local function unpacked(raw)
  local r = cmsgpack.unpack(raw)
  return {state = r[1], at = r[2], month = r[3], tokens = r[4], whole = r[5], pico = r[6], completion = r[7],
          model = r[8], names = r[9], windowed = r[10]}
end

local function packed(r)
  return cmsgpack.pack({r.state, r.at, r.month, r.tokens, r.whole, r.pico, r.completion, r.model, r.names,
                        r.windowed})
end

-- Give a reservation back. Its request stays in the windows, with the tokens that it came to; without them it leaves.
local function release(ref, r, tokens)
  for at, name in ipairs(split(r.names)) do
    count('hr:lim:open', name, -1)
    local key = 'hr:lim:held:'..r.month
    local w, p = amount(key, name)
    w, p = minus(w, p, r.whole, r.pico)
    set_amount(key, name, w, p)
    if string.sub(r.windowed, at, at) == '1' then window_change(name, ref, r.at, r.tokens, tokens) end
  end
  redis.call('ZREM', 'hr:lim:pending', ref)
  redis.call('ZREM', 'hr:lim:bound', ref)
  redis.call('DEL', 'hr:lim:r:'..ref)
end

-- What was reserved and never accepted is gone, as if it had not been.
local function sweep()
  for _, ref in ipairs(redis.call('ZRANGEBYSCORE', 'hr:lim:pending', '-inf', int(now), 'LIMIT', 0, @SWEEP@)) do
    local raw = redis.call('GET', 'hr:lim:r:'..ref)
    if raw then release(ref, unpacked(raw), nil) else redis.call('ZREM', 'hr:lim:pending', ref) end
  end
end

-- Month of a moment: days to civil, Howard Hinnant's algorithm.
local function month_of(microseconds)
  local z = math.floor(microseconds / 86400000000) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return string.format('%04d%02d', yoe + era * 400 + (month <= 2 and 1 or 0), month)
end
""".replace("@SWEEP@", str(SWEEP))

ADMIT = (
    _COMMON
    + """
local ref, mode, month, kept_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[11]
local want = {tokens = tonumber(ARGV[4]), whole = tonumber(ARGV[5]), pico = tonumber(ARGV[6]),
              completion = tonumber(ARGV[7]), model = ARGV[8], at = now}
local marked, restoring = tonumber(ARGV[9]), mode == 'restore' or mode == 'restore accepted'
if restoring then want.at = tonumber(ARGV[10]) end
if not restoring and not whole() then return {'incomplete'} end
if month == '' then month = month_of(now) end
want.month = month

local scopes, names, windowed = {}, {}, {}
for i = 12, #ARGV, 6 do
  local scope = {name = ARGV[i], rpm = tonumber(ARGV[i + 1]), tpm = tonumber(ARGV[i + 2]),
                 open = tonumber(ARGV[i + 3]), whole = tonumber(ARGV[i + 4]), pico = tonumber(ARGV[i + 5])}
  scopes[#scopes + 1], names[#names + 1] = scope, scope.name
  windowed[#windowed + 1] = (scope.rpm or scope.tpm) and '1' or '0'
end
want.names, want.windowed = table.concat(names, '\\n'), table.concat(windowed)

sweep()

local function answer(verdict, r, rest)
  local told = {verdict, int(now), month, r and r.state or '', r and r.model or '', r and r.completion or 0}
  for i = 1, 5 do told[#told + 1] = rest and rest[i] or '' end
  for _, scope in ipairs(scopes) do
    local key = 'hr:lim:w:'..scope.name
    if not scope.trimmed then trim(scope.name) end
    local newest = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')
    told[#told + 1] = redis.call('ZCARD', key)
    told[#told + 1] = redis.call('GET', 'hr:lim:t:'..scope.name) or '0'
    told[#told + 1] = newest[2] and int(tonumber(newest[2]) + WINDOW - now) or '0'
  end
  return told
end

local function store(r)
  redis.call('SET', 'hr:lim:r:'..ref, packed(r))
  if r.state == 'p' then redis.call('ZADD', 'hr:lim:pending', int(now + marked), ref)
  else
    redis.call('ZREM', 'hr:lim:pending', ref)
    redis.call('ZADD', 'hr:lim:bound', int(now), ref)
  end
end

local raw = redis.call('GET', 'hr:lim:r:'..ref)
if raw then
  local r = unpacked(raw)
  if r.state == 'd' then return answer('known', r) end
  if r.state == 'x' then
    if mode == 'route' then return answer('refused', nil, cmsgpack.unpack(raw)[2]) end
  elseif restoring or r.state == 'r' then return answer('held', r)
  elseif mode == 'reserve' then
    if r.state == 'p' then store(r) end
    return answer('held', r)
  elseif r.model == want.model and r.month == month and r.tokens == want.tokens and r.whole == want.whole
      and r.pico == want.pico and r.names == want.names then
    r.state = 'r'
    store(r)
    return answer('held', r)
  else
    release(ref, r, nil)
  end
end

local NEVER, MONTH = -1, -2
local worst
local function refuse(limit, scope, most, left, retry)
  local rank = retry == NEVER and 2e15 or retry == MONTH and 1e15 or retry
  if not worst or rank > worst.rank then
    worst = {rank = rank, told = {limit, scope.name, most, left, int(retry)}}
  end
end

if not restoring then
  for _, scope in ipairs(scopes) do
    local key = 'hr:lim:w:'..scope.name
    trim(scope.name)
    scope.trimmed = true
    if scope.rpm then
      local used = redis.call('ZCARD', key)
      if used + 1 > scope.rpm then
        local retry = NEVER
        if scope.rpm > 0 then
          local at = redis.call('ZRANGE', key, used - scope.rpm, used - scope.rpm, 'WITHSCORES')
          retry = tonumber(at[2]) + WINDOW - now
        end
        refuse('requests', scope, int(scope.rpm), int(math.max(0, scope.rpm - used)), retry)
      end
    end
    if scope.tpm then
      local used = tonumber(redis.call('GET', 'hr:lim:t:'..scope.name) or '0')
      if used + want.tokens > scope.tpm then
        local retry, excess, from = NEVER, used + want.tokens - scope.tpm, 0
        while want.tokens <= scope.tpm and excess > 0 do
          local old = redis.call('ZRANGE', key, from, from + 99, 'WITHSCORES')
          if #old == 0 then break end
          for i = 1, #old, 2 do
            excess = excess - tonumber(string.match(old[i], ':(%d+)$'))
            retry = tonumber(old[i + 1]) + WINDOW - now
            if excess <= 0 then break end
          end
          from = from + 100
        end
        refuse('tokens', scope, int(scope.tpm), int(math.max(0, scope.tpm - used)), retry)
      end
    end
    if scope.open then
      local used = tonumber(redis.call('HGET', 'hr:lim:open', scope.name) or '0')
      if used + 1 > scope.open then
        refuse('concurrency', scope, int(scope.open), int(math.max(0, scope.open - used)),
               scope.open > 0 and 1000000 or NEVER)
      end
    end
    if scope.whole then
      local w, p = amount('hr:lim:spent:'..month, scope.name)
      local sw, sp = plus(w, p, want.whole, want.pico)
      w, p = plus(w, p, amount('hr:lim:held:'..month, scope.name))
      local tw, tp = plus(w, p, want.whole, want.pico)
      if over(tw, tp, scope.whole, scope.pico) then
        local lw, lp = minus(scope.whole, scope.pico, w, p)
        if lw < 0 then lw, lp = 0, 0 end
        refuse('budget', scope, int(scope.whole)..' '..int(scope.pico), int(lw)..' '..int(lp),
               over(sw, sp, scope.whole, scope.pico) and MONTH or 1000000)
      end
    end
  end
end

if worst then
  if mode == 'route' then
    redis.call('SET', 'hr:lim:r:'..ref, cmsgpack.pack({'x', worst.told}), 'PX', kept_ms)
  end
  return answer('refused', nil, worst.told)
end

for at, scope in ipairs(scopes) do
  redis.call('HINCRBY', 'hr:lim:open', scope.name, 1)
  local key = 'hr:lim:held:'..month
  local w, p = amount(key, scope.name)
  w, p = plus(w, p, want.whole, want.pico)
  set_amount(key, scope.name, w, p)
  if windowed[at] == '1' and want.at > now - WINDOW then
    window_add(scope.name, ref, want.at, want.tokens)
  end
end
want.state = mode == 'reserve' and 'p' or mode == 'restore accepted' and 'a' or 'r'
store(want)
return answer('admitted', want)
"""
)
"""Admit a request against all its scopes, or none.

ARGV: ref, mode (`reserve` by an ingress, `route` by the router, `restore` by a rebuild, of what was routed, and
`restore accepted`, of what was not: without checks), month or ''
for that of now, tokens, whole, pico, completion, model, how long it stays pending (µs), when it was accepted (µs; of
`restore`), how long a refusal is remembered (ms), then of each scope: name, rpm, tpm, concurrency, whole, pico.
Returns verdict, now, month, state, model, completion, the refusal's limit, scope, most, left and retry (µs; -1 never,
-2 next month), then of each scope: requests and tokens in its window, and µs until it is empty.
"""

BIND = (
    _COMMON
    + """
local raw = redis.call('GET', 'hr:lim:r:'..ARGV[1])
if not raw then return 0 end
local r = unpacked(raw)
if r.state ~= 'p' then return 0 end
r.state = 'a'
redis.call('SET', 'hr:lim:r:'..ARGV[1], packed(r))
redis.call('ZREM', 'hr:lim:pending', ARGV[1])
redis.call('ZADD', 'hr:lim:bound', int(now), ARGV[1])
return 1
"""
)
"""The brokers have the request: its reservation has no expiry any more. ARGV: ref."""

CANCEL = (
    _COMMON
    + """
local raw = redis.call('GET', 'hr:lim:r:'..ARGV[1])
if not raw then return 0 end
local r = unpacked(raw)
if r.state ~= 'p' then return 0 end
release(ARGV[1], r, nil)
return 1
"""
)
"""Nothing was published: a pending reservation is gone as if it had not been. ARGV: ref."""

_DONE = """
local function done(ref, tokens, kept_ms)
  local raw = redis.call('GET', 'hr:lim:r:'..ref)
  if not raw then return 0 end
  local r = unpacked(raw)
  if r.state == 'd' or r.state == 'x' then return 0 end
  release(ref, r, tokens or r.tokens)
  r.state = 'd'
  redis.call('SET', 'hr:lim:r:'..ref, packed(r), 'PX', kept_ms)
  return 1
end
"""

SETTLE = (
    _COMMON
    + _DONE
    + """
if not whole() then return {'incomplete', 0, 0} end
local partition, first, next_offset = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local have = tonumber(redis.call('HGET', 'hr:lim:log', partition) or '0')
if first > have then return {'gap', have, 0} end
local settled = 0
for i = 4, #ARGV, 8 do
  if tonumber(ARGV[i]) >= have then
    local key = 'hr:lim:spent:'..ARGV[i + 5]
    local whole_units, pico = tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
    if whole_units > 0 or pico > 0 then
      for name in string.gmatch(ARGV[i + 6], '[^\\n]+') do
        local w, p = amount(key, name)
        w, p = plus(w, p, whole_units, pico)
        set_amount(key, name, w, p)
      end
      redis.call('EXPIRE', key, 8640000)
    end
    settled = settled + done(ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 7])
  end
end
if next_offset > have then redis.call('HSET', 'hr:lim:log', partition, int(next_offset)) end
return {'settled', math.max(have, next_offset), settled}
"""
)
"""Charge what deciding terminals came to and give back what was reserved; each offset of the log counts once.

ARGV: partition, the offset from which on everything was read, the next one to read, then of each terminal: offset,
ref, tokens, whole, pico, month, scopes that pay (lines), how long it is remembered (ms).
"""

REAP = _COMMON + _DONE + "return done(ARGV[1], nil, ARGV[2])"
"""Give back a reservation whose terminal was settled before it was made. ARGV: ref, how long it is remembered (ms)."""

OPEN = (
    _COMMON
    + """
sweep()
return {redis.call('ZCARD', 'hr:lim:pending'), redis.call('ZCARD', 'hr:lim:bound'),
        redis.call('ZRANGEBYSCORE', 'hr:lim:bound', '-inf', int(now - tonumber(ARGV[1])), 'LIMIT', 0, ARGV[2],
                   'WITHSCORES')}
"""
)
"""Reservations: how many are pending and bound, and those bound for longest. ARGV: µs at least, how many at most."""

STANDING = (
    _COMMON
    + """
sweep()
local month, told = month_of(now), {int(now), month_of(now)}
for _, name in ipairs(ARGV) do
  trim(name)
  local window = {redis.call('ZCARD', 'hr:lim:w:'..name), redis.call('GET', 'hr:lim:t:'..name) or '0'}
  told[#told + 1] = {window[1], window[2], redis.call('HGET', 'hr:lim:open', name) or '0',
                     redis.call('HGET', 'hr:lim:spent:'..month, name) or '0 0',
                     redis.call('HGET', 'hr:lim:held:'..month, name) or '0 0'}
end
return told
"""
)
"""What is used now. ARGV: scopes. Returns now, month, then of each: requests, tokens, open, spent, held."""

STATE = _COMMON + "return {whole() and 1 or 0, int(now), redis.call('HGETALL', 'hr:lim:log')}"
"""Whether it is whole, the server's time (µs), and the offsets of the log."""

CLEAR = _COMMON + "if whole() then return 0 end return #ARGV > 0 and redis.call('UNLINK', unpack(ARGV)) or 0"
"""Forget keys that are not known to be complete. ARGV: keys, at most some thousands."""

REFILL = _COMMON + "for i = 4, #ARGV do window_add(ARGV[i], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])) end return 1"
"""Put a request into windows. ARGV: ref, microsecond, tokens, scopes."""

FLIP = (
    _COMMON
    + """
for i = 4, 3 + tonumber(ARGV[3]) do redis.call('HSET', 'hr:lim:log', string.match(ARGV[i], '^(%d+) (%d+)$')) end
if redis.call('EXISTS', ARGV[1]) == 1 then
  redis.call('RENAME', ARGV[1], 'hr:lim:spent:'..ARGV[2])
  redis.call('EXPIRE', 'hr:lim:spent:'..ARGV[2], 8640000)
else redis.call('DEL', 'hr:lim:spent:'..ARGV[2]) end
redis.call('SET', 'hr:lim:whole', string.match(redis.call('INFO', 'server'), 'run_id:(%w+)'))
return 1
"""
)
"""Put a month's spend and the offsets that it was counted to into force, together. ARGV: key of the spend, month, count
of partitions, then `partition offset` of each."""

INVALIDATE = "return redis.call('DEL', 'hr:lim:whole')"
"""Let it all be made anew."""
