for i = 4, #ARGV do enter(scope(ARGV[i], month_of(now)), ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])) end
flush()
return 1
