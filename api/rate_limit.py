"""How often a key may ask: creates and reads counted apart, in Redis, over all API processes.

While Redis is away nothing is limited. A limit keeps customers from each other's GPU time, which
the fair order and the limit of unfinished tasks do as well; refusing everybody would be worse.
"""

import math
import time

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from api.settings import settings
from storage.accounts import Credential
from storage.errors import RateLimited
from storage.queue import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from storage.settings import settings as storage_settings

Headers = dict[str, str]
"""How much is left, as draft-ietf-httpapi-ratelimit-headers-11 says it."""

logger = structlog.get_logger()


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
