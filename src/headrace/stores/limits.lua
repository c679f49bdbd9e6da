-- Limits in Redis: the same as limit_table.py, which explains it. Atomic, by the server's clock.
-- KEYS[1] the prefix of all keys (one hash tag: one slot). ARGV[1] the asks as JSON, ARGV[4] the last turn that the asker knows of,
-- ARGV[5] the run (from start to end) of Redis that this is, ARGV[6] the run in which that turn was.
-- Returns the turn and the replies as JSON.
--   PREFIX:t          hash   n the turn: how many times this script ran; e the life, where it isn't the first. In later lives each
--                            PREFIX below ends with the life: what is left of earlier ones is forgotten, and expires.
--                            r the run of Redis that it is, b the turn that this run began with
--   PREFIX:s:SUBJECT  hash   rl, rt, rs requests' level, time, size; tl, tt, ts tokens' likewise; h held; o loose; p period; u spent;
--                            b when u was read from the ledger; f, ft spent under leases that were forgotten, and when it was last
--   PREFIX:r:SUBJECT  zset   running requests by expiry
--   PREFIX:l:ID       hash   c claims; p prompt; o output; x periods, once it has lapsed; w its process, or empty
--   PREFIX:w:PROCESS  set    ids of its leases
--   PREFIX:g:PROCESS  string it is gone, and takes no lease any more
--   PREFIX:d:ID       string a charge that has been made: its tokens
--   PREFIX:e:ID       string a lease that was settled a little while ago: with so many tokens
local prefix, asks = KEYS[1], cjson.decode(ARGV[1])
local lease_seconds, lapsed_seconds = tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local null = cjson.null
local total_period, day = 0, math.floor(now / 86400) * 86400
-- Seconds after which a request that is over is in the ledger for sure, where the database is well.
local written = 0.5
-- So long it is known what budgets were charged with, and for which leases: who finds out what was really used may come late.
local budget_seconds = 40 * 86400

-- A turn that has been is a Redis that came back with an older state, or with none; so is one of an earlier run that this one didn't
-- begin with, however many turns others have had meanwhile. The step is wider than what others may know of.
local turns = prefix .. ':t'
local known, run = tonumber(ARGV[4]), ARGV[5]
local begun = redis.call('HMGET', turns, 'r', 'b', 'n')
local base = tonumber(begun[2] or '') or 0
if begun[1] ~= run then
  base = tonumber(begun[3] or '') or 0
  redis.call('HSET', turns, 'r', run, 'b', string.format('%.0f', base))
end
local turn = redis.call('HINCRBY', turns, 'n', 1)
if turn <= known or (ARGV[6] ~= run and known > base) then
  turn = math.max(turn, known) + 1000000
  local began = string.format('%.0f', turn)
  redis.call('HSET', turns, 'n', began, 'e', began, 'b', began)
end
local life = redis.call('HGET', turns, 'e') or '0'
redis.call('EXPIRE', turns, 40 * 86400)
if life ~= '0' then prefix = prefix .. life end

-- The first of the month, by Howard Hinnant's days-from-civil algorithms.
local function month()
  local z = math.floor(now / 86400) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  return day - (doy - math.floor((153 * mp + 2) / 5)) * 86400
end

local function start_of(period)
  if period == 'total' then return total_period end
  if period == 'day' then return day end
  return month()
end

local function number(value) return tonumber(value or '') end

-- A claim is an array: subject, requests, tokens, concurrency, budget, period, window.
local function limit(value) if value == nil or value == null then return nil end return value end

local function filled(level, at, size, window)
  if level == nil or at == nil then return size end
  return math.min(size, level + math.max(0, now - at) * size / window)
end

local function load(claim)
  local key = prefix .. ':s:' .. claim[1]
  local h = redis.call('HMGET', key, 'rl', 'rt', 'tl', 'tt', 'h', 'o', 'p', 'u', 'b', 'f', 'ft')
  local s = {
    key = key, running = prefix .. ':r:' .. claim[1], name = claim[1],
    requests = limit(claim[2]), tokens = limit(claim[3]), concurrency = limit(claim[4]), budget = limit(claim[5]),
    period_kind = claim[6], window = claim[7],
    h = number(h[5]) or 0, o = number(h[6]) or 0, p = number(h[7]), u = number(h[8]) or 0,
    b = number(h[9]) or 0, f = number(h[10]) or 0, ft = number(h[11]) or 0,
  }
  if s.requests then s.rl = filled(number(h[1]), number(h[2]), s.requests, s.window) end
  if s.tokens then s.tl = filled(number(h[3]), number(h[4]), s.tokens, s.window) end
  return s
