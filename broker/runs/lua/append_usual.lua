-- The usual case of append, ahead of everything else in it, because it is the hot path of Redis: the owner appends to
-- the very end that it expects, no terminal, no checkpoint. Whatever is not exactly this falls through to append.lua,
-- which gives the same result more slowly. Arguments as there.
if #ARGV > 12 and ARGV[11] == '' then
  local RUN, LOG, epoch, first = KEYS[1], KEYS[2], ARGV[3], tonumber(ARGV[8])
  local run = redis.call('HMGET', RUN, 'status', 'epoch', 'token', 'end', 'events', 'bytes')
  local last, kind = run[4], ARGV[#ARGV - 1]
  if run[1] == 'running' and run[2] == epoch and run[3] == ARGV[4]
      and last == epoch .. '-' .. string.format('%.0f', first - 1)
      and kind ~= 'final' and kind ~= 'error' and kind ~= 'cancelled' then
    local lines, bytes, id = {'1 ' .. last}, run[6], last
    for i = 13, #ARGV, 2 do
      id = epoch .. '-' .. string.format('%.0f', first)
      first = first + 1
      redis.call('XADD', LOG, id, 't', ARGV[i], 'd', ARGV[i + 1])
      lines[#lines + 1] = id .. ' ' .. ARGV[i] .. ' ' .. ARGV[i + 1]
      bytes = bytes + #ARGV[i + 1]
    end
    local verb = ARGV[1] == 'SPUBLISH' and not redis.REDIS_VERSION_NUM and 'PUBLISH' or ARGV[1]   -- before 7.0
    redis.call(verb, ARGV[2], table.concat(lines, '\n'))
    local events = run[5] + (#ARGV - 12) / 2
    if ARGV[9] == '0' then
      redis.call('HSET', RUN, 'end', id, 'events', events, 'bytes', bytes)
    else
      local time = redis.call('TIME')
      local deadline = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[9]
      redis.call('HSET', RUN, 'end', id, 'events', events, 'bytes', bytes, 'deadline', string.format('%.0f', deadline))
    end
    return {'OK', id, 'running'}
  end
end
