"""Secrets that must be read again lie sealed in the database, under keys that lie elsewhere.

A key of a customer is only compared, so its digest is enough. A callback secret signs, so it is
encrypted (Fernet: AES-128-CBC and HMAC-SHA-256). The first key seals, and every key opens.
"""

import re
from base64 import urlsafe_b64encode
from functools import cache
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, SecretStr
from pydantic_settings import BaseSettings

from storage.settings import MODEL_CONFIG, load

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

MARK = "§"
"""What a sealed text begins with. Not ASCII, so that a process of an older version, which takes the
text for the secret itself, cannot sign with it: Base64 refuses it, nothing is noted, and a courier
of this version tries the callback again."""
KEY = re.compile(r"[0-9a-f]{64}")


class CannotUnseal(Exception):
    """What was sealed was sealed with another key than ours."""

    def __init__(self) -> None:
        super().__init__("None of ZIMAGE_SECRET_KEYS opens it")


def _keys(keys: SecretStr) -> SecretStr:
    if not all(map(KEY.fullmatch, keys.get_secret_value().split(","))):
        raise ValueError("each key is 64 hexadecimal digits, and there is a comma between two")
    return keys


class SealingSettings(BaseSettings):
    """Not among the floor's other settings: a worker never opens a secret, so it has no key."""

    model_config = MODEL_CONFIG

    secret_keys: Annotated[SecretStr, AfterValidator(_keys)]
    """256-bit keys in lower-case hexadecimal, the newest first, with commas."""


def seal(secret: str) -> str:
    """`secret` as it may lie in the database."""
    return MARK + _box().encrypt(secret.encode()).decode()


def unseal(kept: str) -> str:
    """What was sealed. A text without the mark is of an older version, and is the secret itself.

    Raises: CannotUnseal.
    """
    if not kept.startswith(MARK):
        return kept
    from cryptography.fernet import InvalidToken

    try:
        return _box().decrypt(kept.removeprefix(MARK).encode()).decode()
    except InvalidToken:
        raise CannotUnseal from None


def reseal(kept: str) -> str:
    """The same secret under the first key. Raises: CannotUnseal."""
    return seal(unseal(kept))


@cache
def _box() -> "MultiFernet":
    return box(load(SealingSettings).secret_keys)


def box(keys: SecretStr) -> "MultiFernet":
    """What seals with the first of `keys`."""
    # Only now: it is 6 MB, and an API process that is never asked for a secret does without.
    from cryptography.fernet import Fernet, MultiFernet

    return MultiFernet(
        Fernet(urlsafe_b64encode(bytes.fromhex(key))) for key in keys.get_secret_value().split(",")
    )
