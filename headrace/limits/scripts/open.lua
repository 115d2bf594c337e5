sweep()
flush()
return {call('ZCARD', 'hr:lim:pending'), call('ZCARD', 'hr:lim:bound'),
        call('ZRANGEBYSCORE', 'hr:lim:bound', '-inf', int(now - tonumber(ARGV[1])), 'LIMIT', 0, ARGV[2], 'WITHSCORES')}
