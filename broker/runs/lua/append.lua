-- A worker's batch; an empty one is a renewal (2, 4.5). Sending it again is harmless.
-- ARGV 3 epoch, 4 token, 5 attempt, 6 resume_from of the epoch, 7 first seq that the worker still keeps,
--      8 seq of the batch's first entry (of an empty one: of the entry to come), 9 lease (ms; 0 leaves the deadline), 10 retention (ms),
--      11 checkpoint's id or '', 12 its state, 13… type, data, type, data, …
-- GONE | DUP | FENCED | CLOSED | LOST | GAP | OK, checked in this order
local run = redis.call('HMGET', RUN, 'status', 'end', 'epoch', 'token', 'attempt', 'events', 'bytes', 'rewinds',
  'started_at', 'checkpoint_id')
local status, last = run[1], run[2]
if not status or status == 'erased' then
  return {'GONE', '0-0', status or ''}
end
local epoch, first = tonumber(ARGV[3]), tonumber(ARGV[8])
local upto = first + (#ARGV - 12) / 2 - 1                  -- seq of the batch's last entry
local owner = tonumber(run[3])
local mine = owner == epoch and run[4] == ARGV[4]
local last_epoch, last_seq = parse(last)

if mine and last_epoch == epoch and last_seq >= upto then
  if status == 'running' then
    if ARGV[9] ~= '0' then
      redis.call('HSET', RUN, 'deadline', int(now() + tonumber(ARGV[9])))
    end
    if ARGV[11] ~= '' and not below(ARGV[11], run[10] or '0-0') then         -- a batch that comes late has an old one
      redis.call('HSET', RUN, 'checkpoint_id', ARGV[11], 'checkpoint', ARGV[12])
    end
  end
  return {'DUP', last, status}
end
if owner > epoch or (owner == epoch and not mine) then
  return {'FENCED', last, status}
end
if CLOSED[status] then
  return {'CLOSED', last, status}
end
local have = last_epoch == epoch and last_seq or 0         -- entries of this epoch in the log
local low, resume_from = tonumber(ARGV[7]), ARGV[6]

-- Whether this epoch, before its first entry is there, would stand on what an `attempt` of another has voided: a
-- failover took both, and the other one was repaired first.
local function voided()
  for own, from in string.gmatch(run[8] or '', '(%S+):(%S+)') do
    if below(from, resume_from) and below(resume_from, own) then
      return true
    end
  end
  return false
end

if below(last, resume_from) or (low > 1 and (last_epoch < epoch or have < low - 1))
    or (have == 0 and voided()) then
  return {'LOST', last, status}
end
if last_epoch > epoch then
  return {'FENCED', last, status}
end
if have < first - 1 then
  return {'GAP', last, status}
end

local entries = {}
for i = 13 + 2 * (have + 1 - first), #ARGV do
  entries[#entries + 1] = ARGV[i]
end
local time = now()
local id, bytes = write(last, epoch, have + 1, entries)
local kind = entries[#entries - 1]
status = TERMINAL[kind] or 'running'
local fields = {'status', status, 'end', id, 'epoch', ARGV[3], 'token', ARGV[4],
  'attempt', math.max(tonumber(ARGV[5]), tonumber(run[5])),
  'events', tonumber(run[6]) + #entries / 2, 'bytes', tonumber(run[7]) + bytes}
local function set(name, value)
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
if ARGV[9] ~= '0' then
  set('deadline', int(time + tonumber(ARGV[9])))
end
if have == 0 then                                          -- a claim that a failover lost is repaired
  set('rewinds', (run[8] or '') .. ARGV[3] .. '-1:' .. ARGV[6] .. ' ')
  set('started_at', run[9] or int(time))
  if run[10] and below(resume_from, run[10]) then
    redis.call('HDEL', RUN, 'checkpoint_id', 'checkpoint') -- it covers what this epoch voids
  end
end
if ARGV[11] ~= '' then
  set('checkpoint_id', ARGV[11])
  set('checkpoint', ARGV[12])
end
if TERMINAL[kind] then
  set('finished_at', int(time))
  set('result', entries[#entries])
end
redis.call('HSET', RUN, unpack(fields))
if TERMINAL[kind] then
  redis.call('PEXPIRE', RUN, ARGV[10])
  redis.call('PEXPIRE', LOG, ARGV[10])
end
return {'OK', id, status}
