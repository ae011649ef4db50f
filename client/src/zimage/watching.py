"""Follow a task to its end: by its events, and by asking again where there are none."""

import time

from zimage.answers import Task, read, read_task
from zimage.errors import ServiceUnavailable, Timeout, Unreachable
from zimage.event_stream import EventStream
from zimage.exchange import exchange
from zimage.retries import Retries
from zimage.steps import Close, Head, Open, Pause, Read, Request, Show, Steps

SILENCE_MIN_S, SILENCE_MAX_S = 1.0, 60.0
"""A stream of events that is silent for longer is taken for broken: it should have been pinged."""
HOLD_MAX_S = 30
"""For how long the service is asked to hold the answer to a task that goes on."""
HOLD_MARGIN_S = 10.0
PAUSE_FIRST_S, PAUSE_GROWTH, PAUSE_MAX_S = 0.5, 1.5, 5.0


def watch(task_id: str, retries: Retries, timeout_s: float | None = None) -> Steps[Task]:
    """Show the task as it is and each time it changes; ends with the ended task.

    Raises:
        Timeout: it is unfinished after `timeout_s`; it goes on regardless.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    task = yield from _listen(task_id, deadline)
    if task is None or not task.ended:
        task = yield from _ask(task_id, retries, deadline, task)
    return task


def _listen(task_id: str, deadline: float | None) -> Steps[Task | None]:
    """The last state that the events told of; None if there are no events."""
    task = None
    request = Request(
        "GET",
        f"/v1/tasks/{task_id}/events",
        headers={"Accept": "text/event-stream", "Cache-Control": "no-store"},
        read_timeout_s=max(SILENCE_MIN_S, min(SILENCE_MAX_S, _left_s(deadline))),
    )
    try:
        head: Head = yield Open(request)
        kind = head.headers.get("content-type", "")
        if head.status != 200 or not kind.startswith("text/event-stream"):
            yield Close()  # asking tells whether the task or only the stream is missing
            return None
        stream = EventStream()
        while chunk := (yield Read()):
            for event in stream.feed(chunk):
                if event.name != "task":
                    continue
                task = read(event.data, read_task)
                yield Show(task)
                if task.ended:
                    yield Close()
                    return task
            if _left_s(deadline) <= 0:
                break
        yield Close()
    except Unreachable:
        pass
    except ServiceUnavailable:  # an event that is no task
        yield Close()
    return task


def _ask(task_id: str, retries: Retries, deadline: float | None, shown: Task | None) -> Steps[Task]:
    pause_s = PAUSE_FIRST_S
    while True:
        began = time.monotonic()
        hold_s = int(max(0, min(HOLD_MAX_S, _left_s(deadline))))
        request = Request(
            "GET",
            f"/v1/tasks/{task_id}",
            headers={"Prefer": f"wait={hold_s}"} if hold_s else {},
            read_timeout_s=hold_s + HOLD_MARGIN_S,
        )
        answer = yield from exchange(request, retries)
        task = read(answer.body, read_task)
        if task != shown:
            yield Show(task)
            shown = task
        if task.ended:
            return task
        left_s = _left_s(deadline)
        if left_s <= 0:
            raise Timeout(
                f"{task_id} is still {task.status}; it goes on, and is charged when it completes"
            )
        # A service that held the answer needs no pause after it, one that cannot hold does.
        rest_s = pause_s - (time.monotonic() - began)
        if rest_s > 0:
            yield Pause(min(rest_s, left_s))
        pause_s = min(pause_s * PAUSE_GROWTH, PAUSE_MAX_S)


def _left_s(deadline: float | None) -> float:
    return float("inf") if deadline is None else deadline - time.monotonic()
