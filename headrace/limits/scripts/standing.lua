sweep()
local month = month_of(now)
local said, spent = {int(now), month}, call('HMGET', 'hr:lim:spent:'..month, unpack(ARGV))
for i, name in ipairs(ARGV) do
  local s = scope(name, month)
  said[#said + 1] = {s.requests, s.tokens, s.open, spent[i] or '0 0', told(s.held[month])}
end
flush()
return said
