local ref, mode, month, kept_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[11]
local want = {tokens = tonumber(ARGV[4]), whole = tonumber(ARGV[5]), pico = tonumber(ARGV[6]),
              completion = tonumber(ARGV[7]), model = ARGV[8], at = now}
local marked, restoring = tonumber(ARGV[9]), mode == 'restore' or mode == 'restore accepted'
if restoring then want.at = tonumber(ARGV[10]) end
if not restoring and not whole() then return {'incomplete'} end
if month == '' then month = month_of(now) end
want.month = month

local limits, names, windowed, budgets = {}, {}, {}, {}
for i = 12, #ARGV, 6 do
  local limit = {name = ARGV[i], rpm = tonumber(ARGV[i + 1]), tpm = tonumber(ARGV[i + 2]),
                 open = tonumber(ARGV[i + 3]), whole = tonumber(ARGV[i + 4]), pico = tonumber(ARGV[i + 5])}
  limits[#limits + 1], names[#names + 1] = limit, limit.name
  windowed[#windowed + 1] = (limit.rpm or limit.tpm) and '1' or '0'
  if limit.whole then budgets[#budgets + 1] = limit end
end
want.names, want.windowed = table.concat(names, '\n'), table.concat(windowed)

sweep()

local function answer(verdict, r, refusal)
  local said = {verdict, int(now), month, r and r.state or '', r and r.model or '', r and r.completion or 0}
  for i = 1, 5 do said[#said + 1] = refusal and refusal[i] or '' end
  for _, name in ipairs(mode ~= 'route' and names or {}) do  -- a router shows nobody what is left
    local s = scope(name, month)
    said[#said + 1], said[#said + 2], said[#said + 3] = s.requests, s.tokens, int(resets(s))
  end
  flush()
  return said
end

local function store(r, was_pending)
  call('SET', 'hr:lim:r:'..ref, packed(r))
  if r.state == 'p' then return call('ZADD', 'hr:lim:pending', int(now + marked), ref) end
  if was_pending then call('ZREM', 'hr:lim:pending', ref) end
  call('ZADD', 'hr:lim:bound', int(now), ref)
end

local raw = call('GET', 'hr:lim:r:'..ref)
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
    local was_pending = r.state == 'p'
    r.state = 'r'
    store(r, was_pending)
    return answer('held', r)
  else
    release(ref, r, nil)
  end
end

local NEVER, MONTH = -1, -2
local worst
local function refuse(kind, limit, most, left, retry)
  local rank = retry == NEVER and 2e15 or retry == MONTH and 1e15 or retry
  if not worst or rank > worst.rank then
    worst = {rank = rank, told = {kind, limit.name, most, left, int(retry)}}
  end
end

local function check_requests(limit, s)
  if s.requests + 1 <= limit.rpm then return end
  local retry = NEVER
  if limit.rpm > 0 then
    local at = s.requests - limit.rpm
    retry = tonumber(call('ZRANGE', s.log, at, at, 'WITHSCORES')[2] or s.oldest) + WINDOW - now
  end
  refuse('requests', limit, int(limit.rpm), int(math.max(0, limit.rpm - s.requests)), retry)
end

local function check_tokens(limit, s)
  local excess = s.tokens + want.tokens - limit.tpm
  if excess <= 0 then return end
  local retry, from = NEVER, 0
  while want.tokens <= limit.tpm and excess > 0 do
    local old = call('ZRANGE', s.log, from, from + 99, 'WITHSCORES')
    if #old == 0 then break end
    for i = 1, #old, 2 do
      excess = excess - tonumber(string.match(old[i], ':(%d+)$'))
      retry = tonumber(old[i + 1]) + WINDOW - now
      if excess <= 0 then break end
    end
    from = from + 100
  end
  refuse('tokens', limit, int(limit.tpm), int(math.max(0, limit.tpm - s.tokens)), retry)
end

local function check_open(limit, s)
  if s.open + 1 <= limit.open then return end
  refuse('concurrency', limit, int(limit.open), int(math.max(0, limit.open - s.open)),
         limit.open > 0 and 1000000 or NEVER)
end

local function check_budget(limit, s)
  local sw, sp = plus(limit.spent[1], limit.spent[2], want.whole, want.pico)
  local w, p = plus(limit.spent[1], limit.spent[2], s.held[month][1], s.held[month][2])
  local tw, tp = plus(w, p, want.whole, want.pico)
  if not over(tw, tp, limit.whole, limit.pico) then return end
  local lw, lp = minus(limit.whole, limit.pico, w, p)
  if lw < 0 then lw, lp = 0, 0 end
  refuse('budget', limit, told({limit.whole, limit.pico}), told({lw, lp}),
         over(sw, sp, limit.whole, limit.pico) and MONTH or 1000000)
end

if not restoring then
  if #budgets > 0 then
    local payers = {}
    for i, limit in ipairs(budgets) do payers[i] = limit.name end
    local spent = call('HMGET', 'hr:lim:spent:'..month, unpack(payers))
    for i, limit in ipairs(budgets) do limit.spent = amount(spent[i]) end
  end
  for _, limit in ipairs(limits) do
    local s = scope(limit.name, month)
    if limit.rpm then check_requests(limit, s) end
    if limit.tpm then check_tokens(limit, s) end
    if limit.open then check_open(limit, s) end
    if limit.whole then check_budget(limit, s) end
  end
end

if worst then
  if mode == 'route' then call('SET', 'hr:lim:r:'..ref, cmsgpack.pack({'x', worst.told}), 'PX', kept_ms) end
  return answer('refused', nil, worst.told)
end

for at, limit in ipairs(limits) do
  local s = scope(limit.name, month)
  hold(s, month, 1, want.whole, want.pico)
  if windowed[at] == '1' then enter(s, ref, want.at, want.tokens) end
end
want.state = mode == 'reserve' and 'p' or mode == 'restore accepted' and 'a' or 'r'
store(want)
return answer('admitted', want)
