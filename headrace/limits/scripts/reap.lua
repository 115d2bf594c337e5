local given_back = done(ARGV[1], nil, ARGV[2])
flush()
return given_back