end

local function loaded(claims)
  local all = {}
  for i, claim in ipairs(claims) do all[i] = load(claim) end
  return all
end

local function save(s)
  local fields = {'h', string.format('%.0f', s.h), 'o', string.format('%.0f', s.o), 'u', string.format('%.0f', s.u)}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if s.rl then add('rl', string.format('%.6f', s.rl)); add('rt', string.format('%.6f', now)) end
  if s.tl then add('tl', string.format('%.6f', s.tl)); add('tt', string.format('%.6f', now)) end
  if s.p then add('p', string.format('%.0f', s.p)) end
  if s.b > 0 then add('b', string.format('%.6f', s.b)) end
  if s.ft > 0 then add('f', string.format('%.0f', s.f)); add('ft', string.format('%.6f', s.ft)) end
  redis.call('HSET', s.key, unpack(fields))
  -- A budget that is forgotten is asked of the ledger again; a bucket is full by then.
  local keep = math.max(lapsed_seconds, 2 * s.window)
  if s.budget or s.p then keep = math.max(keep, budget_seconds) end
  redis.call('EXPIRE', s.key, math.ceil(math.min(keep, budget_seconds)))
end

-- Seconds for which a lease of these claims is kept that nobody renews or settles.
local function keeping(claims)
  for _, claim in ipairs(claims) do
    if limit(claim[5]) then return budget_seconds end
  end
  return lapsed_seconds
end

local function room(s)
  return {s.rl or 0, s.tl or 0, s.u, s.h, redis.call('ZCARD', s.running)}
end

local function rooms(all)
  local made = {}
  for i, s in ipairs(all) do made[i] = room(s) end
  return made
end

local function put_back(s, held, output, used)
  s.h = s.h - held
  s.o = s.o - output
  s.u = s.u + used
end

-- Requests of a subject whose process is gone: their rates come back, their budgets stay charged until somebody settles them.
local function lapse(name)
  local gone = redis.call('ZRANGEBYSCORE', prefix .. ':r:' .. name, '-inf', now, 'LIMIT', 0, 100)
  for _, id in ipairs(gone) do
    redis.call('ZREM', prefix .. ':r:' .. name, id)
    local key = prefix .. ':l:' .. id
    local l = redis.call('HMGET', key, 'c', 'p', 'o', 'x')
    if l[1] and not l[4] then
      local periods, held = {}, tonumber(l[2]) + tonumber(l[3])
      for i, s in ipairs(loaded(cjson.decode(l[1]))) do
        redis.call('ZREM', s.running, id)
        put_back(s, held, tonumber(l[3]), held)
        if s.tl then s.tl = math.min(s.tokens, s.tl + held) end
        periods[i] = s.p or -1
        save(s)
      end
      redis.call('HSET', key, 'x', cjson.encode(periods))
      redis.call('EXPIRE', key, keeping(cjson.decode(l[1])))
    end
  end
end

-- Tokens that no lease here stands for. They count unless the budget has been read from the ledger since they were written there; if it
-- has not been read at all, they are kept in mind for so long.
local function spend(s, used, ended)
  if s.p then
    if ended == 0 or s.b < ended + written then s.u = s.u + used end
  elseif now < ended + written then
    s.f = (now < s.ft + written and s.f or 0) + used
    s.ft = ended
  else
    return false
  end
  return true
end

-- What a process that died really used, where it had told of a guess and not yet of what that has to be corrected by.
local function correct(key, id, used, claims, ended)
  local guess = number(redis.call('GET', key))
  if not guess or guess == used or redis.call('EXISTS', prefix .. ':d:' .. id .. ':corrected') == 1 then return end
  for _, s in ipairs(loaded(claims)) do
    if spend(s, used - guess, ended) then save(s) end
  end
  redis.call('SET', key, string.format('%.0f', used), 'KEEPTTL')
end

