"""What Prometheus reads: the books, the queues, the workers, and the requests of this process.

Shown to programs on this machine, or, where the operator has set a key for it, to whoever shows
that key. It is no API key: a scraper needs no right to change anything, and must be answered while
the database that knows the API keys is away. What cannot be asked just now is left out, and
`zimage_up` of it is 0.
"""

import hmac
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import anyio
import anyio.to_thread
import structlog
from fastapi import FastAPI
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from api.answers import Problem
from api.auth import is_local
from api.settings import settings
from storage import books, queue
from storage.database import transaction
from storage.errors import ServiceUnavailable

PATH = "/metrics"
LOOK_TIMEOUT_S = 4
"""How long a scrape waits for a server before it goes without; Prometheus itself gives up at 10."""
COUNT_MAX = 100_000
"""Tasks and callbacks are counted no further."""
DURATIONS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the histogram, in seconds: from a read to a caller who holds the line."""

logger = structlog.get_logger()

Found = dict[str, Any]


Count = Callable[[Scope, int, float], None]
"""Takes the scope of a request that was answered, the status, and the seconds that it took."""


class Requests:
    """Counts the requests of this process, and how long they took, by the format they asked in."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.ended = Counter(
            "zimage_requests",
            "Requests that were answered by this process",
            ["dialect", "status"],
            registry=self.registry,
        )
        self.took = Histogram(
            "zimage_request_duration_seconds",
            "From the head of a request to the end of its answer, waiting included",
            ["dialect"],
            buckets=DURATIONS_S,
            registry=self.registry,
        )


def _dialect(scope: Scope) -> str:
    """The tag of the route that was found, so there are as many as we wrote; `none` without one."""
    if "dialect" in scope:
        return str(scope["dialect"])
    # Of an included router, FastAPI keeps the tags apart from the route (0.165; not documented).
    included = scope.get("fastapi", {}).get("effective_route_context")
    tags = getattr(included or scope.get("route"), "tags", None)
    return str(tags[0]) if tags else "none"


def mount(app: FastAPI) -> Count:
    """Show at PATH what there is to see; returns what counts a request once it is answered."""
    requests = Requests()

    @cache  # to find a counter by its labels takes longer than to count
    def counters(dialect: str, status: int) -> tuple[Counter, Histogram]:
        return requests.ended.labels(dialect, status), requests.took.labels(dialect)

    def count(scope: Scope, status: int, took_s: float) -> None:
        ended, took = counters(_dialect(scope), status)
        ended.inc()
        took.observe(took_s)

    async def metrics(request: Request) -> Response:
        """In Prometheus' text format. For this machine, or with ZIMAGE_METRICS_KEY as bearer."""
        if not _may_read(request):
            detail = "Show the metrics key, or ask from the machine itself where none is set"
            return Problem({"title": "Unauthorized", "status": 401, "detail": detail}, 401)
        shown = generate_latest(requests.registry) + generate_latest(_Once(await _look()))
        return Response(shown, media_type=None, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    # No part of the API: it is for the operator's Prometheus, and not in the documentation.
    app.add_api_route(PATH, metrics, tags=["operating"], include_in_schema=False)
    return count


def _may_read(request: Request) -> bool:
    if settings.metrics_key is None:
        return is_local(request)
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    key = settings.metrics_key.get_secret_value()
    return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), key.encode())


async def _look() -> Found:
    """What the servers say, both asked at once; None of one that does not answer in time."""
    looks: dict[str, Callable[[], Any]] = {"database": _database, "redis": _redis}
    found: Found = dict.fromkeys(looks)

    async def look(name: str) -> None:
        try:
            with anyio.fail_after(LOOK_TIMEOUT_S):
                found[name] = await anyio.to_thread.run_sync(looks[name], abandon_on_cancel=True)
        except (ServiceUnavailable, RedisError, TimeoutError) as error:
            logger.warning("metrics.server_away", server=name, error=type(error).__name__)

    async with anyio.create_task_group() as group:
        for name in looks:
            group.start_soon(look, name)
    return found


def _database() -> books.Counts:
    with transaction() as session:
        return books.count(session, at_most=COUNT_MAX)


def _redis() -> tuple[int, Tally[str]]:
    """Jobs that wait, and how many workers there are in each state."""
    facts = queue.worker_facts()
    return queue.count(), Tally(str(fact.get("state") or "unknown") for fact in facts)


class _Once(Collector):
    """What was found by one look, as Prometheus' families."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("zimage_up", "Whether a server answered", labels=["server"])
        for name, answer in self._found.items():
            up.add_metric([name], float(answer is not None))
        yield up
        if self._found["database"] is not None:
            yield from _of_database(self._found["database"])
        if self._found["redis"] is not None:
            yield from _of_redis(*self._found["redis"])


def _of_database(counts: books.Counts) -> Iterator[Metric]:
    by_status: dict[str, float] = {"pending": counts.waiting, "processing": counts.processing}
    check = counts.check
    if check is not None:
        by_status |= {
            "completed": check.completed,
            "failed": check.failed,
            "cancelled": check.cancelled,
        }
    tasks = "Tasks by status; those that ended as the last look at the books counted them"
    yield _labelled("zimage_tasks", tasks, "status", by_status.items())
    waiting = "Tasks that wait for a worker, counted up to 100000"
    yield GaugeMetricFamily("zimage_tasks_waiting", waiting, counts.waiting)
    oldest = "Age of the oldest waiting task, 0 where none waits"
    yield GaugeMetricFamily(
        "zimage_oldest_waiting_task_age_seconds", oldest, counts.oldest_waiting_s or 0
    )
    by_state: dict[str, float] = {"waiting": counts.callbacks_waiting}
    if check is not None:
        by_state["gave_up"] = check.callbacks_given_up
    callbacks = "Callbacks by state; those given up as the last look at the books counted them"
    yield _labelled("zimage_callbacks", callbacks, "state", by_state.items())
    overdue = "For how long the callback that is most overdue has been due, 0 where none is"
    yield GaugeMetricFamily(
        "zimage_callback_overdue_seconds", overdue, counts.oldest_callback_s or 0
    )
    if check is None or counts.check_age_s is None:
        return
    yield GaugeMetricFamily("zimage_books_faults", "Faults in the books: must be 0", check.faults)
    yield GaugeMetricFamily("zimage_books_accounts", "Accounts that were proved", check.accounts)
    yield GaugeMetricFamily(
        "zimage_books_check_age_seconds", "Since the books were proved", counts.check_age_s
    )
    yield GaugeMetricFamily(
        "zimage_books_check_duration_seconds", "How long that took", check.took_s
    )


def _of_redis(jobs: int, workers: Tally[str]) -> Iterator[Metric]:
    yield GaugeMetricFamily("zimage_jobs_waiting", "Bells that no worker has heard yet", jobs)
    yield _labelled("zimage_workers", "Workers that are alive", "state", workers.items())


def _labelled(
    name: str, documentation: str, label: str, values: Iterable[tuple[str, float]]
) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=[label])
    for value_of_label, value in values:
        family.add_metric([value_of_label], value)
    return family
