"""What the HTTP edge needs to know, read from `ZIMAGE_*` variables."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, IPvAnyNetwork, SecretStr
from pydantic_settings import BaseSettings

from storage.sealing import SealingSettings
from storage.settings import MODEL_CONFIG, load


def _name_server(text: str) -> str:
    """Raises: ValueError, unless it is ADDRESS or ADDRESS:PORT, an IPv6 address in brackets."""
    server = urlsplit(f"//{text}")
    ip_address(server.hostname or "")
    if server.port == 0 or text != server.netloc or server.username is not None:
        raise ValueError("not ADDRESS or ADDRESS:PORT")
    return text


class ApiSettings(SealingSettings, BaseSettings):
    """Where the API listens, how much it lets through, and whom the courier may call."""

    model_config = MODEL_CONFIG

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    forwarded_allow_ips: str = "127.0.0.1"
    """Proxies that are believed when they say for whom they speak, in `X-Forwarded-For`: addresses
    and networks with commas, or `*`."""
    connections_max: int = Field(default=6000, ge=1)
    """Connections that may be open at a time; one more is told to come back."""
    auth_failures_per_minute: int = Field(default=60, ge=1)
    """Wrong keys per minute and client address (of IPv6, per /64) that are answered as such."""

    reads_per_second: int = Field(default=50, ge=1)
    """Status reads per second and key, apart from creates, which have a limit on the key."""

    metrics_key: SecretStr | None = Field(default=None, min_length=16)
    """Who shows it may read `/metrics`; None means that only programs on this machine may."""

    local_account_id: str | None = None
    """The account that pays for callers of this machine who show no key; None lets none in."""
    cors_origins: list[str] = []
    """Web origins whose pages may call this service from a browser, `*` for all."""

    callback_allowed_networks: list[IPvAnyNetwork] = []
    """Networks that callbacks may reach although they are not public."""
    callback_ca_file: Path | None = None
    """Certificates that callbacks trust beside the system's, in PEM."""
    callback_nameservers: list[Annotated[str, AfterValidator(_name_server)]] = []
    """Who resolves the names of callbacks, as ADDRESS or ADDRESS:PORT; none: the machine's own."""


settings = load(ApiSettings)