local function settle(id, used, claims, its_life, ended)
  local key, ended_key, charged_key = prefix .. ':l:' .. id, prefix .. ':e:' .. id, prefix .. ':d:' .. id
  local recovered = its_life == 'recovered' or its_life == 'recent'
  local l = redis.call('HMGET', key, 'c', 'p', 'o', 'x', 'w')
  if not l[1] then
    if claims and its_life ~= '' and its_life ~= life then
      for _, known in ipairs({ended_key, charged_key}) do
        if redis.call('EXISTS', known) == 1 then
          if recovered then correct(known, id, used, claims, ended) end
          return {5, null}
        end
      end
      for _, s in ipairs(loaded(claims)) do
        if spend(s, used, ended) then
          save(s)
          redis.call('SET', charged_key, string.format('%.0f', used), 'EX', lapsed_seconds)
        end
      end
    end
    return {5, null}
  end
  redis.call('DEL', key)
  if l[5] and l[5] ~= '' then redis.call('SREM', prefix .. ':w:' .. l[5], id) end
  redis.call('SET', ended_key, string.format('%.0f', used), 'EX', recovered and lapsed_seconds or 120)
  local all, held, output = loaded(cjson.decode(l[1])), tonumber(l[2]) + tonumber(l[3]), tonumber(l[3])
  local periods = l[4] and cjson.decode(l[4])
  for i, s in ipairs(all) do
    if periods then
      if s.p and periods[i] == s.p then s.u = s.u + used - held end
    else
      redis.call('ZREM', s.running, id)
      put_back(s, held, output, used)
      if s.tl then s.tl = math.min(s.tokens, s.tl + held - used) end
    end
    save(s)
  end
  return {5, rooms(all)}
end

local function take(id, claims, prompt, output, least, requests, seeds, owner)
  -- A take that was given up, charged for elsewhere, and arrives only now.
  if redis.call('EXISTS', prefix .. ':d:' .. id) == 1 then return {5, null} end
  if owner ~= '' and redis.call('EXISTS', prefix .. ':g:' .. owner) == 1 then return {5, null} end
  local lease = prefix .. ':l:' .. id
  local before = redis.call('HMGET', lease, 'o', 'x')
  if before[1] and not before[2] then
    return {1, tonumber(before[1]), tonumber(before[1]), rooms(loaded(claims)), life}
  end
  for _, claim in ipairs(claims) do lapse(claim[1]) end
  local all = loaded(claims)
  local since, unknown = {}, false
  for i, s in ipairs(all) do
    since[i] = null
    if s.budget then
      local start = start_of(s.period_kind)
      if s.p and s.p < start then s.p, s.u = start, 0 end
      if s.p ~= start then
        local seed = limit(seeds[i])
        if seed then
          s.p, s.u, s.b = start, seed + (now < s.ft + written and s.f or 0), now
          s.f, s.ft = 0, 0
        else
          since[i] = start
          unknown = true
        end
      end
    end
  end
  if unknown then return {3, since} end
  local need, granted, ceiling = prompt + least, output, nil
  local worst
  local function refuse(which, dimension, wait, passing, rank)
    if not worst or (worst.passing and not passing) or (worst.passing == passing and rank > worst.rank) then
      worst = {which = which - 1, dimension = dimension, wait = wait or null, passing = passing, rank = rank}
    end
  end
  for i, s in ipairs(all) do
    if s.requests and s.rl < requests then
      local wait = s.requests >= requests and (requests - s.rl) * s.window / s.requests or nil
      refuse(i, 'requests', wait, false, wait or math.huge)
    end
    if s.concurrency and requests > 0 and redis.call('ZCARD', s.running) >= s.concurrency then refuse(i, 'concurrency', nil, false, 0) end
    if s.tokens then
      if s.tl < need then
        local wait = s.tokens >= need and (need - s.tl) * s.window / s.tokens or nil
        refuse(i, 'tokens', wait, s.tl + s.o >= need, wait or math.huge)
      end
      granted = math.min(granted, math.floor(s.tl) - prompt)
    end
    if s.budget then
      local free = s.budget - s.u - s.h
      if free < need then refuse(i, 'budget', nil, free + s.o >= need, math.huge) end
      granted = math.min(granted, free - prompt)
      ceiling = math.min(ceiling or math.huge, free - prompt)
    end
  end
  if worst then
    for _, s in ipairs(all) do save(s) end
    return {2, worst.which, worst.dimension, worst.wait, worst.passing, rooms(all)}
  end
  granted = math.max(granted, 0)
  local keep = keeping(claims)
  for _, s in ipairs(all) do
    if s.rl then s.rl = s.rl - requests end
    if s.tl then s.tl = s.tl - prompt - granted end
    s.h = s.h + prompt + granted
    s.o = s.o + granted
    if requests > 0 then
      redis.call('ZADD', s.running, now + lease_seconds, id)
      redis.call('EXPIRE', s.running, keep)
    end
    save(s)
  end
  redis.call('HSET', lease, 'c', cjson.encode(claims), 'p', prompt, 'o', granted, 'w', owner)
  redis.call('EXPIRE', lease, keep)
  if owner ~= '' then
    local theirs = prefix .. ':w:' .. owner
    redis.call('SADD', theirs, id)
    redis.call('EXPIRE', theirs, budget_seconds)
  end
  return {1, granted, ceiling or null, rooms(all), life}
