local raw = call('GET', 'hr:lim:r:'..ARGV[1])
if not raw then return 0 end
local r = unpacked(raw)
if r.state ~= 'p' then return 0 end
release(ARGV[1], r, nil)
call('DEL', 'hr:lim:r:'..ARGV[1])
flush()
return 1
