"""Who pays, and the keys they show. A key's secret is shown once; only its SHA-256 is kept.

A key is found by its digest in an index. How long that takes tells about the digest of what was
shown, and nobody who does not know a key can choose what has a digest near that of one.
"""

import base64
import hashlib
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from storage import reads
from storage.errors import AccountNotFound, KeyNotFound
from storage.models import Account, ApiKey
from storage.sealing import reseal, seal
from storage.settings import settings

GROUP = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The form of a user group's name."""

SECRET_PREFIX = "zk_"  # noqa: S105 - what every key begins with is no secret
SECRET_BYTES = 32
PREFIX_LENGTH = len(SECRET_PREFIX) + 8
"""How much of a key is kept in clear, so that people can tell their keys apart."""

CREATES_PER_MINUTE = 120
"""Creates per minute of a key for which its operator named no other limit."""

LAST_USE_S = 60
"""`last_used_at` is exact to this many seconds: noting every use would cost a write for each."""

CALLBACK_SECRET_BYTES = 32
"""Standard Webhooks 1.0.0 asks for 24 to 64."""


@dataclass(frozen=True, slots=True)
class Credential:
    """What a valid key says about whoever shows it."""

    key_id: str | None
    """None for a caller of this machine, who may come without a key."""
    account_id: str
    admin: bool
    suspended: bool
    models: frozenset[str] | None
    requests_per_minute: int | None
    expires_at: datetime | None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


def digest(secret: str) -> bytes:
    """What is stored of a key. A fast hash is enough for 256 random bits."""
    return hashlib.sha256(secret.encode()).digest()


def create(
    session: Session,
    name: str,
    *,
    user_group: str = "default",
    unfinished_max: int | None = settings.unfinished_max,
    account_id: str | None = None,
) -> Account:
    account = Account(
        id=account_id or f"acct_{secrets.token_hex(8)}",
        name=name,
        user_group=user_group,
        unfinished_max=unfinished_max,
        sealed_callback_secret=seal(_callback_secret()),
    )
    session.add(account)
    session.flush()
    session.refresh(account)
    return account


def get(session: Session, account_id: str) -> Account:
    """Raises: AccountNotFound."""
    account = session.get(Account, account_id)
    if account is None:
        raise AccountNotFound
    return account


def change(session: Session, account_id: str, **values: Any) -> Account:
    """Set columns of an account: name, user_group, unfinished_max, suspended.

    Raises: AccountNotFound.
    """
    account = session.scalar(
        update(Account)
        .where(Account.id == account_id)
        .values(**values)
        .returning(Account)
        .execution_options(populate_existing=True)
    )
    if account is None:
        raise AccountNotFound
    return account


def newest(
    session: Session, *, before: tuple[datetime, str] | None, limit: int
) -> Sequence[Account]:
    query = select(Account).order_by(Account.created_at.desc(), Account.id.desc()).limit(limit)
    if before is not None:
        query = query.where(tuple_(Account.created_at, Account.id) < before)
    return session.scalars(query).all()