end

local function renew(id)
  local key = prefix .. ':l:' .. id
  local l = redis.call('HMGET', key, 'c', 'x')
  if l[1] and not l[2] then
    local claims = cjson.decode(l[1])
    local keep = keeping(claims)
    redis.call('EXPIRE', key, keep)
    for _, claim in ipairs(claims) do
      redis.call('ZADD', prefix .. ':r:' .. claim[1], 'XX', now + lease_seconds, id)
      redis.call('EXPIRE', prefix .. ':r:' .. claim[1], keep)
    end
  end
end

local function extend(id, wanted, its_life)
  local key = prefix .. ':l:' .. id
  local l = redis.call('HMGET', key, 'c', 'o', 'x')
  -- Who was admitted under a lease that is forgotten goes on; what its budget could give was known then.
  if not l[1] and its_life ~= '' and its_life ~= life then return {4, wanted, true} end
  if not l[1] or l[3] then return {4, 0, false} end
  local all, output = loaded(cjson.decode(l[1])), tonumber(l[2])
  local granted, passing = wanted, true
  for _, s in ipairs(all) do
    if s.budget then
      local free = s.budget - s.u - s.h
      if free < wanted and free + s.o - output < wanted then passing = false end
      granted = math.min(granted, free)
    end
  end
  granted = math.max(0, granted)
  for _, s in ipairs(all) do
    if s.tl then s.tl = s.tl - granted end
    s.h = s.h + granted
    s.o = s.o + granted
    save(s)
  end
  redis.call('HINCRBY', key, 'o', granted)
  renew(id)
  return {4, granted, passing and granted < wanted}
end

local function charge(id, claims, requests, used, ended)
  if redis.call('EXISTS', prefix .. ':l:' .. id) == 1 then
    if requests == 0 then
      for _, s in ipairs(loaded(claims)) do
        if s.rl then s.rl = math.min(s.requests, s.rl + 1) end
        save(s)
      end
    end
    local settled = settle(id, used)
    redis.call('SET', prefix .. ':d:' .. id, string.format('%.0f', used), 'EX', lapsed_seconds)
    return settled
  end
  if not redis.call('SET', prefix .. ':d:' .. id, string.format('%.0f', used), 'NX', 'EX', lapsed_seconds) then return {5, null} end
  local all = loaded(claims)
  for _, s in ipairs(all) do
    if s.rl then s.rl = math.max(-s.requests, s.rl - requests) end
    if s.tl then s.tl = math.max(-s.tokens, s.tl - used) end
    spend(s, used, ended)
    save(s)
  end
  return {5, rooms(all)}
end

local function gone(owner)
  redis.call('SET', prefix .. ':g:' .. owner, '1', 'EX', lapsed_seconds)
  for _, id in ipairs(redis.call('SMEMBERS', prefix .. ':w:' .. owner)) do settle(id, 0) end
  redis.call('DEL', prefix .. ':w:' .. owner)
end

local replies = {}
for i, ask in ipairs(asks) do
  local kind = ask[1]
  if kind == 1 then
    replies[i] = take(ask[2], ask[3], ask[4], ask[5], ask[6], ask[7], ask[8], ask[9])
  elseif kind == 2 then
    replies[i] = extend(ask[2], ask[3], ask[4])
  elseif kind == 3 then
    replies[i] = settle(ask[2], ask[3], ask[4], ask[5], ask[6])
  elseif kind == 4 then
    replies[i] = charge(ask[2], ask[3], ask[4], ask[5], ask[6])
  elseif kind == 6 then
    gone(ask[2])
    replies[i] = {5, null}
  else
    for _, id in ipairs(ask[2]) do renew(id) end
    replies[i] = {5, null}
  end
end
return cjson.encode({turn, replies})
