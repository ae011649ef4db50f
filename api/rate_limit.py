"""How often a key may ask: creates and reads counted apart, in Redis, over all API processes; and
how often an address may show a wrong one, in each process.

While Redis is away nothing is limited. A limit keeps customers from each other's GPU time, which
the fair order and the limit of unfinished tasks do as well; refusing everybody would be worse.
"""

import math
import time
from ipaddress import IPv4Address, IPv6Address, ip_address

import structlog
from cachetools import LRUCache
from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError
from starlette.requests import Request

from api.settings import settings
from storage import queue
from storage.accounts import Credential
from storage.errors import RateLimited
from storage.queue import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from storage.settings import settings as storage_settings

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


class RateLimiter:
    """Exact moving windows. A key whose `requests_per_minute` is None is not limited at all."""

    def __init__(self) -> None:
        self._connections = ConnectionPool.from_url(
            storage_settings.redis_url.get_secret_value(),
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=ANSWER_TIMEOUT_S,
        )
        storage = RedisStorage(
            # Names the kind of storage only: `limits` cannot read every URL that Redis can.
            "async+redis://localhost:6379",
            implementation="redispy",
            key_prefix="zimage:limits",
            connection_pool=self._connections,  # type: ignore[arg-type]
        )
        self._windows = MovingWindowRateLimiter(storage)
        self._reads = RateLimitItemPerSecond(settings.reads_per_second)

    async def count_create(self, credential: Credential) -> Headers:
        """Raises: RateLimited."""
        if credential.requests_per_minute is None:
            return {}
        window = RateLimitItemPerMinute(credential.requests_per_minute)
        return await self._count(window, "create", str(credential.key_id))

    async def count_read(self, credential: Credential) -> Headers:
        """Raises: RateLimited."""
        if credential.requests_per_minute is None:
            return {}
        return await self._count(self._reads, "read", str(credential.key_id))

    async def close(self) -> None:
        """Let go of the connections: an event loop that has some open cannot end."""
        await self._connections.aclose()

    async def _count(self, window: RateLimitItem, policy: str, key_id: str) -> Headers:
        try:
            with queue.asking():
                counted = await self._windows.hit(window, policy, key_id)
                stats = await self._windows.get_window_stats(window, policy, key_id)
        except RedisError as error:
            logger.warning("rate_limit.redis_away", error=str(error))
            return {}
        reset_s = max(1, math.ceil(stats.reset_time - time.time()))
        headers = {
            "RateLimit-Policy": f'"{policy}";q={window.amount};w={window.get_expiry()}',
            "RateLimit": f'"{policy}";r={stats.remaining};t={reset_s}',
        }
        if not counted:
            raise RateLimited(reset_s, headers)
        return headers