def issue_key(
    session: Session,
    account_id: str,
    *,
    name: str = "",
    models: Collection[str] | None = None,
    admin: bool = False,
    requests_per_minute: int | None = CREATES_PER_MINUTE,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key. Returns its row and the secret, which cannot be read again.

    Raises: AccountNotFound.
    """
    get(session, account_id)
    secret = SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    key = ApiKey(
        id=f"key_{secrets.token_hex(8)}",
        account_id=account_id,
        name=name,
        secret_sha256=digest(secret),
        prefix=secret[:PREFIX_LENGTH],
        models=None if models is None else sorted(models),
        admin=admin,
        requests_per_minute=requests_per_minute,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    session.refresh(key)
    return key, secret


def rotate_key(session: Session, key_id: str, *, overlap: timedelta) -> tuple[ApiKey, str]:
    """Make a key that may do what `key_id` may; the old one stays valid for `overlap`.

    Raises: KeyNotFound: there is none, or it is no longer valid.
    """
    old = session.scalar(select(ApiKey).where(ApiKey.id == key_id).with_for_update())
    now = datetime.now(UTC)
    if old is None or old.revoked_at is not None:
        raise KeyNotFound
    if old.expires_at is not None and old.expires_at <= now:
        raise KeyNotFound
    new = issue_key(
        session,
        old.account_id,
        name=old.name,
        models=old.models,
        admin=old.admin,
        requests_per_minute=old.requests_per_minute,
        expires_at=old.expires_at,
    )
    old.expires_at = min(now + overlap, old.expires_at or now + overlap)
    session.flush()
    return new


def revoke_key(session: Session, key_id: str) -> ApiKey:
    """End a key now. Doing it twice keeps the first moment. Raises: KeyNotFound."""
    key = session.scalar(
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.clock_timestamp()))
        .returning(ApiKey)
        .execution_options(populate_existing=True)
    )
    if key is None:
        raise KeyNotFound
    return key


def keys(
    session: Session, account_id: str, *, before: tuple[datetime, str] | None, limit: int
) -> Sequence[ApiKey]:
    """Keys of an account, newest first. Raises: AccountNotFound."""
    get(session, account_id)
    query = (
        select(ApiKey)
        .where(ApiKey.account_id == account_id)
        .order_by(ApiKey.created_at.desc(), ApiKey.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(tuple_(ApiKey.created_at, ApiKey.id) < before)
    return session.scalars(query).all()


_VALID = """
    SELECT secret_sha256, api_keys.id, account_id, admin, suspended, models, requests_per_minute,
           expires_at,
           coalesce(last_used_at < clock_timestamp() - make_interval(secs => %s), true) AS stale
      FROM api_keys JOIN accounts ON accounts.id = account_id
     WHERE secret_sha256 = ANY(%s) AND revoked_at IS NULL
       AND (expires_at IS NULL OR expires_at > clock_timestamp())
"""


async def authenticate(
    digests: Collection[bytes],
) -> tuple[dict[bytes, Credential], list[str]]:
    """The credentials of those keys that are valid now, by digest; and the ids of those for which
    `note_use` is due.
    """
    found = await reads.rows(_VALID, [LAST_USE_S, list(digests)])
    credentials = {
        row["secret_sha256"]: Credential(
            key_id=row["id"],
            account_id=row["account_id"],
            admin=row["admin"],
            suspended=row["suspended"],
            models=None if row["models"] is None else frozenset(row["models"]),
            requests_per_minute=row["requests_per_minute"],
            expires_at=row["expires_at"],
        )
        for row in found
    }
    return credentials, [row["id"] for row in found if row["stale"]]


def note_use(session: Session, key_ids: Collection[str]) -> None:
    """These keys were used now; skipped where somebody is just noting the same."""
    free = select(ApiKey.id).where(ApiKey.id.in_(key_ids)).with_for_update(skip_locked=True)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id.in_(free))
        .values(last_used_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


def keyless(session: Session, account_id: str) -> Credential:
    """What a caller may do for whom this account pays without a key. Raises: AccountNotFound."""
    account = get(session, account_id)
    return Credential(
        key_id=None,
        account_id=account.id,
        admin=False,
        suspended=account.suspended,
        models=None,
        requests_per_minute=None,
        expires_at=None,
    )


def rotate_callback_secret(session: Session, account_id: str, *, overlap: timedelta) -> Account:
    """Sign with a new secret; for `overlap`, callbacks carry the old one's signature as well.

    Raises: AccountNotFound.
    """
    return change(
        session,
        account_id,
        sealed_callback_secret=seal(_callback_secret()),
        sealed_callback_secret_before=Account.sealed_callback_secret,
        callback_secret_before_until=datetime.now(UTC) + overlap,
    )


def reseal_callback_secrets(session: Session, *, after: str, limit: int) -> Sequence[str]:
    """Seal the secrets of the next `limit` accounts by id under the newest key.

    Returns their ids; none means that all are done. Raises: CannotUnseal.
    """
    rows = session.scalars(
        select(Account)
        .where(Account.id > after)
        .order_by(Account.id)
        .limit(limit)
        .with_for_update(key_share=True)
    ).all()
    for account in rows:
        account.sealed_callback_secret = reseal(account.sealed_callback_secret)
        if account.sealed_callback_secret_before is not None:
            account.sealed_callback_secret_before = reseal(account.sealed_callback_secret_before)
    session.flush()
    return [account.id for account in rows]


def _callback_secret() -> str:
    """A secret in the form of Standard Webhooks 1.0.0: `whsec_` and Base64."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(CALLBACK_SECRET_BYTES)).decode()
