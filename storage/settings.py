"""What the floor needs to know of the machine it stands on, read from `ZIMAGE_*` variables."""

from decimal import Decimal
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

MODEL_CONFIG = SettingsConfigDict(env_prefix="ZIMAGE_", frozen=True)


REDIS_SCHEMES = ("redis://", "rediss://", "unix://")

S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Read `settings` from the environment.

    Raises:
        SystemExit: one is missing or malformed; the message names the variable.
    """
    try:
        return settings()
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        name = "ZIMAGE_" + "_".join(map(str, fault["loc"])).upper()
        raise SystemExit(f"The setting {name} is not usable: {fault['msg']}") from None


def _postgres(url: SecretStr) -> SecretStr:
    try:
        driver = make_url(url.get_secret_value()).drivername
    except ArgumentError:
        raise ValueError("this is not a database URL") from None
    if driver != "postgresql+psycopg":
        raise ValueError("the URL must begin with postgresql+psycopg://")
    return url


def _redis(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().startswith(REDIS_SCHEMES):
        raise ValueError(f"the URL must begin with one of {', '.join(REDIS_SCHEMES)}")
    return url


class StorageSettings(BaseSettings):
    """Servers, money and times that every process must agree on."""

    model_config = MODEL_CONFIG

    database_url: Annotated[SecretStr, AfterValidator(_postgres)]
    redis_url: Annotated[SecretStr, AfterValidator(_redis)]

    s3_endpoint_url: HttpUrl | None = None
    """Where the image store is reached from here; None means AWS's own address of the region."""
    s3_public_url: HttpUrl | None = None
    """The address that image URLs carry; None means the same as `s3_endpoint_url`."""
    s3_bucket: str = "zimage"
    s3_region: str = "us-east-1"
    s3_access_key_id: str | None = None
    s3_secret_access_key: SecretStr | None = None
    """Both or neither; neither means boto3's own search, which must find lasting credentials."""

    image_ttl_s: int = Field(default=24 * 3600, ge=1, le=7 * 24 * 3600)
    """How long an image lives, and its URL. Seven days is the most that S3 can sign."""
    task_data_ttl_s: int = Field(default=24 * 3600, ge=1, le=366 * 24 * 3600)
    """How long after its end a task can be asked for; then it is erased, but never before its
    image."""

    price_credits: Decimal = Field(default=Decimal(15), ge=0, max_digits=18, decimal_places=6)
    """Credits per image; fixed on a task when it is submitted."""
    prompt_extend_price_factor: Decimal = Field(
        default=Decimal(2), ge=1, max_digits=9, decimal_places=3
    )
    """An image whose prompt is rewritten costs this many times `price_credits`."""
    unfinished_max: int = Field(default=1000, ge=1)
    """Unfinished tasks that a new account may have, unless its operator says otherwise."""
    backlog_max: int = Field(default=100_000, ge=1)
    """Tasks that may wait in the whole service; more are refused before anything is reserved."""
    group_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """User group to its share of the GPUs; a group that is not named weighs 1."""

    lease_s: float = Field(default=10, gt=0)
    """A worker that has not renewed its claim for this long is given up for dead."""
    losses_max: int = Field(default=3, ge=1)
    """A task whose worker was lost this many times fails."""
    task_timeout_s: int = Field(default=300, ge=1)
    """A task that has been drawn for this long is stopped and fails."""

    model: str = "demo"
    """A hub id, a folder, or `demo`."""


settings = load(StorageSettings)
