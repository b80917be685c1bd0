-- Somebody reads the run, or asks for it: what `cancel_if_unwatched` counts from (5.6).
-- OK | GONE | CLOSED
local run = redis.call('HMGET', RUN, 'status', 'end')
local status, last = run[1], run[2]
local answer = over(status, last)
if answer then
  return answer
end
redis.call('HSET', RUN, 'watched_at', int(now()))
return {'OK', last, status}
