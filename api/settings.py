"""What the HTTP edge needs to know, read from `ZIMAGE_*` variables."""

from pathlib import Path

from pydantic import Field, IPvAnyNetwork
from pydantic_settings import BaseSettings

from storage.settings import MODEL_CONFIG, load


class ApiSettings(BaseSettings):
    """Where the API listens, how much it lets through, and whom the courier may call."""

    model_config = MODEL_CONFIG

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)

    reads_per_second: int = Field(default=50, ge=1)
    """Status reads per second and key, apart from creates, which have a limit on the key."""

    local_account_id: str | None = None
    """The account that pays for callers of this machine who show no key; None lets none in."""
    cors_origins: list[str] = []
    """Web origins whose pages may call this service from a browser, `*` for all."""

    callback_allowed_networks: list[IPvAnyNetwork] = []
    """Networks that callbacks may reach although they are not public."""
    callback_ca_file: Path | None = None
    """Certificates that callbacks trust beside the system's, in PEM."""


settings = load(ApiSettings)
