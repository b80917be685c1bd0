-- A reaper is about to enqueue a queued run again, whose job is gone: counts it (4.3).
-- ARGV 3 the attempt that is to come, 4 enqueues that the reaper saw
-- OK, enqueues now | REFUSED: it is not queued for this attempt, or another reaper was here | GONE | CLOSED
local run = redis.call('HMGET', RUN, 'status', 'end', 'attempt', 'enqueues')
local status, last = run[1], run[2]
local answer = over(status, last)
if answer then
  return answer
end
if status ~= 'queued' or tonumber(run[3]) + 1 ~= tonumber(ARGV[3]) or tonumber(run[4] or 0) ~= tonumber(ARGV[4]) then
  return {'REFUSED', last, status}
end
return {'OK', last, status, redis.call('HINCRBY', RUN, 'enqueues', 1)}
