"""What every answer tells a browser that it may not do with it.

That only HTTPS may be spoken (HSTS) is for the proxy to say, which is what speaks it.
"""

from starlette.datastructures import MutableHeaders

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


def add_to(headers: MutableHeaders, path: str) -> None:
    """Add to the headers of the answer to `path` what it has not said itself."""
    page = path in PAGES_AT or path.startswith(tuple(f"{prefix}/" for prefix in PAGES_AT))
    for name, value in (ALWAYS | (PAGES if page else DATA)).items():
        headers.setdefault(name, value)
