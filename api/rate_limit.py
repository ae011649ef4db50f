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

    async def count_create(self, credential: Credential) -> None:
        """Raises: RateLimited."""
        if credential.requests_per_minute is not None:
            window = RateLimitItemPerMinute(credential.requests_per_minute)
            await self._count(window, "create", credential.key_id)

    async def count_read(self, credential: Credential) -> None:
        """Raises: RateLimited."""
        if credential.requests_per_minute is not None:
            await self._count(self._reads, "read", credential.key_id)

    async def close(self) -> None:
        """Let go of the connections: an event loop that has some open cannot end."""
        await self._connections.aclose()

    async def _count(self, window: RateLimitItem, *identity: str) -> None:
        try:
            if await self._windows.hit(window, *identity):
                return
            stats = await self._windows.get_window_stats(window, *identity)
        except RedisError as error:
            logger.warning("rate_limit.redis_away", error=str(error))
            return
        raise RateLimited(max(1, math.ceil(stats.reset_time - time.time())))
