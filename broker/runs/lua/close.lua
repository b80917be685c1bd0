-- Closes a run in an epoch of its own, worker or no worker (5.1): `attempt`, which voids nothing, and a terminal.
-- ARGV 3 type of the terminal, 4 its data, 5 reason of the `attempt`, 6 token, 7 retention (ms), 8 the primary's
--      replid, 9 a field of the record or '', 10 the value that it must still have
-- OK, then: attempt, the log's end before; also when this token closed it before
-- GONE | CLOSED: something else came first | REFUSED: the field has another value | UNSETTLED
local run = redis.call('HMGET', RUN, 'status', 'end', 'epoch', 'token', 'attempt', 'claimed_at', 'events', 'bytes',
  'rewinds')
local status, last = run[1], run[2]
if not status or status == 'erased' then
  return {'GONE', '0-0', status or ''}
end
if CLOSED[status] then
  if run[4] ~= ARGV[6] then
    return {'CLOSED', last, status}
  end
  return {'OK', last, status, tonumber(run[5]), string.match(run[9], ':([%d-]+) $')}
end
if ARGV[9] ~= '' and (redis.call('HGET', RUN, ARGV[9]) or '') ~= ARGV[10] then
  return {'REFUSED', last, status}
end
if not settled(ARGV[8]) then
  return {'UNSETTLED', last, status}
end
local kind, time = ARGV[3], now()
local epoch = math.max(tonumber(run[3]) + 1, parse(last) + 1, time - tonumber(run[6]))
local id, bytes = write(last, epoch, 1, {'attempt', attempt_data(run[5], ARGV[5], last), kind, ARGV[4]})
redis.call('HSET', RUN, 'status', TERMINAL[kind], 'end', id, 'epoch', int(epoch), 'token', ARGV[6],
  'finished_at', int(time), 'result', ARGV[4], 'events', tonumber(run[7]) + 2, 'bytes', tonumber(run[8]) + bytes,
  'rewinds', (run[9] or '') .. int(epoch) .. '-1:' .. last .. ' ')
redis.call('PEXPIRE', RUN, ARGV[7])
redis.call('PEXPIRE', LOG, ARGV[7])
redis.call(VERB, CHANNEL .. ':control', TERMINAL[kind])
return {'OK', id, TERMINAL[kind], tonumber(run[5]), last}
