"""Generated requests, valid and not, are answered as EvoLink's document says, and as our own does.

EvoLink's is `evolink_schema.yaml`; ours is what `/openapi.json` lists, whatever that is. What is
generated is the same at every run, and little of ours: `python -m soak.fuzz` sends thousands, and
those at the limits of each field.
"""

import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings, strategies
from hypothesis.configuration import set_hypothesis_home_dir
from jsonschema import Draft202012Validator

from api.app import PROBES, create_app
from soak import fuzz
from soak.target import Target
from tests.conftest import RECEIVER_HOST, Customer, NewCustomer, case

set_hypothesis_home_dir(os.environ["ZIMAGE_DATA_DIR"])  # or it would write into this folder

ENOUGH = 10**9
"""Credits, so that nothing is refused for want of them."""
PER_ROUTE = settings(
    deadline=None,
    # One customer serves all examples of a route: they are to find what earlier ones left behind.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

MODEL = "z-image-turbo"
CALLBACK = f"https://{RECEIVER_HOST}/done"
"""May be called, and has no name that would be looked up."""
schemathesis.openapi.format("uri", strategies.sampled_from([CALLBACK, f"{CALLBACK}?task=1"]))


def config(max_examples: int, *, edges: bool, **checks: bool) -> schemathesis.Config:
    """At most so many random requests of a route, and beside them with `edges` those at all limits
    of its fields, which take long to make.
    """
    return schemathesis.Config.from_dict(
        {
            "seed": 1,
            "cache": {"enabled": False},
            "checks": {name: {"enabled": enabled} for name, enabled in checks.items()},
            "generation": {"deterministic": True, "database": "none", "max-examples": max_examples},
            "phases": {"coverage": {"enabled": edges}},
        }
    )


def bearer(customer: Customer) -> dict[str, str]:
    return {"Authorization": f"Bearer {customer.key}"}


@pytest.fixture
def rich(new_customer: NewCustomer) -> Customer:
    """A customer with no limits."""
    return new_customer(ENOUGH)


DOCUMENT: dict[str, Any] = create_app().openapi()


def body_schema(route: dict[str, Any]) -> dict[str, Any]:
    """Of a route of `DOCUMENT`: what it takes."""
    reference = route["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema: dict[str, Any] = DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]
    return schema


# --- EvoLink's document ---------------------------------------------------------------------------

EVOLINK = yaml.safe_load((Path(__file__).parent / "evolink_schema.yaml").read_text())
EVOLINK_PATH = "/v1/images/generations"
EVOLINK_BODY = Draft202012Validator(EVOLINK["components"]["schemas"]["ImageGenerationRequest"])
REQUIRED = set(EVOLINK["components"]["schemas"]["ImageGenerationRequest"]["required"])

OUR_BODY = Draft202012Validator(body_schema(DOCUMENT["paths"][EVOLINK_PATH]["post"]))

REFUSED_BY_CHOICE: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda prompt: not prompt.strip() or "\0" in prompt,
    "seed": lambda seed: isinstance(seed, float),  # 1.0 is an integer to JSON Schema
    "callback_url": lambda url: re.fullmatch(r"https://[!-~]+", url) is None,
}
"""What the document allows and we refuse, by field: nothing that a customer could mean."""


def _every_member_required() -> dict[str, Any]:
    """The document requires nothing of an answer; its example has everything."""
    document: dict[str, Any] = json.loads(json.dumps(EVOLINK))
    schemas = document["components"]["schemas"]
    for name in ("ImageGenerationResponse", "TaskInfo", "Usage", "ErrorResponse"):
        schemas[name]["required"] = list(schemas[name]["properties"])
    error = schemas["ErrorResponse"]["properties"]["error"]
    error["required"] = list(error["properties"])
    return document


def expected(sent: Any, customer: Customer) -> tuple[int, set[str]]:
    """The status that a request must be answered with, and the fields that may be to blame."""
    if sent.headers.get("Authorization") != bearer(customer)["Authorization"]:
        return 401, set()
    try:
        body = json.loads(sent.body or b"")
    except ValueError:
        return 400, set()
    if sent.headers.get("Content-Type") != "application/json" or not isinstance(body, dict):
        return 400, set()
    # Our choice: null is an optional field that was not sent.
    given = {name: value for name, value in body.items() if value is not None or name in REQUIRED}
    if not EVOLINK_BODY.is_valid(given):
        return 400, set()
    refused = {name for name, no in REFUSED_BY_CHOICE.items() if name in given and no(given[name])}
    return (400 if refused else 200), refused


evolink = schemathesis.openapi.from_dict(
    _every_member_required(),
    # Whether a request is valid is judged here, by what was sent.
    config=config(25, edges=True, positive_data_acceptance=False, negative_data_rejection=False),
)


@evolink.parametrize()
@PER_ROUTE
def test_every_request_is_answered_as_evolinks_document_says(
    case: schemathesis.Case[Any], server: str, rich: Customer
) -> None:
    answer = case.call_and_validate(server, headers=bearer(rich))

    if case.method != "POST":
        assert answer.status_code == 405
        return
    status, refused = expected(answer.request, rich)
    assert answer.status_code == status, answer.text
    if status == 200:
        assert OUR_BODY.is_valid(case.body)  # ours documents no less than it takes
    else:
        error = answer.json()["error"]
        documented = EVOLINK["paths"][EVOLINK_PATH]["post"]["responses"][str(status)]["content"]
        example = documented["application/json"]["example"]["error"]
        assert (error["code"], error["type"]) == (example["code"], example["type"])
        assert error["message"].startswith(example["message"])
        assert not refused or error["param"] in refused


# --- Our own document -----------------------------------------------------------------------------

RANDOM = 130
"""Random requests, about three of each route."""
ROUTES = [
    (method.upper(), path, route)
    for path, routes in DOCUMENT["paths"].items()
    for method, route in routes.items()
]
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"}
Names = dict[str, str]
"""What stands for `{task_id}` and the like in a path or a query."""


@pytest.fixture
def names(
    rich: Customer, operator: Customer, request: pytest.FixtureRequest
) -> Callable[[], Names]:
    """Makes one of everything that has a name, all but the account and its key of `rich`; from then
    on, whatever is submitted is drawn.
    """

    @cache
    def make() -> Names:
        request.getfixturevalue("drawing")
        body = {"model": MODEL, "prompt": "a cat", "size": "376x376", "callback_url": CALLBACK}
        created = rich.http.post(EVOLINK_PATH, json=body, headers={"Prefer": "wait=30"}).json()
        (delivery,) = rich.http.get("/v1/callbacks").json()["data"]
        account = operator.http.post("/admin/accounts", json={"name": "another"}).json()
        key = operator.http.post(f"/admin/accounts/{account['id']}/keys", json={}).json()
        return {
            "account_id": account["id"],
            "delivery_id": delivery["id"],
            "key_id": key["id"],
            "model": MODEL,
            "task_id": created["id"],
        }

    return make


def test_every_request_is_answered_as_our_document_says(
    server: str, rich: Customer, operator: Customer, names: Callable[[], Names]
) -> None:
    """With every check on: the documented examples, and a few random requests of each route."""
    service = Target(server, rich.key, operator.key, str, names())
    schema = fuzz.schema_of(
        service, DOCUMENT, examples=RANDOM, seed=1, phases=["examples", "fuzzing"]
    )

    found = fuzz.run(schema)

    assert found.faults == {}
    assert found.answers.total() > RANDOM


def test_our_document_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(DOCUMENT).validate()
    for name, schema in DOCUMENT["components"]["schemas"].items():
        with case(name):
            Draft202012Validator.check_schema(schema)


def test_every_route_that_needs_a_key_refuses_who_shows_none(
    anyone: httpx.Client, names: Callable[[], Names]
) -> None:
    locked = [(method, path) for method, path, route in ROUTES if "security" in route]
    assert locked
    for method, path in locked:
        with case(f"{method} {path}"):
            answer = anyone.request(method, path.format(**names()))
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"


def test_every_path_answers_only_the_documented_methods_and_says_which(
    anyone: httpx.Client, names: Callable[[], Names]
) -> None:
    for path, route in DOCUMENT["paths"].items():
        documented = {method.upper() for method in route}
        for method in METHODS - _answered_at(path):
            with case(f"{method} {path}"):
                answer = anyone.request(method, path.format(**names()))
                assert answer.status_code == 405
                assert set(answer.headers["allow"].split(", ")) == documented
                if method != "HEAD" and path not in PROBES:
                    refused = next(iter(route.values()))["responses"]["4XX"]["content"]
                    (kind,) = refused
                    assert answer.headers["content-type"] == kind
                    Draft202012Validator(refused[kind]["schema"]).validate(answer.json())


def _answered_at(path: str) -> set[str]:
    """The methods that `path` answers, also those of a path that has a parameter in its place."""
    answered = {"HEAD"} if path in PROBES else set()
    for method, other, _ in ROUTES:
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", other), path):
            answered.add(method)
    return answered


def test_every_route_answers_with_the_members_that_the_document_shows(
    rich: Customer, names: Callable[[], Names]
) -> None:
    """The documented request of each route gets an answer of the form of its documented answer."""
    shown = 0
    for method, path, route in ROUTES:
        example = route["responses"].get("200", {}).get("content", {}).get("application/json", {})
        if "example" in example:
            shown += 1
            with case(f"{method} {path}"):
                body = body_schema(route)["example"] if "requestBody" in route else None
                answer = rich.http.request(
                    method, path.format(**names()), params=names(), json=body
                )
                assert answer.status_code == 200, answer.text
                assert_like(answer.json(), example["example"])
    assert shown


def assert_like(answered: Any, example: Any, where: str = "") -> None:
    """`answered` has all that `example` has, of the same kinds."""
    assert type(answered) is type(example), (where, answered, example)
    if isinstance(example, dict):
        assert example.keys() <= answered.keys(), where
        for name, value in example.items():
            assert_like(answered[name], value, f"{where}.{name}")
    elif isinstance(example, list):
        assert len(answered) == len(example), where
        for index, value in enumerate(example):
            assert_like(answered[index], value, f"{where}.{index}")
