local raw = call('GET', 'hr:lim:r:'..ARGV[1])
if not raw then return 0 end
local r = unpacked(raw)
if r.state ~= 'p' then return 0 end
r.state = 'a'
call('SET', 'hr:lim:r:'..ARGV[1], packed(r))
call('ZREM', 'hr:lim:pending', ARGV[1])
call('ZADD', 'hr:lim:bound', int(now), ARGV[1])
return 1
