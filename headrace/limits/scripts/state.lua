return {whole() and 1 or 0, int(now), call('HGETALL', 'hr:lim:log')}
