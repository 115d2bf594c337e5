if not whole() then return {'incomplete', 0, 0} end
local partition, first, next_offset = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local have = tonumber(call('HGET', 'hr:lim:log', partition) or '0')
if first > have then return {'gap', have, 0} end

local spent = {}
local function pay(key, name, w, p)
  spent[key] = spent[key] or {}
  local a = spent[key][name] or amount(call('HGET', key, name))
  a[1], a[2] = plus(a[1], a[2], w, p)
  spent[key][name] = a
end

local settled = 0
for i = 4, #ARGV, 8 do
  if tonumber(ARGV[i]) >= have then
    local w, p = tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
    if w > 0 or p > 0 then
      for name in string.gmatch(ARGV[i + 6], '[^\n]+') do pay('hr:lim:spent:'..ARGV[i + 5], name, w, p) end
    end
    settled = settled + done(ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 7])
  end
end
for key, amounts in pairs(spent) do
  for name, a in pairs(amounts) do call('HSET', key, name, told(a)) end
  call('EXPIRE', key, 8640000)
end
flush()
if next_offset > have then call('HSET', 'hr:lim:log', partition, int(next_offset)) end
return {'settled', math.max(have, next_offset), settled}
