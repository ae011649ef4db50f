"""JSON answers in which amounts are exact numbers and moments are UTC."""

from decimal import Decimal
from typing import Any

import orjson
from starlette.responses import Response


class JSON(Response):
    """A JSON body; Decimals become numbers with all their digits, which a float could not hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class Problem(JSON):
    """RFC 9457 problem details, for the routes that belong to no vendor."""

    media_type = "application/problem+json"


def encode(content: Any) -> bytes:
    return orjson.dumps(content, default=_exact, option=orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC)


def _exact(value: object) -> orjson.Fragment:
    if isinstance(value, Decimal):
        return orjson.Fragment(format(value.normalize(), "f"))
    raise TypeError(f"{type(value).__name__} has no place in an answer")
