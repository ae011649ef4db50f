"""No key sees what is another account's, not even that it is there; no customer is an operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
from sqlalchemy import select, text

from api.app import create_app
from storage import objects
from storage.database import engine, transaction
from storage.models import Delivery, ImageFormat, Task
from storage.settings import settings
from tests.conftest import RECEIVER_HOST, case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

DOCUMENT: dict[str, Any] = create_app().openapi()
Route = tuple[str, str]

ASKED_BY_ID: dict[Route, tuple[str, str]] = {
    ("GET", "/v1/tasks/{task_id}"): ("path", "task_id"),
    ("DELETE", "/v1/tasks/{task_id}"): ("path", "task_id"),
    ("POST", "/v1/tasks/batch"): ("body", "task_ids"),
    ("POST", "/v1/tasks/{task_id}/cancel"): ("path", "task_id"),
    ("GET", "/v1/tasks/{task_id}/events"): ("path", "task_id"),
    ("GET", "/v1/callbacks"): ("query", "task_id"),
    ("POST", "/v1/callbacks/redeliver"): ("body", "task_id"),
    ("POST", "/v1/callbacks/{delivery_id}/redeliver"): ("path", "delivery_id"),
    ("GET", "/api/v1/tasks/{task_id}"): ("path", "task_id"),
    ("GET", "/api/v1/tasks"): ("query", "task_id"),
    ("POST", "/api/v1/tasks/{task_id}/cancel"): ("path", "task_id"),
    ("GET", "/api/status"): ("query", "task_id"),
}
"""Every route by which a customer names something, and where it is named."""
NOBODYS = {"GET /openai/v1/models/{model}"}
"""What is named there belongs to nobody."""
LISTS = ("/v1/tasks", "/v1/callbacks", "/api/v1/tasks")


def named() -> Iterator[tuple[Route, tuple[str, str]]]:
    """Where each route of our document, except the operators', has something named."""
    schemas = DOCUMENT["components"]["schemas"]
    for path, methods in DOCUMENT["paths"].items():
        for method, route in methods.items():
            if path.startswith("/admin") or f"{method.upper()} {path}" in NOBODYS:
                continue
            places = {(each["in"], each["name"]) for each in route.get("parameters", [])}
            content = route.get("requestBody", {}).get("content", {})
            reference = re.search(r"schemas/(\w+)", str(content))
            if reference is not None:
                fields = schemas[reference[1]].get("properties", {})
                places |= {("body", name) for name in fields}
            for where, name in places:
                if where == "path" or re.search(r"(?:^|_)ids?$", name):
                    yield (method.upper(), path), (where, name)


def ask(customer: Customer, route: Route, named_id: str) -> httpx.Response:
    """What `customer` is answered on `route` about `named_id`."""
    (method, path), (where, name) = route, ASKED_BY_ID[route]
    query: dict[str, str] = {name: named_id} if where == "query" else {}
    body: dict[str, Any] | None = None
    if where == "body":
        body = {name: [named_id] if name.endswith("ids") else named_id}
    return customer.http.request(method, path.format(**{name: named_id}), params=query, json=body)


def said(answer: httpx.Response, named_id: str) -> tuple[int, str]:
    """Status and body, without what differs between any two answers."""
    body = answer.text.replace(named_id, "ID")
    body = re.sub(r'"request_id":"[^"]+"', '"request_id":""', body)
    return answer.status_code, body


def everything(*, but: str = "last_used_at") -> list[str]:
    """All rows of all tables, without the column that every request may change."""
    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    with engine.connect() as connection:
        return [
            row
            for table in sorted(connection.scalars(text(tables)))
            for row in connection.scalars(
                text(f"SELECT (to_jsonb(t) - '{but}')::text AS row FROM {table} t ORDER BY 1")
            )
        ]


def test_the_routes_here_are_all_by_which_something_is_named() -> None:
    assert dict(named()) == ASKED_BY_ID


