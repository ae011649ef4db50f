"""A create as a stream of server-sent events: a comment now and then, then an event per image.

What goes wrong before the first of them is answered as if there were no stream, so that the library
can re-send it. What goes wrong later is an event, after which there is no other.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from typing import Any

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse

from api.answers import encode
from api.dialects.openai import answers
from api.dialects.openai.refusals import describe
from api.dialects.openai.request import ImagesRequest
from api.orders import CallerGone, Quote
from api.waiting import PING_S
from storage.errors import InternalError, ServiceError
from storage.models import Task

Order = list[Task] | Quote

logger = structlog.get_logger()

_drawing: set[asyncio.Task[Order | None]] = set()
"""What is being drawn for streams. It outlives its stream: it notices itself that the caller has
gone, and what is then to be done."""


async def respond(asked: ImagesRequest, drawing: Coroutine[Any, Any, Order]) -> StreamingResponse:
    """Raises: whatever ends `drawing` before there is anything to send."""
    drawn = asyncio.create_task(_hold(drawing))
    _drawing.add(drawn)
    drawn.add_done_callback(_drawing.discard)
    events = _events(asked, drawn)
    return StreamingResponse(
        _to_the_end(await anext(events), events),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _hold(drawing: Coroutine[Any, Any, Order]) -> Order | None:
    """None: the caller hung up, and the stream may have ended with it."""
    with suppress(CallerGone):
        return await drawing
    return None


async def _events(
    asked: ImagesRequest, drawn: asyncio.Task[Order | None]
) -> AsyncGenerator[bytes, None]:
    while not drawn.done():
        await asyncio.wait({drawn}, timeout=PING_S)
        if not drawn.done():
            yield KEEPALIVE_COMMENT
    order = drawn.result()
    if order is None:
        raise CallerGone
    if isinstance(order, Quote):
        yield format_sse_event(data_str=_json(order.render()))
        return
    found, failures = answers.sort_out(order)
    for task in found:
        event = await answers.render_completed(asked, task)
        yield format_sse_event(event=event["type"], data_str=_json(event))
    if failures:
        raise failures[min(failures)]


async def _to_the_end(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    yield first
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except CallerGone:
        return
    except ServiceError as error:
        yield _failure(error)
    except Exception:
        logger.exception("request.failed", path="/openai/v1/images/generations")
        yield _failure(InternalError())


def _failure(error: ServiceError) -> bytes:
    return format_sse_event(event="error", data_str=_json({"error": describe(error)}))


def _json(content: dict[str, Any]) -> str:
    return encode(content).decode()
