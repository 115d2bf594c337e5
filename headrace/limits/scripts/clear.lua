if whole() then return 0 end
return #ARGV > 0 and call('UNLINK', unpack(ARGV)) or 0