def test_what_is_anothers_is_answered_as_what_does_not_exist(
    customer: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    other = new_customer()
    ended = submit(customer, callback_url=f"https://{RECEIVER_HOST}/done")
    work()
    pending = submit(customer)
    with transaction() as session:
        (delivery_id,) = session.scalars(select(Delivery.id))
    before = everything()

    for route, (_, name) in ASKED_BY_ID.items():
        owned = [delivery_id] if name == "delivery_id" else [ended.id, pending.id]
        for owned_id in owned:
            with case(f"{route} {owned_id}"):
                nobodys = owned_id[:-4] + ("0000" if not owned_id.endswith("0000") else "1111")
                answer = ask(other, route, owned_id)
                assert said(answer, owned_id) == said(ask(other, route, nobodys), nobodys)
                assert customer.id not in answer.text
                assert "a cat" not in answer.text
    assert everything() == before

    for route in ASKED_BY_ID:  # and it is there for whoever owns it
        if route[0] == "GET":
            with case(f"{route} of one's own"):
                own = ask(customer, route, ended.id)
                assert own.status_code == 200
                assert said(own, ended.id) != said(ask(other, route, ended.id), ended.id)


def test_no_list_shows_what_is_anothers(
    customer: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    other = new_customer()
    task = submit(customer, callback_url=f"https://{RECEIVER_HOST}/done")
    work()

    for path in LISTS:
        with case(path):
            assert task.id in customer.http.get(path).text
            assert task.id not in other.http.get(path).text
    assert other.http.get("/v1/credits").json() != customer.http.get("/v1/credits").json()


def test_two_accounts_may_use_one_idempotency_key(
    customer: Customer, new_customer: NewCustomer
) -> None:
    """Else the second would be told of the first one's task."""
    other = new_customer()
    ordered = {"prompt": "a cat", "model": "z-image-turbo"}
    ids = [
        each.http.post(
            "/v1/images/generations", json=ordered, headers={"Idempotency-Key": "k" * 16}
        ).json()["id"]
        for each in (customer, other)
    ]

    assert ids[0] != ids[1]
    assert other.http.get(f"/v1/tasks/{ids[0]}").status_code == 404


def test_no_route_of_operators_lets_a_customer_in(
    customer: Customer, anyone: httpx.Client, submit: Submit
) -> None:
    own = {"account_id": customer.id, "key_id": customer.key_id, "task_id": submit(customer).id}
    routes = [
        (method, path)
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
        if path.startswith("/admin")
    ]
    assert len(routes) > 10
    body = {"name": "x", "amount": 1, "admin": True, "suspended": False}
    before = everything()

    for method, path in routes:
        # The ways around the front: another method's handler, a doubled or a trailing slash.
        for variant in (path, f"{path}/", path.replace("/admin", "/admin/", 1)):
            with case(f"{method} {variant}"):
                target = variant.format(**own)
                for http, status in ((customer.http, 403), (anyone, 401)):
                    answer = http.request(method, target, json=body)
                    assert answer.status_code in ((status,) if variant == path else (404, 405))
    assert everything() == before


# --- Images ---------------------------------------------------------------------------------------

REFUSED = (400, 403)
"""S3 says 403 to whoever shows no signature, and rclone says 400."""


def test_the_key_of_an_image_cannot_be_guessed() -> None:
    keys = [objects.put(b"x", ImageFormat.PNG).key for _ in range(10)]

    guesses = [re.fullmatch(r"images/\d{8}T\d{2}/([A-Za-z0-9_-]{43})\.png", key) for key in keys]
    assert all(guesses)
    assert len({guess[1] for guess in guesses if guess}) == 10  # 43 x 6 bits > 256
    # At no place do all ten agree: nothing of it is a clock or a counter.
    assert not any(
        len(set(place)) == 1 for place in zip(*(g[1] for g in guesses if g), strict=True)
    )


def test_the_bucket_shows_nothing_without_a_signature() -> None:
    stored = objects.put(b"an image", ImageFormat.PNG)
    bucket = f"{settings.s3_endpoint_url}{settings.s3_bucket}"

    for query in ("", "?list-type=2&prefix=images/", "?versions", "?uploads", "?acl"):
        with case(query):
            listed = httpx.get(bucket + query, verify=False)
            assert listed.status_code in REFUSED
            assert stored.key not in listed.text


def test_an_image_is_had_by_its_own_url_only() -> None:
    mine, other = (objects.put(each, ImageFormat.PNG) for each in (b"mine", b"other"))
    url, _ = objects.url(mine.key)
    assert httpx.get(url, verify=False).content == b"mine"

    for name, tried in {
        "unsigned": url.partition("?")[0],
        "signed for another": url.replace(mine.key, other.key),
        "for longer": re.sub(r"X-Amz-Expires=\d+", "X-Amz-Expires=604800", url),
    }.items():
        with case(name):
            assert httpx.get(tried, verify=False).status_code in REFUSED
    with case("to be written"):
        assert httpx.put(url, content=b"mine now", verify=False).status_code in REFUSED
        assert httpx.get(url, verify=False).content == b"mine"
