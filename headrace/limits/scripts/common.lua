-- What all scripts share. Amounts of money are two whole numbers, `w` and `p`: units of the currency, and of its 10^-12.
local UNIT, WINDOW, SWEEP, LAYOUT = 1000000000000, 60000000, 64, '2:'
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local call = redis.call

local function int(number) return string.format('%.0f', number) end

local function whole_mark() return LAYOUT..string.match(call('INFO', 'server'), 'run_id:(%w+)') end

local function whole() return call('GET', 'hr:lim:whole') == whole_mark() end

-- Amounts --------------------------------------------------------------------------------------------------------

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

local function amount(kept)
  if not kept then return {0, 0} end
  local w, p = string.match(kept, '^(%d+) (%d+)$')
  return {tonumber(w), tonumber(p), kept = true}
end

local function none(a) return a[1] == 0 and a[2] == 0 end

local function told(a) return int(a[1])..' '..int(a[2]) end

-- Scopes: read once in a call, changed in memory, and written by `flush` ------------------------------------------
-- `slid` says that a window changed, `counted` that what is open or held did.

local read, order = {}, {}

-- What is older than a window leaves it, and its requests are counted anew.
local function trim(s)
  local past, batch, left = now - WINDOW, 4, 0
  while s.requests ~= 0 and s.oldest <= past do
    local first, gone = call('ZRANGE', s.log, 0, batch - 1, 'WITHSCORES'), 0
    s.oldest = nil
    for i = 1, #first, 2 do
      local at = tonumber(first[i + 1])
      if at > past then
        s.oldest = at
        break
      end
      gone, s.tokens = gone + 1, s.tokens - tonumber(string.match(first[i], ':(%d+)$'))
    end
    if gone > 0 then call('ZREMRANGEBYRANK', s.log, 0, gone - 1) end
    s.requests = #first > 0 and s.requests - gone or 0
    s.oldest, s.slid, batch, left = s.oldest or past, true, math.min(2 * batch, 512), left + gone
  end
  if left > 0 then s.requests = call('ZCARD', s.log) end
  if s.requests == 0 then s.tokens = 0 end
end

