"""Structured logs: one JSON object a line, with the request's and the task's id where there is one.

The standard library's loggers (uvicorn, rq, diffusers) leave through the same door, and nothing
that looks like a secret does, whoever wrote it.
"""

import atexit
import logging
import re
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO, cast
from urllib.parse import urlsplit

import orjson
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
_SIGNS = ("zk_", "whsec_", "://", "X-Amz-Signature=", "Failing row contains (")
"""A word of each form, in their order."""
BEHIND_S = 0.02
"""How late a line is at most that is written behind whoever logs it."""
KNOWN_LENGTH_MIN = 8
"""A shorter password of ours would blot out half of what is said."""


def _secrets() -> tuple[tuple[str, ...], re.Pattern[str]]:
    """All forms of secrets and the ones that this process was given, after words of which every
    line that holds one has at least one."""
    s3 = settings.s3_secret_access_key
    known = (
        make_url(settings.database_url.get_secret_value()).password,
        urlsplit(settings.redis_url.get_secret_value()).password,
        None if s3 is None else s3.get_secret_value(),
    )
    exact = [each for each in known if each and len(each) >= KNOWN_LENGTH_MIN]
    pattern = re.compile("|".join((*_FORMS, *map(re.escape, exact))))
    return (*_SIGNS, *exact), pattern


class Behind:
    """A file that a thread of its own writes to, all that came in a moment at once: whoever logs
    waits for no system call. A process that is killed loses the lines of that moment."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lines: deque[str] = deque()
        self._some = threading.Event()
        self._writing = threading.Lock()
        threading.Thread(target=self._run, name="log", daemon=True).start()
        atexit.register(self.drain)

    def write(self, line: str) -> int:
        self._lines.append(line)
        if not self._some.is_set():
            self._some.set()
        return len(line)

    def flush(self) -> None:
        """Nothing: `drain` does it."""

    def drain(self) -> None:
        """Write what there is."""
        with self._writing, suppress(OSError):  # of a pipe that nobody reads any more
            lines = "".join(self._lines.popleft() for _ in range(len(self._lines)))
            self._file.write(lines)
            self._file.flush()

    def _run(self) -> None:
        while self._some.wait():
            time.sleep(BEHIND_S)
            self._some.clear()
            self.drain()


def configure(process: str, file: TextIO | Behind = sys.stdout) -> None:
    """Send every log line of this process to `file` as JSON, marked with its name."""

    def name_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a line that cannot be written ends none
    signs, secrets = _secrets()
    to_json = structlog.processors.JSONRenderer()

    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        try:
            line = orjson.dumps(event).decode()
        except TypeError:  # what orjson does not know is told by its repr
            line = str(to_json(logger, method, event))
        # To look for a few words first takes a twentieth of the time of the pattern.
        return secrets.sub(HIDDEN, line) if any(sign in line for sign in signs) else line

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
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, file)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(file)
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
