"""How often a key may ask: creates and reads counted apart, in Redis, over all API processes; and
how often an address may show a wrong one, in each process.

While Redis is away nothing is limited. A limit keeps customers from each other's GPU time, which
the fair order and the limit of unfinished tasks do as well; refusing everybody would be worse.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import structlog
from cachetools import LRUCache
from redis.exceptions import RedisError
from starlette.requests import Request

from api.batching import Batcher
from api.settings import settings
from storage.accounts import Credential
from storage.errors import RateLimited
from storage.scripts import Script

WRONG_KEYS_WINDOW_S = 60
ADDRESSES_MAX = 100_000
"""Client addresses whose wrong keys are remembered; the one not heard of for longest goes first."""
ADDRESS_LENGTH_MAX = 64

Headers = dict[str, str]
"""How much is left, as draft-ietf-httpapi-ratelimit-headers-11 says it."""

logger = structlog.get_logger()


class WrongKeys:
    """Wrong keys by client address, counted in this process, in windows of a minute each.

    In the process and not in Redis, because a stranger must not make us write, and because what is
    left to limit is work and noise: nobody guesses 256 bits, at however many processes.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._windows: LRUCache[str, tuple[float, int]] = LRUCache(ADDRESSES_MAX)

    def full(self, request: Request) -> bool:
        """Whether one more from there would be one too many."""
        return self._window(_network(request))[1] >= self._per_minute

    def count(self, request: Request) -> None:
        """Raises: RateLimited."""
        network = _network(request)
        ends_at, count = self._window(network)
        if count >= self._per_minute:
            raise RateLimited(max(1, math.ceil(ends_at - time.monotonic())))
        self._windows[network] = ends_at, count + 1

    def _window(self, network: str) -> tuple[float, int]:
        now = time.monotonic()
        ends_at, count = self._windows.get(network, (0.0, 0))
        return (ends_at, count) if now < ends_at else (now + WRONG_KEYS_WINDOW_S, 0)


def _network(request: Request) -> str:
    """What one customer has: of IPv4 an address, of IPv6 the 2^64 that a line is given.

    The address is uvicorn's, which believes X-Forwarded-For of the proxies that it was told of.
    """
    host = "" if request.client is None else request.client.host
    try:
        address = ip_address(host)
    except ValueError:  # a socket that has no addresses
        return host[:ADDRESS_LENGTH_MAX]
    if isinstance(address, IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))


@dataclass(frozen=True, slots=True)
class Window:
    """At most `limit` requests in any `seconds`; `key` says whose, and of what kind."""

    policy: str
    key: str
    limit: int
    seconds: int


@dataclass(frozen=True, slots=True)
class Counted:
    """Whether one more was allowed; `remaining` are left, and the oldest leaves in `reset_s`."""

    allowed: bool
    remaining: int
    reset_s: int


_COUNT = """
    -- Each key is a list of the moments, in microseconds, of the requests in its window, the newest
    -- first. What has left the window is taken off the end, so each moment is touched twice in all.
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    local counted = {}
    for n, key in ipairs(KEYS) do
        local limit, seconds = tonumber(ARGV[2 * n - 1]), tonumber(ARGV[2 * n])
        local oldest = redis.call('LINDEX', key, -1)
        while oldest and tonumber(oldest) <= now - seconds * 1000000 do
            redis.call('RPOP', key)
            oldest = redis.call('LINDEX', key, -1)
        end
        local used = redis.call('LLEN', key)
        local allowed = used < limit
        if allowed then
            used = redis.call('LPUSH', key, string.format('%.0f', now))
            redis.call('EXPIRE', key, seconds)
        end
        local left_us = seconds * 1000000 - (oldest and now - tonumber(oldest) or 0)
        counted[n] = (allowed and 1 or 0) .. ' ' .. limit - used .. ' ' .. math.ceil(left_us / 1000)
    end
    return table.concat(counted, ' ')  -- one text is read faster than many numbers
"""


class RateLimiter:
    """Exact moving windows. A key whose `requests_per_minute` is None is not limited at all."""

    def __init__(self) -> None:
        self._script = Script(_COUNT)
        self._windows: Batcher[Window, Counted | None] = Batcher(self._count_all)

    async def count_create(self, credential: Credential) -> Headers:
        """Raises: RateLimited."""
        if credential.requests_per_minute is None:
            return {}
        key = f"create:{credential.key_id}"
        return await self._count(Window("create", key, credential.requests_per_minute, 60))

    async def count_read(self, credential: Credential) -> Headers:
        """Raises: RateLimited."""
        if credential.requests_per_minute is None:
            return {}
        key = f"read:{credential.key_id}"
        return await self._count(Window("read", key, settings.reads_per_second, 1))

    async def _count(self, window: Window) -> Headers:
        counted = await self._windows.add(window)
        if counted is None:
            return {}
        headers = {
            "RateLimit-Policy": f'"{window.policy}";q={window.limit};w={window.seconds}',
            "RateLimit": f'"{window.policy}";r={counted.remaining};t={counted.reset_s}',
        }
        if not counted.allowed:
            raise RateLimited(counted.reset_s, headers)
        return headers

    async def _count_all(self, windows: Sequence[Window]) -> Sequence[Counted | None]:
        """One round trip for all that arrived during the last; None for each without Redis."""
        keys = [f"zimage:limit:{window.key}" for window in windows]
        limits = [number for window in windows for number in (window.limit, window.seconds)]
        try:
            told: bytes = await self._script.run(keys, limits)
        except RedisError as error:
            logger.warning("rate_limit.redis_away", error=str(error))
            return [None] * len(windows)
        numbers = iter(map(int, told.split()))
        return [
            Counted(bool(allowed), remaining, max(1, math.ceil(left_ms / 1000)))
            for allowed, remaining, left_ms in zip(numbers, numbers, numbers, strict=True)
        ]
