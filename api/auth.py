"""Who asks, and whether they may: decided before the body of a request is read."""

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated

from cachetools import LRUCache
from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from api.batching import Batcher
from api.rate_limit import RateLimiter
from storage import accounts
from storage.accounts import Credential
from storage.database import transaction
from storage.errors import AccountSuspended, AdminOnly, ServiceError, Unauthenticated

KEY_CACHE_S = 0.9
"""How long a key is believed without asking the database, and so how long a revoked one still
works: revocation promises one second."""
KEY_CACHE_MAX = 100_000

Admit = Callable[[Request], Awaitable[Credential]]
"""Lets a request in, or raises the ServiceError that says why not."""


class Admission:
    """The doors: one for each kind of request, all behind the same keys."""

    def __init__(self) -> None:
        self._cache: LRUCache[bytes, tuple[float, Credential]] = LRUCache(KEY_CACHE_MAX)
        self._keys: Batcher[bytes, Credential] = Batcher(_find_keys)
        self._limiter = RateLimiter()

    async def create(self, request: Request) -> Credential:
        """Raises: Unauthenticated, AccountSuspended, RateLimited."""
        credential = await self.authenticate(request)
        await self._limiter.count_create(credential)
        return credential

    async def read(self, request: Request) -> Credential:
        """Raises: Unauthenticated, AccountSuspended, RateLimited."""
        credential = await self.authenticate(request)
        await self._limiter.count_read(credential)
        return credential

    async def admin(self, request: Request) -> Credential:
        """Raises: Unauthenticated, AccountSuspended, AdminOnly, RateLimited."""
        credential = await self.authenticate(request)
        if not credential.admin:
            raise AdminOnly
        await self._limiter.count_read(credential)
        return credential

    async def authenticate(self, request: Request) -> Credential:
        """The credential of the bearer key. Raises: Unauthenticated, AccountSuspended."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated
        digest = accounts.digest(secret.strip())
        asked_at, credential = self._cache.get(digest, (0.0, None))
        # Counted from before the look: what was revoked while it took place is believed no longer.
        if credential is None or time.monotonic() - asked_at > KEY_CACHE_S:
            asked_at = time.monotonic()
            credential = await self._keys.add(digest)
            self._cache[digest] = asked_at, credential
        if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
            raise Unauthenticated
        if credential.suspended:
            raise AccountSuspended
        return credential

    async def close(self) -> None:
        """Let go of what the doors hold open."""
        await self._limiter.close()


def _find_keys(digests: Sequence[bytes]) -> list[Credential | ServiceError]:
    with transaction() as session:
        found = accounts.authenticate(session, digests)
    return [found.get(digest) or Unauthenticated() for digest in digests]


async def admit_create(request: Request) -> Credential:
    admission: Admission = request.app.state.admission
    return await admission.create(request)


async def admit_read(request: Request) -> Credential:
    admission: Admission = request.app.state.admission
    return await admission.read(request)


async def admit_admin(request: Request) -> Credential:
    admission: Admission = request.app.state.admission
    return await admission.admin(request)


bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer zk_…`")
"""Tells the documentation how a key is shown; `Admission` is what looks at it."""


def _caller(request: Request) -> Credential:
    credential: Credential = request.state.caller
    return credential


Caller = Annotated[Credential, Depends(_caller)]
"""Whoever the route's door let in."""
