local key = 'hr:lim:spent:'..ARGV[2]
for i = 4, 3 + tonumber(ARGV[3]) do call('HSET', 'hr:lim:log', string.match(ARGV[i], '^(%d+) (%d+)$')) end
if call('EXISTS', ARGV[1]) == 1 then
  call('RENAME', ARGV[1], key)
  call('EXPIRE', key, 8640000)
else
  call('DEL', key)
end
call('SET', 'hr:lim:whole', whole_mark())
return 1
