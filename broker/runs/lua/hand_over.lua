-- An owner gives its run back: queued for its next attempt, which does not count as a loss (2, 4.4).
-- ARGV 3 epoch, 4 token, 5 attempt, 6 reason of the next attempt
-- OK, next attempt; also when this token did so before | GONE | FENCED | CLOSED
local run = redis.call('HMGET', RUN, 'status', 'end', 'epoch', 'token', 'attempt', 'handed')
local status, last = run[1], run[2]
if not status or status == 'erased' then
  return {'GONE', '0-0', status or ''}
end
local epoch, owner = tonumber(ARGV[3]), tonumber(run[3])
local attempt = math.max(tonumber(ARGV[5]), tonumber(run[5]))
if owner == epoch and status == 'queued' and run[6] == ARGV[4] then
  return {'OK', last, status, attempt + 1}
end
if owner > epoch or (owner == epoch and run[4] ~= ARGV[4]) then
  return {'FENCED', last, status}
end
if CLOSED[status] then
  return {'CLOSED', last, status}
end
redis.call('HSET', RUN, 'status', 'queued', 'epoch', ARGV[3], 'token', '', 'handed', ARGV[4], 'attempt', attempt,
  'enqueues', 0, 'reason', ARGV[6], 'deadline', 0)         -- so that no reaper closes it for a lease that expired before
return {'OK', last, 'queued', attempt + 1}
