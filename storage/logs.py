"""Structured logs: one JSON object a line, with the request's and the task's id where there is one.

The standard library's loggers (uvicorn, rq, diffusers) leave through the same door.
"""

import logging
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger

LEVEL = logging.INFO
QUIET = ("botocore", "boto3", "urllib3", "httpx", "alembic", "rq.worker", "uvicorn.access")
"""Libraries that have little to say below a warning, or whose news we tell ourselves."""


def configure(process: str) -> None:
    """Send every log line of this process to stdout as JSON, marked with its name."""

    def name_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        name_process,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
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
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=LEVEL, force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
