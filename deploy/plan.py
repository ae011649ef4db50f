"""What will run on this machine, from the settings: which servers, which programs, with what."""

import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from deploy import private, reach, servers
from deploy.servers import Server
from deploy.settings import DEMO_ACCOUNT_ID, LocalSettings
from deploy.supervision import APP, SERVERS, Program

SERVER_STOP_TIMEOUT_S = 60

SERVERS_READY = "servers-ready"
PREPARED = "prepared"
"""Files in the data folder that appear while we start, for what was started to load before it was
its turn: loading takes longer than all the rest."""


def app_programs(data: Path) -> list[Program]:
    """The service itself. The API listens only once all is prepared."""
    python, after = sys.executable, str(data / PREPARED)
    return [
        Program("api", (python, "-m", "api", "serve", "--after", after), APP, stop_timeout_s=40),
        Program("worker", (python, "-m", "worker"), APP, stop_timeout_s=60),
        Program("courier", (python, "-m", "api.courier"), APP, stop_timeout_s=30),
    ]


def preparation(data: Path) -> tuple[str, ...]:
    """The command that prepares what the service stands on, once its servers are ready."""
    return (
        *(sys.executable, "-m", "api", "prepare", "--after", str(data / SERVERS_READY)),
        *("--demo-credentials", str(data / "credentials.env"), DEMO_ACCOUNT_ID),
    )


def check_surroundings(chosen: LocalSettings) -> None:
    """Raises CannotStart: a port is taken, or a server that was configured cannot be reached."""
    reach.check_free(chosen.host, chosen.port, "ZIMAGE_PORT")
    if chosen.database_url:
        reach.check_postgres(chosen.database_url.get_secret_value())
    if chosen.redis_url:
        reach.check_redis(chosen.redis_url.get_secret_value())
    if chosen.s3_endpoint_url:
        reach.check_s3(str(chosen.s3_endpoint_url))
    else:
        reach.check_free(chosen.host, chosen.own_s3_port, "ZIMAGE_S3_PORT")


def own_servers(chosen: LocalSettings, data: Path) -> list[Server]:
    """A server for every URL that was not configured."""
    own = []
    if chosen.database_url is None:
        own.append(servers.postgres(data / "postgres"))
    if chosen.redis_url is None:
        own.append(servers.valkey(data / "valkey", reach.free_port()))
    if chosen.s3_endpoint_url is None:
        own.append(servers.s3(data / "s3", chosen.own_s3_port, host=chosen.host))
    return own


def environment(chosen: LocalSettings, data: Path, own: Sequence[Server]) -> dict[str, str]:
    """What every process of the service finds in its environment."""
    env = {
        name: value
        for name, value in servers.inherited_environment().items()
        if value or not name.startswith("ZIMAGE_")  # set to nothing is not set
    }
    env |= {
        "ZIMAGE_HOST": chosen.host,
        "ZIMAGE_PORT": str(chosen.port),
        "ZIMAGE_MODEL": chosen.model,
        "PYTHONUNBUFFERED": "1",
    }
    env.setdefault("ZIMAGE_DEVICE", "all")  # a worker process for every GPU
    if chosen.local_account_id:
        env["ZIMAGE_LOCAL_ACCOUNT_ID"] = chosen.local_account_id
    if "ZIMAGE_SECRET_KEYS" not in env:
        env["ZIMAGE_SECRET_KEYS"] = private.kept_secret(data / "secret-key")
    for server in own:
        env |= {**server.settings, **server.env}
    if chosen.s3_endpoint_url is None:  # never by way of a proxy for the rest of the world
        near = urlsplit(env["ZIMAGE_S3_ENDPOINT_URL"]).hostname
        for name in ("no_proxy", "NO_PROXY"):
            env[name] = ",".join(filter(None, (env.get(name), near)))
    return env


def program(server: Server) -> Program:
    return Program(
        name=server.name,
        argv=server.argv,
        group=SERVERS,
        stop_timeout_s=SERVER_STOP_TIMEOUT_S,
        stop_signal=server.stop_signal,
        user=server.user,
    )
