-- A reaper takes a run from an owner whose lease has expired: queued for its next attempt (4.3, 4.4).
-- ARGV 3 the primary's replid, 4 lease (ms), 5 attempts that a run may lose, 6 how long a run may take (ms)
-- OK, next attempt | REFUSED: its lease holds, or it is not running | GONE | CLOSED | UNSETTLED
-- SPENT | OVERDUE, then the deadline: no attempt is left, or no time; to be closed if the deadline is still this one
local run = redis.call('HMGET', RUN, 'status', 'end', 'deadline', 'attempt', 'fails', 'started_at',
  'lease')
local status, last = run[1], run[2]
local answer = over(status, last)
if answer then
  return answer
end
local time, deadline = now(), tonumber(run[3] or 0)
local lease = math.max(tonumber(ARGV[4]), tonumber(run[7] or 0))           -- its owner's may be a longer one
if status ~= 'running' or deadline > time then
  if status == 'running' and deadline > time + lease then              -- the clock was set back (4.7)
    redis.call('HSET', RUN, 'deadline', int(time + lease))
  end
  return {'REFUSED', last, status}
end
if not settled(ARGV[3]) then
  return {'UNSETTLED', last, status}
end
local fails = tonumber(run[5] or 0) + 1
if fails >= tonumber(ARGV[5]) then
  return {'SPENT', last, status, run[3] or ''}
end
if time >= tonumber(run[6] or time) + tonumber(ARGV[6]) then
  return {'OVERDUE', last, status, run[3] or ''}
end
redis.call('HSET', RUN, 'status', 'queued', 'token', '', 'handed', '', 'fails', fails, 'enqueues', 0,
  'reason', 'worker_lost')
return {'OK', last, 'queued', tonumber(run[4]) + 1}
