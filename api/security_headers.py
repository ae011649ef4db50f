"""What every answer tells a browser that it may not do with it.

That only HTTPS may be spoken (HSTS) is for the proxy to say, which is what speaks it.
"""

Raw = list[tuple[bytes, bytes]]

ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
DATA = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Of all but the pages for people, which have no data of anybody."""
PAGES = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; worker-src blob:; frame-ancestors 'none'"
    )
}
"""FastAPI's begin with a script in the page itself. They ask for `/openapi.json`, for their own
files, and, where someone tries a route, for that."""
PAGES_AT = ("/docs", "/redoc", "/static-offline-docs")


def _raw(headers: dict[str, str]) -> Raw:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


_OF_PAGES, _OF_DATA = _raw(ALWAYS | PAGES), _raw(ALWAYS | DATA)
_BELOW_PAGES = tuple(f"{prefix}/" for prefix in PAGES_AT)


def added_to(headers: Raw, path: str) -> Raw:
    """The headers of the answer to `path`, in lower case, with what it has not said itself."""
    page = path in PAGES_AT or path.startswith(_BELOW_PAGES)
    said = {name for name, _ in headers}
    return headers + [pair for pair in (_OF_PAGES if page else _OF_DATA) if pair[0] not in said]
