"""Images in a bucket. botocore is known in this file only; everyone else knows bytes, keys, URLs.

Keys are unguessable and begin with their hour, so that a listing shows the oldest first.
"""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import Loader
from pydantic import HttpUrl

from storage.errors import StorageUnavailable
from storage.models import ImageFormat
from storage.settings import settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PREFIX = "images/"
CONTENT_TYPES = {image_format: f"image/{image_format}" for image_format in ImageFormat}

CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 10
ATTEMPTS_MAX = 3
"""One call takes no longer than about ATTEMPTS_MAX times READ_TIMEOUT_S with a store that hangs."""
POOL_SIZE = 32
DELETE_MAX = 1000
"""Keys in one DeleteObjects call; S3 takes no more."""
OPERATIONS = (
    *("PutObject", "GetObject", "DeleteObjects", "ListObjectsV2"),
    *("HeadBucket", "CreateBucket"),
)
"""Of S3's API, what is used here."""


class TemporaryCredentials(Exception):
    """The credentials of the image store expire, and every image URL would die with them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in the bucket: where, and by what its bytes can be proved."""

    key: str
    sha256: str
    size_bytes: int


def put(data: bytes, image_format: ImageFormat) -> Stored:
    """Store an image. Raises: StorageUnavailable."""
    key = f"{PREFIX}{datetime.now(UTC):%Y%m%dT%H}/{secrets.token_urlsafe(32)}.{image_format}"
    with _translated():
        _client().put_object(
            Bucket=settings.s3_bucket, Key=key, Body=data, ContentType=CONTENT_TYPES[image_format]
        )
    return Stored(key, hashlib.sha256(data).hexdigest(), len(data))


def get(key: str) -> bytes:
    """The bytes of an image. Raises: FileNotFoundError, StorageUnavailable."""
    with _translated():
        try:
            return _client().get_object(Bucket=settings.s3_bucket, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.NOT_FOUND:
                raise
            raise FileNotFoundError(key) from None


def url(key: str) -> tuple[str, datetime]:
    """A URL that anyone may GET until the moment that comes with it, and not after."""
    expires_at = datetime.now(UTC) + timedelta(seconds=settings.image_ttl_s)
    signed = _public_client().generate_presigned_url(
        "get_object",
        Params={"Bucket": settings.s3_bucket, "Key": key},
        ExpiresIn=settings.image_ttl_s,
    )
    return signed, expires_at


def delete(keys: Sequence[str]) -> set[str]:
    """Delete at most DELETE_MAX images; returns the keys of those that are still there.

    One that is not there is as good as deleted. Raises: StorageUnavailable.
    """
    if not keys:
        return set()
    with _translated():
        answer = _client().delete_objects(
            Bucket=settings.s3_bucket,
            Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
        )
    # Refused key by key, under a status of 200.
    return {error["Key"] for error in answer.get("Errors", [])}


def delete_older_than(age: timedelta) -> int:
    """Delete every image that was stored longer than `age` ago; returns how many there were.

    Whether a task knows them does not matter, so this also takes away what a worker stored
    before it died. Raises: StorageUnavailable.
    """
    before = datetime.now(UTC) - age
    deleted = 0
    with _translated():
        pages = _client().get_paginator("list_objects_v2")
        for page in pages.paginate(
            Bucket=settings.s3_bucket, Prefix=PREFIX, PaginationConfig={"PageSize": DELETE_MAX}
        ):
            found = page.get("Contents", [])
            old = [item["Key"] for item in found if item["LastModified"] < before]
            deleted += len(old) - len(delete(old))
            # The oldest come first: after a page with a young image there are only younger ones,
            # except within the same hour, for which there is the next time.
            if len(old) < len(found):
                break
    return deleted


def load() -> None:
    """Load now what the first call would load. Raises: TemporaryCredentials."""
    _client()


def check() -> None:
    """Raises: StorageUnavailable: the bucket cannot be reached."""
    with _translated():
        _client().head_bucket(Bucket=settings.s3_bucket)


def make_bucket() -> None:
    """Make the bucket if it is not there. Raises: StorageUnavailable."""
    with _translated():
        try:
            _client().head_bucket(Bucket=settings.s3_bucket)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.NOT_FOUND:
                raise
            if settings.s3_endpoint_url is None and settings.s3_region != "us-east-1":
                # AWS wants its regions named, except the first; other servers know no regions.
                _client().create_bucket(
                    Bucket=settings.s3_bucket,
                    CreateBucketConfiguration={"LocationConstraint": settings.s3_region},  # type: ignore[typeddict-item]
                )
            else:
                _client().create_bucket(Bucket=settings.s3_bucket)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise StorageUnavailable from error


@cache
def _client() -> "S3Client":
    return _connect(settings.s3_endpoint_url)


@cache
def _public_client() -> "S3Client":
    """Signs for the address that customers use; it is never called."""
    return _connect(settings.s3_public_url or settings.s3_endpoint_url)


class _Needed(Loader):
    """What botocore knows of AWS, without what nobody here asks for: 9 MB in every process."""

    def load_data_with_path(self, name: str) -> Any:
        data, path = super().load_data_with_path(name)
        if name == "endpoints":
            for partition in data["partitions"]:
                partition["services"] = {"s3": partition["services"].get("s3", {})}
        elif name.endswith("/service-2"):
            data["operations"] = {each: data["operations"][each] for each in OPERATIONS}
            for shape in data["shapes"].values():
                for described in (shape, *shape.get("members", {}).values()):
                    described.pop("documentation", None)
        return data, path


def _connect(endpoint_url: HttpUrl | None) -> "S3Client":
    """Raises: TemporaryCredentials."""
    secret = settings.s3_secret_access_key
    session = botocore.session.Session()
    session.register_component("data_loader", _Needed())
    if settings.s3_access_key_id or secret:
        session.set_credentials(
            settings.s3_access_key_id or "", "" if secret is None else secret.get_secret_value()
        )
    credentials = session.get_credentials()
    if credentials is None:
        raise TemporaryCredentials(
            "There are no credentials for the image store: "
            "set ZIMAGE_S3_ACCESS_KEY_ID and ZIMAGE_S3_SECRET_ACCESS_KEY"
        )
    if credentials.token is not None:
        raise TemporaryCredentials(
            "The credentials of the image store are temporary, and image URLs would end with them:"
            " set ZIMAGE_S3_ACCESS_KEY_ID and ZIMAGE_S3_SECRET_ACCESS_KEY to lasting ones"
        )
    client = session.create_client(
        "s3",
        region_name=settings.s3_region,
        endpoint_url=None if endpoint_url is None else str(endpoint_url),
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if endpoint_url else "auto"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": ATTEMPTS_MAX, "mode": "standard"},
            max_pool_connections=POOL_SIZE,
        ),
    )
    return cast("S3Client", client)
