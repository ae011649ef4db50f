"""`python -m soak.malformed --bodies 10000 --seed 1`: malformed requests, one after the other.

Valid requests of every route of every dialect, each with one thing wrong with it (`mutations`).
Each must be refused with a 4xx in its dialect's envelope and leave nothing behind: neither a
row nor a key in Redis. A 2xx is right only where the mutation has left the body valid by the
document, and then it has written exactly as many tasks as it asked for. Never a 5xx, nor a
traceback in the log.
"""

import argparse
import http.client
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator

from soak import target
from soak.mutations import FULL, Shot, shoot
from soak.target import Written

ANSWER_TIMEOUT_S = 60
FAULTS_MAX = 20
"""Shown; one cause usually shows many times."""
NAMELESS = (400, 431)
"""How a request is refused, without a body, that is no HTTP and so reaches no dialect."""
CREATES = re.compile(
    r"POST (/v1/generate|/v1/images/generations|/api/generate|/api/v1/services/\S+"
    r"|/openai/v1/images/generations)$"
)
JSON_TYPE = re.compile(rb"application/([\w.+-]+\+)?json *(;.*)?", re.IGNORECASE)
HELD = {b"Prefer": b"wait=30"}
"""A task that is created after all has ended when its request is answered."""


@dataclass(frozen=True)
class Answer:
    status: int
    type: str
    body: bytes
    replayed: bool


@dataclass(frozen=True)
class Operation:
    """A route as the document has it."""

    label: str
    body: Draft202012Validator | None
    failures: dict[str, Draft202012Validator]
    """How a refusal looks, by its media type."""


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], Operation]]:
    """Method, path, what the document says of it, and the same to check by."""
    components = {"components": document["components"]}
    for path, routes in document["paths"].items():
        for method, route in routes.items():
            refused = route["responses"].get("4XX", {}).get("content", {})
            yield (
                method.upper(),
                path,
                route,
                Operation(
                    f"{method.upper()} {path}",
                    None
                    if (schema := _body_schema(route)) is None
                    else Draft202012Validator(components | schema),
                    {
                        kind: Draft202012Validator(components | shown["schema"])
                        for kind, shown in refused.items()
                    },
                ),
            )


def _body_schema(route: dict[str, Any]) -> dict[str, Any] | None:
    content = route.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] | None = content.get("application/json", {}).get("schema")
    return schema


def valid_shots(
    document: dict[str, Any], names: dict[str, str], key: Callable[[str], str]
) -> list[tuple[Shot, Any, list[str]]]:
    """A valid request of every route, the value of its body, and its query parameters.

    Routes with a body come three times: it is bodies that are to be malformed.
    """
    shots: list[tuple[Shot, Any, list[str]]] = []
    for method, path, route, operation in operations(document):
        body = None
        if (schema := _body_schema(route)) is not None:
            schema = schema.get("anyOf", [schema])[0]
            name = schema["$ref"].rpartition("/")[2]
            body = document["components"]["schemas"][name]["example"] | FULL.get(name, {})
        queried = [each["name"] for each in route.get("parameters", []) if each["in"] == "query"]
        target_path = path.format(**names)
        if "task_id" in queried and method == "GET" and path.endswith("/status"):
            target_path += f"?task_id={names['task_id']}"
        shot = Shot(
            number=0,
            operation=operation.label,
            method=method,
            path=target_path.encode(),
            headers={
                b"Authorization": f"Bearer {key(path)}".encode(),
                **({} if body is None else {b"Content-Type": b"application/json"}),
                **HELD,
            },
            body=b"" if body is None else json.dumps(body).encode(),
        )
        shots += [(shot, body, queried)] * (1 if body is None else 3)
    return shots


