-- Erases a run and leaves a tombstone (5.4). Deletions first, so that it works when memory is full.
-- The record is emptied but stays: in a slot that moves, a key that is gone is looked for on the other node (1.1).
-- ARGV 3 life of the tombstone (ms)
-- OK | GONE
local status = redis.call('HGET', RUN, 'status')
if not status or status == 'erased' then
  return {'GONE', '0-0', status or ''}
end
redis.call('UNLINK', LOG)
for _, name in ipairs(redis.call('HKEYS', RUN)) do
  if name ~= 'status' then
    redis.call('HDEL', RUN, name)
  end
end
redis.call('HSET', RUN, 'status', 'erased')
redis.call('PEXPIRE', RUN, ARGV[3])
redis.call(VERB, CHANNEL, '1 erased')
redis.call(VERB, CHANNEL .. ':control', 'erased')
return {'OK', '0-0', 'erased'}
