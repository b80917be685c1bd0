-- Takes an idempotency key, or tells who has it (3.3). Not one of a run's scripts: its only key is the claim.
-- ARGV 1 the claim that may be replaced ('' : none), 2 request_id, 3 digest, 4 life (ms)
-- The claim that holds now: '<request_id> <digest> <claimed_at ms>'
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
  return held
end
local time = redis.call('TIME')
local claim = ARGV[2] .. ' ' .. ARGV[3] .. ' '
  .. string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
redis.call('SET', KEYS[1], claim, 'PX', ARGV[4])
return claim