def send(url: str, shot: Shot) -> Answer:
    """Over a connection of its own, since what is no HTTP may spoil one."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), ANSWER_TIMEOUT_S) as line:
        with suppress(BrokenPipeError, ConnectionResetError):  # answered before its body was read
            line.sendall(shot.wire(place.netloc))
        answer = http.client.HTTPResponse(line, method=shot.method)
        answer.begin()
        kind = answer.getheader("Content-Type", "").partition(";")[0]
        replayed = answer.getheader("Idempotency-Replayed") == "true"
        return Answer(answer.status, kind, answer.read(), replayed)


class Judge:
    """Says what is wrong with an answer, by the document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._operations = {found.label: found for *_, found in operations(document)}

    def fault(self, shot: Shot, answer: Answer, before: Written, after: Written) -> str | None:
        if answer.status == 500 and b'"RewriteFailed"' in answer.body:
            return None  # documented, uncharged: this worker has nobody who rewrites
        if answer.status >= 500 or not 200 <= answer.status < 500 or 300 <= answer.status < 400:
            return f"answered {answer.status}"
        if answer.status >= 400:
            if changed := [name for name in after if before.get(name) != after[name]]:
                return f"refused with {answer.status}, and yet wrote {changed}"
            return None if self._is_enveloped(shot, answer) else "another envelope"
        if shot.rerouted:
            return None
        if not self._is_valid(shot):
            return "taken, and not valid by the document"
        tasks = after["tasks"][0] - before["tasks"][0]
        expected = _images(shot, answer)
        return None if tasks == expected else f"wrote {tasks} tasks, not {expected}"

    def _is_enveloped(self, shot: Shot, answer: Answer) -> bool:
        if answer.status in NAMELESS and not answer.body:
            return shot.wrong.startswith(("header", "path", "query"))
        found = [self._operations[shot.operation]]
        if shot.rerouted:
            found = [*self._operations.values()]
        elif not found[0].failures:  # the probes are of no dialect
            return answer.type == "application/problem+json"
        try:
            body = json.loads(answer.body)
        except ValueError:
            return False
        return any(
            answer.type == kind and envelope.is_valid(body)
            for each in found
            for kind, envelope in each.failures.items()
        ) or (shot.rerouted and answer.type == "application/problem+json")

    def _is_valid(self, shot: Shot) -> bool:
        body = self._operations[shot.operation].body
        if body is None:
            return True
        if not shot.body:
            return body.is_valid(None)
        try:
            value = json.loads(shot.body)
        except (ValueError, RecursionError):
            return False
        if JSON_TYPE.fullmatch(shot.headers[b"Content-Type"]) is None:
            return False
        try:
            return bool(body.is_valid(value))
        except RecursionError:  # a member that the document does not mention
            return True


def _images(shot: Shot, answer: Answer) -> int:
    """How many tasks an accepted request has to have written."""
    if CREATES.match(shot.operation) is None or answer.replayed:
        return 0
    body = json.loads(shot.body)
    if b"image.generation.quote" in answer.body and b"dry_run" in shot.path + shot.body:
        return 0
    return (body.get("n") or 1) if "/openai/" in shot.operation else 1


@dataclass
class Outcome:
    """What came of a series of shots."""

    answers: Counter[int]
    faults: list[str]


def bombard(
    url: str,
    document: dict[str, Any],
    names: dict[str, str],
    key: Callable[[str], str],
    *,
    seed: int,
    count: int,
) -> Outcome:
    """Send `count` malformed requests, and look after each at what it has written."""
    shots = valid_shots(document, names, key)
    judge = Judge(document)
    outcome = Outcome(Counter(), [])
    before = target.settled()
    for number in range(count):
        shot = shoot(seed, number, shots)
        try:
            answer = send(url, shot)
        except (OSError, http.client.HTTPException) as error:
            outcome.faults.append(f"{_told(seed, shot)}: {error!r}")
            continue
        after = target.written() if answer.status >= 400 else target.settled()
        outcome.answers[answer.status] += 1
        if fault := judge.fault(shot, answer, before, after):
            said = answer.body[:300].decode(errors="replace")
            outcome.faults.append(f"{_told(seed, shot)}: {fault}: {answer.status} {said}")
            after = target.settled()
        before = after
    return outcome


def _told(seed: int, shot: Shot) -> str:
    path, body = shot.path[:200], shot.body[:300]
    return f"seed {seed}, shot {shot.number} ({shot.wrong}): {shot.operation} {path!r} {body!r}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak.malformed", description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with target.running() as service:
        started = time.monotonic()
        outcome = bombard(
            service.url,
            target.document(),
            service.names,
            service.key,
            seed=asked.seed,
            count=asked.bodies,
        )
        took_s = time.monotonic() - started
        complaints = target.complaints(service.log())
        clean = target.books_are_clean()
    for fault in [*outcome.faults[:FAULTS_MAX], *complaints[:FAULTS_MAX]]:
        print(fault)
    by_status = ", ".join(f"{times} x {code}" for code, times in sorted(outcome.answers.items()))
    print(
        f"seed {asked.seed}: {asked.bodies} malformed requests in {took_s:.0f} s: {by_status}; "
        f"{len(outcome.faults)} faults, {len(complaints)} complaints in the log, "
        f"books {'clean' if clean else 'NOT CLEAN'}"
    )
    raise SystemExit(bool(outcome.faults or complaints or not clean))


if __name__ == "__main__":
    main()
