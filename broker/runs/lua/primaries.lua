-- Since when each primary is known to have its present data (4.6). Not one of a run's scripts: its key is `sb:server`,
-- a hash of replid -> since (ms). A primary that nobody has seen is noted with the present time; the first of all with 0.
-- ARGV 1 whether the caller has known no other primaries: else what was noted is lost, and they are not the first;
--      2… replids
-- For each replid, the milliseconds since then
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local replids = {unpack(ARGV, 2)}
local since = redis.call('HMGET', KEYS[1], unpack(replids))
local fresh, ages = ARGV[1] == '1' and redis.call('EXISTS', KEYS[1]) == 0, {}
for i, replid in ipairs(replids) do
  if not since[i] then
    since[i] = fresh and 0 or now
    redis.call('HSET', KEYS[1], replid, string.format('%.0f', since[i]))
  end
  ages[i] = now - tonumber(since[i])
end
if redis.call('HLEN', KEYS[1]) > 1000 then               -- each restart adds one
  local all = redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    if now - tonumber(all[i + 1]) > 86400000 and not string.find(table.concat(replids, ' '), all[i], 1, true) then
      redis.call('HDEL', KEYS[1], all[i])
    end
  end
end
return ages
