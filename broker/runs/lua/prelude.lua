-- Prepended to the scripts of a run. All of them take the same two keys, both in the run's slot,
-- and touch no other. Every answer is {answer, the log's end, status, …} (docs/protocol.md, section 2).
local RUN, LOG = KEYS[1], KEYS[2]
local VERB, CHANNEL = ARGV[1], ARGV[2]      -- PUBLISH, or SPUBLISH on a Cluster; the run's channel
if VERB == 'SPUBLISH' and not redis.REDIS_VERSION_NUM then
  VERB = 'PUBLISH'                          -- before 7.0
end

local TERMINAL = {final = 'completed', error = 'failed', cancelled = 'cancelled'}
local CLOSED = {completed = true, failed = true, cancelled = true}

local function int(number)                  -- tostring() of a large number is 1.7e+12
  return string.format('%.0f', number)
end

local function now()                        -- milliseconds
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function parse(id)
  local epoch, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(epoch), tonumber(seq)
end

local function below(id, other)
  local epoch, seq = parse(id)
  local other_epoch, other_seq = parse(other)
  return epoch < other_epoch or (epoch == other_epoch and seq < other_seq)
end

local function attempt_data(attempt, reason, resume_from)
  return '{"attempt":' .. int(attempt) .. ',"reason":"' .. reason .. '","resume_from":"' .. resume_from .. '"}'
end

-- The answer of a run that is gone or has ended; of others nil.
local function over(status, last)
  if not status or status == 'erased' then
    return {'GONE', '0-0', status or ''}
  end
  return CLOSED[status] and {'CLOSED', last, status} or nil
end

-- Whether this is the primary that the caller knows to have settled (4.6). '' : it does not ask.
local function settled(replid)
  return replid == '' or string.find(redis.call('INFO', 'replication'), 'master_replid:' .. replid, 1, true) ~= nil
end

-- Adds entries {type, data, type, data, …} as epoch-first, epoch-first+1, … and publishes them as one message:
-- the version and the id before them, then a line for each: id, type, data. Returns the log's new end, bytes added.
local function write(prev, epoch, first, entries)
  local lines, bytes, id = {'1 ' .. prev}, 0, prev
  for i = 1, #entries, 2 do
    id = int(epoch) .. '-' .. int(first + (i - 1) / 2)
    redis.call('XADD', LOG, id, 't', entries[i], 'd', entries[i + 1])
    lines[#lines + 1] = id .. ' ' .. entries[i] .. ' ' .. entries[i + 1]
    bytes = bytes + #entries[i + 1]
  end
  redis.call(VERB, CHANNEL, table.concat(lines, '\n'))
  return id, bytes
end
