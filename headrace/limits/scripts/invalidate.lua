return redis.call('DEL', 'hr:lim:whole')
