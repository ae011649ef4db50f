"""What `make up` needs to know, read from `ZIMAGE_*` variables; all of it has a default."""

import os
from pathlib import Path
from typing import Self

from pydantic import Field, HttpUrl, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from deploy import reach
from deploy.errors import CannotStart

DEMO_ACCOUNT_ID = "acct_demo"
"""The account that the first `make up` makes, always the same, so that it can be named before."""


def _local_account_id() -> str:
    """Read here, because a variable that is set to nothing has a meaning for this setting only."""
    return os.environ.get("ZIMAGE_LOCAL_ACCOUNT_ID", DEMO_ACCOUNT_ID)


class LocalSettings(BaseSettings):
    """Where to listen and where to keep things. A server whose URL is given is not started."""

    model_config = SettingsConfigDict(env_prefix="ZIMAGE_", frozen=True, env_ignore_empty=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    data_dir: Path = Path("data")
    model: str = "demo"
    local_account_id: str = Field(default_factory=_local_account_id)
    """Who pays for callers of this machine without a key; set to nothing, there are none."""

    database_url: SecretStr | None = None
    redis_url: SecretStr | None = None
    s3_endpoint_url: HttpUrl | None = None
    s3_public_url: HttpUrl | None = None
    """The address that image URLs carry; None means what `s3_endpoint_url` is or becomes."""
    s3_access_key_id: str | None = None
    s3_secret_access_key: SecretStr | None = None
    s3_port: int | None = Field(default=None, ge=1, le=65535)
    """Where our own S3 server listens. Image URLs carry it, so it is the same at every start."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        keys = (self.s3_access_key_id, self.s3_secret_access_key)
        if self.s3_endpoint_url is not None and None in keys:
            raise ValueError(
                "ZIMAGE_S3_ENDPOINT_URL needs ZIMAGE_S3_ACCESS_KEY_ID and "
                "ZIMAGE_S3_SECRET_ACCESS_KEY"
            )
        if self.s3_endpoint_url is None and keys != (None, None):
            raise ValueError(
                "ZIMAGE_S3_ACCESS_KEY_ID and ZIMAGE_S3_SECRET_ACCESS_KEY need "
                "ZIMAGE_S3_ENDPOINT_URL; our own S3 server makes its own keys"
            )
        database = self.database_url.get_secret_value() if self.database_url else ""
        if database and not database.startswith("postgresql+psycopg://"):
            raise ValueError("ZIMAGE_DATABASE_URL must begin with postgresql+psycopg://")
        if self.s3_endpoint_url is None and self.own_s3_port in (self.port, 65536):
            raise ValueError(f"ZIMAGE_S3_PORT cannot be {self.own_s3_port} beside this ZIMAGE_PORT")
        return self

    @property
    def own_s3_port(self) -> int:
        return self.port + 1 if self.s3_port is None else self.s3_port

    @property
    def address(self) -> str:
        """Where the API is reached from this machine."""
        return reach.http_address(reach.connectable(self.host), self.port)


def load() -> LocalSettings:
    """Read the settings from the environment.

    Raises:
        CannotStart: one is malformed; the message names the variable.
    """
    try:
        return LocalSettings()
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        reason = fault["msg"].removeprefix("Value error, ")
        if fault["loc"]:
            name = "_".join(map(str, fault["loc"])).upper()
            reason = f"The setting ZIMAGE_{name} is not usable: {reason}"
        raise CannotStart(reason) from None
