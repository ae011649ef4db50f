"""Lists in pages: a cursor says where the page before ended, so new rows shift nothing."""

import base64
import binascii
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Query
from starlette.responses import Response

from api.answers import JSON
from storage import errors

PAGE_MAX = 100
PAGE_DEFAULT = 50

PageLimit = Annotated[int, Query(ge=1, le=PAGE_MAX)]
Cursor = Annotated[
    str | None, Query(max_length=500, description="`next_cursor` of the page before")
]
Row = TypeVar("Row")


def page(
    rows: Sequence[Row],
    limit: int,
    render: Callable[[Row], dict[str, Any]],
    position: Callable[[Row], tuple[object, ...]],
) -> Response:
    """A page of at most `limit` rows; `rows` holds one more where there is a next page."""
    shown = rows[:limit]
    more = len(rows) > limit
    cursor = _cursor(*position(shown[-1])) if more else None
    return JSON({"data": [render(row) for row in shown], "next_cursor": cursor})


def _cursor(*position: object) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode()


def _position(cursor: str | None) -> list[Any] | None:
    if cursor is None:
        return None
    try:
        position = orjson.loads(base64.urlsafe_b64decode(cursor))
    except (binascii.Error, ValueError):
        position = None
    if not isinstance(position, list):
        raise _unknown()
    return position


def _unknown() -> errors.InvalidRequest:
    return errors.InvalidRequest("cursor: is not one that this service has given", param="cursor")


def moment(cursor: str | None) -> tuple[datetime, str] | None:
    """A cursor of rows that are ordered by when they were created."""
    position = _position(cursor)
    if position is None:
        return None
    try:
        moment, row_id = position
        return datetime.fromisoformat(moment), str(row_id).replace("\0", "")
    except (TypeError, ValueError):
        raise _unknown() from None


def number(cursor: str | None) -> int | None:
    position = _position(cursor)
    if position is None:
        return None
    if len(position) != 1 or type(position[0]) is not int or abs(position[0]) >= 2**63:
        raise _unknown()
    return int(position[0])
