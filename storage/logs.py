"""Structured logs: one JSON object a line, with the request's and the task's id where there is one.

The standard library's loggers (uvicorn, rq, diffusers) leave through the same door, and nothing
that looks like a secret does, whoever wrote it.
"""

import logging
import re
import sys
from urllib.parse import urlsplit

import structlog
from sqlalchemy.engine import make_url
from structlog.typing import EventDict, WrappedLogger

from storage.settings import settings

LEVEL = logging.INFO
QUIET = ("botocore", "boto3", "urllib3", "httpx", "alembic", "rq.worker", "uvicorn.access")
"""Libraries that have little to say below a warning, or whose news we tell ourselves."""


HIDDEN = "[hidden]"
_FORMS = (
    r"zk_[A-Za-z0-9_-]{20,}",
    r"whsec_[A-Za-z0-9+/=]{20,}",
    r"(?<=://)[^/@\s:\"]*:[^/@\s\"]+(?=@)",
    r"(?<=X-Amz-Signature=)[0-9a-f]+",
    r"(?<=Failing row contains \().*?(?=\)\.)",
)
"""Keys, callback secrets, who is named with a password in a URL, what makes an image's work, and
the row that a constraint refused, with all that a customer wrote."""
KNOWN_LENGTH_MIN = 8
"""A shorter password of ours would blot out half of what is said."""


def _secrets() -> re.Pattern[str]:
    """All forms of secrets, and the ones that this process was given."""
    s3 = settings.s3_secret_access_key
    known = (
        make_url(settings.database_url.get_secret_value()).password,
        urlsplit(settings.redis_url.get_secret_value()).password,
        None if s3 is None else s3.get_secret_value(),
    )
    exact = (re.escape(each) for each in known if each and len(each) >= KNOWN_LENGTH_MIN)
    return re.compile("|".join((*_FORMS, *exact)))


def configure(process: str) -> None:
    """Send every log line of this process to stdout as JSON, marked with its name."""

    def name_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    secrets = _secrets()
    to_json = structlog.processors.JSONRenderer()

    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        return secrets.sub(HIDDEN, str(to_json(logger, method, event)))

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        name_process,
    ]
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVEL),
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                render,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=LEVEL, force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
