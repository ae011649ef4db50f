"""Who asks, and whether they may: decided before the body of a request is read."""

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from typing import Annotated

from cachetools import LRUCache
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer

from api.batching import Batcher
from api.rate_limit import RateLimiter, WrongKeys
from api.settings import settings
from storage import accounts
from storage.accounts import Credential
from storage.database import transaction
from storage.errors import (
    AccountNotFound,
    AccountSuspended,
    AdminOnly,
    ServiceError,
    Unauthenticated,
)

KEY_CACHE_S = 0.9
"""How long a key is believed without asking the database, and so how long a revoked one still
works: revocation promises one second."""
KEY_CACHE_MAX = 100_000

FORWARDED = (
    "forwarded",
    "via",
    "x-forwarded-",
    "x-real-ip",
    "x-client-ip",
    "true-client-ip",
    "cf-",
)
"""How the headers begin that a proxy adds for those whom it speaks for."""
LOOPBACK_HOST = re.compile(
    r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE
)
"""The Host that a caller of this machine asks for. Any other may have been made to lead here."""
NO_KEY = (
    "Show an API key: without one, only programs on this machine are served, "
    "and only from an account that the operator has named for them"
)

Admit = Callable[[Request], Awaitable[Credential]]
"""Lets a request in, or raises the ServiceError that says why not."""


class Admission:
    """The doors: one for each kind of request, all behind the same keys."""

    def __init__(
        self, *, auth_failures_per_minute: int = settings.auth_failures_per_minute
    ) -> None:
        self._cache: LRUCache[bytes, tuple[float, Credential]] = LRUCache(KEY_CACHE_MAX)
        self._keys: Batcher[bytes, Credential] = Batcher(_find_keys)
        self._doubtful: Batcher[bytes, Credential] = Batcher(_find_keys)
        self._limiter = RateLimiter()
        self._wrong_keys = WrongKeys(auth_failures_per_minute)

    async def create(self, request: Request) -> Credential:
        """Raises: Unauthenticated, AccountSuspended, RateLimited."""
        credential = await self.authenticate(request)
        request.state.headers |= await self._limiter.count_create(credential)
        return credential

    async def local(self, request: Request) -> Credential:
        """As `create`; without a key, a caller of this machine is the account that the operator
        has named for that. Raises: Unauthenticated, AccountSuspended, RateLimited.
        """
        if "authorization" in request.headers:
            return await self.create(request)
        account_id = settings.local_account_id
        if not account_id or not is_local(request):
            raise Unauthenticated(NO_KEY)
        credential = await self._believed(account_id.encode(), partial(_find_account, account_id))
        if credential.suspended:
            raise AccountSuspended
        return credential

    async def read(self, request: Request) -> Credential:
        """Raises: Unauthenticated, AccountSuspended, RateLimited."""
        credential = await self.authenticate(request)
        request.state.headers |= await self._limiter.count_read(credential)
        return credential

    async def admin(self, request: Request) -> Credential:
        """Raises: Unauthenticated, AccountSuspended, AdminOnly, RateLimited."""
        credential = await self.authenticate(request)
        if not credential.admin:
            raise AdminOnly
        request.state.headers |= await self._limiter.count_read(credential)
        return credential

    async def authenticate(self, request: Request) -> Credential:
        """The credential of the bearer key.

        A key is looked up whatever else came from its address, so that nobody is locked out by a
        neighbour. Where too many were wrong they are looked up in a lane of their own, one query
        at a time, so that a flood of them holds up nobody elsewhere.

        Raises: Unauthenticated, AccountSuspended, RateLimited: one wrong key too many.
        """
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated
        digest = accounts.digest(secret.strip())
        try:
            credential = await self._believed(digest, partial(self._look_up, request, digest))
            if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
                raise Unauthenticated
        except Unauthenticated:
            self._wrong_keys.count(request)
            raise
        if credential.suspended:
            raise AccountSuspended
        return credential

    async def _look_up(self, request: Request, digest: bytes) -> Credential:
        lane = self._doubtful if self._wrong_keys.full(request) else self._keys
        return await lane.add(digest)

    async def _believed(self, key: bytes, look: Callable[[], Awaitable[Credential]]) -> Credential:
        asked_at, credential = self._cache.get(key, (0.0, None))
        # Counted from before the look: what was revoked while it took place is believed no longer.
        if credential is None or time.monotonic() - asked_at > KEY_CACHE_S:
            asked_at = time.monotonic()
            credential = await look()
            self._cache[key] = asked_at, credential
        return credential


async def _find_keys(digests: Sequence[bytes]) -> list[Credential | ServiceError]:
    found, used = await accounts.authenticate(digests)
    if used:
        await run_in_threadpool(_note_use, used)
    return [found.get(digest) or Unauthenticated() for digest in digests]


def _note_use(key_ids: Sequence[str]) -> None:
    with transaction() as session:
        accounts.note_use(session, key_ids)


async def _find_account(account_id: str) -> Credential:
    return await run_in_threadpool(_account, account_id)


def _account(account_id: str) -> Credential:
    try:
        with transaction() as session:
            return accounts.keyless(session, account_id)
    except AccountNotFound:
        raise Unauthenticated(NO_KEY) from None


def is_local(request: Request) -> bool:
    """Whether the caller is a program on this machine that speaks for its user.

    A proxy on this machine speaks for others: it says so in a header, or asks for another host, or
    speaks HTTP/1.0, which is nginx where it was told nothing. A page whose name was made to lead
    here asks for that name; every other page names its origin, and must be ours or the operator's
    choice: `*` lets pages read answers, and makes no page the operator.
    """
    if request.client is None or not _is_loopback(request.client.host):
        return False
    if request.scope["http_version"] == "1.0":
        return False
    if any(name.startswith(FORWARDED) for name in request.headers):
        return False
    host = request.headers.get("host", "")
    if not LOOPBACK_HOST.fullmatch(host):
        return False
    origin = request.headers.get("origin")
    return origin in (None, f"{request.url.scheme}://{host}", *settings.cors_origins)


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


async def admit_local(request: Request) -> Credential:
    admission: Admission = request.app.state.admission
    return await admission.local(request)


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


async def caller_of(request: Request) -> Credential:
    """Whoever was let in. A coroutine, since FastAPI would give a function a thread."""
    credential: Credential = request.state.caller
    return credential


Caller = Annotated[Credential, Depends(caller_of)]
"""Whoever the route's door let in."""
