-- A worker takes a queued run for the attempt that its job names, and opens an epoch (1.3, 1.4, 4.1).
-- ARGV 3 attempt, 4 token, 5 lease (ms), 6 the primary's replid
-- OK, then: epoch, attempt, reason, resume_from, now, and the record's fields as {field, value, …}
-- GONE | CLOSED | REFUSED: another worker has it, or the job is an old one | UNSETTLED
local run = redis.call('HMGET', RUN, 'status', 'end', 'attempt', 'epoch', 'token', 'claimed_at', 'checkpoint_id',
  'started_at', 'events', 'bytes', 'rewinds', 'reason')
local status, last = run[1], run[2]
if not status or status == 'erased' then
  return {'GONE', '0-0', status or ''}
end
local attempt, token, time = tonumber(ARGV[3]), ARGV[4], now()
local epoch = tonumber(run[4])
local reason = attempt == 1 and 'started' or run[12] or 'worker_lost'
local resume_from = attempt > 1 and run[7] or '0-1'
if status == 'running' and run[5] == token then           -- repeated: whoever waits for a replica (5.3) lives
  redis.call('HSET', RUN, 'deadline', int(time + tonumber(ARGV[5])))
else
  if CLOSED[status] then
    return {'CLOSED', last, status}
  end
  if status ~= 'queued' or tonumber(run[3]) + 1 ~= attempt then
    return {'REFUSED', last, status}
  end
  if not settled(ARGV[6]) then
    return {'UNSETTLED', last, status}
  end
  epoch = math.max(epoch + 1, parse(last) + 1, time - tonumber(run[6]))
  local id, bytes = write(last, epoch, 1, {'attempt', attempt_data(attempt, reason, resume_from)})
  last = id
  redis.call('HSET', RUN, 'status', 'running', 'attempt', attempt, 'epoch', int(epoch), 'token', token, 'end', last,
    'deadline', int(time + tonumber(ARGV[5])), 'lease', ARGV[5], 'started_at', run[8] or int(time), 'enqueues', 0,
    'events', tonumber(run[9]) + 1, 'bytes', tonumber(run[10]) + bytes,
    'rewinds', (run[11] or '') .. id .. ':' .. resume_from .. ' ')
end
local fields = {}
for _, name in ipairs({'tenant', 'subject', 'agent', 'query', 'parameters', 'session_id', 'checkpoint', 'started_at',
    'events', 'bytes', 'key', 'unwatched_ms', 'created_at'}) do
  fields[#fields + 1] = name
  fields[#fields + 1] = redis.call('HGET', RUN, name) or ''
end
return {'OK', last, 'running', int(epoch), attempt, reason, resume_from, int(time), fields}
