-- Makes a run: its record and `start` (0-1). The only script that creates.
-- ARGV 3 claimed_at (ms, of the idempotency key), 4 stale after (ms), 5 data of `start`, 6… field, value, …
-- CREATED | STALE, for everybody and for ever | EXISTS, attempt
local known = redis.call('HMGET', RUN, 'status', 'end', 'attempt')
if known[1] then
  return {'EXISTS', known[2] or '0-0', known[1], tonumber(known[3] or 0)}
end
local time = now()
if time - tonumber(ARGV[3]) >= tonumber(ARGV[4]) then
  return {'STALE', '0-0', ''}
end
local fields = {}
for i = 6, #ARGV do
  fields[#fields + 1] = ARGV[i]
end
local last, bytes = write('0-0', 0, 1, {'start', ARGV[5]})
redis.call('HSET', RUN, 'status', 'queued', 'attempt', 0, 'epoch', 0, 'token', '', 'end', last, 'events', 1,
  'bytes', bytes, 'enqueues', 0, 'claimed_at', ARGV[3], 'created_at', int(time), unpack(fields))
return {'CREATED', last, 'queued', 0}
