"""What a thread and an event loop do alike with httpx."""

import inspect
import ssl
from collections.abc import Callable
from typing import Any, get_args

import httpx

from zimage.errors import InvalidRequest, Unreachable
from zimage.operations import Operations
from zimage.retries import Retries
from zimage.steps import Head, Request, Steps

BASE_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
"""Of connecting, and of the longest silence within an answer."""
USER_AGENT = "zimage-client/0.1.0"


class Settings:
    """What both clients are made with."""

    def __init__(
        self,
        api_key: str,
        base_url: str = BASE_URL,
        *,
        retries: Retries | None = None,
        timeout_s: float = TIMEOUT_S,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        """`base_url` is what comes before `/v1`; `verify` says whose certificates are trusted.

        Raises: InvalidRequest.
        """
        if not api_key.strip() or not api_key.isascii():
            raise InvalidRequest("The API key is empty, or holds letters that no key has")
        self.operations = Operations(retries or Retries())
        self._key = {"Authorization": f"Bearer {api_key.strip()}"}
        self._timeout_s = timeout_s
        self.options: dict[str, Any] = {
            "base_url": base_url.rstrip("/").removesuffix("/v1"),
            "headers": {"User-Agent": USER_AGENT},
            "verify": verify,
        }

    def arguments(self, request: Request) -> dict[str, Any]:
        """What httpx builds `request` with. Raises: InvalidRequest."""
        content = request.content()
        headers = {**request.headers, **(self._key if request.with_key else {})}
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            for value in headers.values():
                value.encode("ascii")
        except UnicodeEncodeError:
            raise InvalidRequest("A header may hold ASCII characters only") from None
        return {
            "method": request.method,
            "url": request.url,
            "params": dict(request.query) or None,
            "headers": headers,
            "content": content,
            "timeout": httpx.Timeout(
                self._timeout_s, read=request.read_timeout_s or self._timeout_s
            ),
        }


def head_of(response: httpx.Response) -> Head:
    return Head(
        response.status_code, {name.lower(): value for name, value in response.headers.items()}
    )


def unreachable(error: httpx.RequestError) -> Unreachable:
    """`error` in our words. Raises: InvalidRequest, if no network could help."""
    url = error.request.url
    asked = f"{url.scheme}://{url.netloc.decode()}"  # the rest may be a signed link
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        # Not the network's fault: it would be the same the next time.
        raise InvalidRequest(f"{asked} cannot be asked: {error}") from error
    return Unreachable(f"No answer from {asked}: {error or type(error).__name__}")


def signature_of(operation: Callable[..., Steps[Any]]) -> inspect.Signature:
    """How `help()` shows a client's method: it gives what the operation ends with."""
    signature = inspect.signature(operation)
    return signature.replace(return_annotation=get_args(signature.return_annotation)[-1])