local function scope(name, month)
  local s, key, field = read[name], 'hr:lim:s:'..name, 'held:'..month
  if s then
    if not s.held[month] then s.held[month] = amount(call('HGET', key, field)) end
    return s
  end
  local f = call('HMGET', key, 'open', field, 'requests', 'tokens', 'oldest', 'newest', 'ends')
  s = {key = key, log = 'hr:lim:w:'..name, open = tonumber(f[1]) or 0, held = {[month] = amount(f[2])},
       requests = tonumber(f[3]) or 0, tokens = tonumber(f[4]) or 0, oldest = tonumber(f[5]) or 0,
       newest = tonumber(f[6]) or 0, ends = tonumber(f[7]) or 0}
  s.was_open = s.open > 0
  read[name], order[#order + 1] = s, s
  if s.requests ~= 0 and s.ends <= now then
    call('DEL', s.log)
    s.requests, s.tokens, s.slid = 0, 0, true
  end
  trim(s)
  return s
end

-- Microseconds until a window is empty.
local function resets(s) return s.requests > 0 and s.newest + WINDOW - now or 0 end

local function enter(s, ref, at, tokens)
  if at <= now - WINDOW or call('ZADD', s.log, 'NX', int(at), ref..':'..int(tokens)) == 0 then return end
  s.oldest = s.requests > 0 and math.min(s.oldest, at) or at
  s.newest = s.requests > 0 and math.max(s.newest, at) or at
  s.requests, s.tokens, s.slid = s.requests + 1, s.tokens + tokens, true
  local latest = math.max(now, at) + WINDOW
  if s.requests == 1 or s.ends < latest then
    s.ends = latest + WINDOW  -- later than need be, so that the expiry is put off once a minute and not each time
    call('PEXPIRE', s.log, int((s.ends - now) / 1000 + 1000))
  end
end

-- A request leaves its window, or stays in it with other tokens than it entered with.
local function amend(s, ref, at, from, to)
  if at <= now - WINDOW or from == to then return end
  local key, after, added = s.log, to and ref..':'..int(to), 0
  if to then added = call('ZADD', key, int(at), after) end  -- first, so that the key keeps its expiry
  if call('ZREM', key, ref..':'..int(from)) == 0 then
    if added == 1 then call('ZREM', key, after) end
    return
  end
  s.tokens, s.slid = s.tokens - from + (added == 1 and to or 0), true
  if added == 0 then
    s.requests = s.requests - 1
    if s.requests > 0 and at >= s.newest then
      s.newest = tonumber(call('ZRANGE', key, -1, -1, 'WITHSCORES')[2] or s.newest)
    end
  end
end

local function hold(s, month, sign, w, p)
  local a = s.held[month]
  if sign > 0 then a[1], a[2] = plus(a[1], a[2], w, p) else a[1], a[2] = minus(a[1], a[2], w, p) end
  if a[1] < 0 then a[1], a[2] = 0, 0 end
  s.open, s.counted = math.max(0, s.open + sign), true
end

local function flush()
  for _, s in ipairs(order) do
    if (s.slid or s.counted) and s.open == 0 and s.requests == 0 then
      call('DEL', s.key)
    elseif s.slid or s.counted then
      local set, unset = {}, {}
      if s.slid then
        set = {'requests', int(s.requests), 'tokens', int(s.tokens), 'oldest', int(s.oldest), 'newest', int(s.newest),
               'ends', int(s.ends)}
      end
      if s.counted then
        set[#set + 1], set[#set + 2] = 'open', int(s.open)
        for month, a in pairs(s.held) do
          if not none(a) then set[#set + 1], set[#set + 2] = 'held:'..month, told(a)
          elseif a.kept then unset[#unset + 1] = 'held:'..month end
        end
      end
      call('HSET', s.key, unpack(set))
      if #unset > 0 then call('HDEL', s.key, unpack(unset)) end
      -- What is open is never forgotten; else the counts outlive their log, which is thus deleted with them.
      if s.open == 0 then call('PEXPIRE', s.key, int((s.ends - now) / 1000 + 2000))
      elseif not s.was_open then call('PERSIST', s.key) end
    end
  end
end

-- Reservations ---------------------------------------------------------------------------------------------------

local function unpacked(raw)
  local r = cmsgpack.unpack(raw)
  return {state = r[1], at = r[2], month = r[3], tokens = r[4], whole = r[5], pico = r[6], completion = r[7],
          model = r[8], names = r[9], windowed = r[10]}
end

local function packed(r)
  return cmsgpack.pack({r.state, r.at, r.month, r.tokens, r.whole, r.pico, r.completion, r.model, r.names,
                        r.windowed})
end

-- Give back what a reservation holds. Its request stays in the windows, with the tokens that it came to; without them
-- it leaves.
local function release(ref, r, tokens)
  local at = 0
  for name in string.gmatch(r.names, '[^\n]+') do
    at = at + 1
    local s = scope(name, r.month)
    hold(s, r.month, -1, r.whole, r.pico)
    if string.sub(r.windowed, at, at) == '1' then amend(s, ref, r.at, r.tokens, tokens) end
  end
  call('ZREM', r.state == 'p' and 'hr:lim:pending' or 'hr:lim:bound', ref)
end

-- It is over, and is remembered for a while; 1 if it was not.
local function done(ref, tokens, kept_ms)
  local raw = call('GET', 'hr:lim:r:'..ref)
  if not raw then
    call('ZREM', 'hr:lim:bound', ref)
    return 0
  end
  local r = unpacked(raw)
  if r.state == 'd' or r.state == 'x' then return 0 end
  release(ref, r, tokens or r.tokens)
  r.state = 'd'
  call('SET', 'hr:lim:r:'..ref, packed(r), 'PX', kept_ms)
  return 1
end

-- What was reserved and never accepted is gone, as if it had not been.
local function sweep()
  for _, ref in ipairs(call('ZRANGEBYSCORE', 'hr:lim:pending', '-inf', int(now), 'LIMIT', 0, SWEEP)) do
    local raw = call('GET', 'hr:lim:r:'..ref)
    if raw then
      release(ref, unpacked(raw), nil)
      call('DEL', 'hr:lim:r:'..ref)
    else
      call('ZREM', 'hr:lim:pending', ref)
    end
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
