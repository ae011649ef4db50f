"""`python -m soak.fuzz --examples 10000 --seed 1`: schemathesis over the whole of `/openapi.json`.

Every check is on, in every phase: the documented examples, the limits of each field, random
requests valid and not, and chains of requests in which one uses what another made. What a check
must not blame is in `CHOICES`, each with its reason. The same seed asks the same of a fresh
service.
"""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.generation.case import Case
from schemathesis.generation.meta import TestPhase
from schemathesis.hooks import HookContext
from schemathesis.openapi.checks import RejectedPositiveData

from soak import target
from soak.target import Target

FAULTS_MAX = 20
HELD = re.compile(r"/openai/v1/images/|/v1/generate$|/api/v1/services/")
"""Creates that answer when the image is drawn."""
PHASES = ("examples", "coverage", "fuzzing", "stateful")
CREATED = re.compile(r"/v1/images/generations$|/api/generate$")
"""Creates that answer with a task."""
SPOILED = ("account_id", "key_id")
"""What an operator's requests may ruin: it is always the one that was made for that."""
DRAWN_ONE_IN = 8
"""Of the valid creates that are answered at once; of the others the price is asked, which checks as
much of the request. Of those that are held only the documented examples are drawn."""


CHOICES = {
    r"must not (be empty|contain the NUL)|valid Unicode": "nothing can be drawn of it",
    r"in pixels|total pixels|pixels\b": "a size is a string, and its limits are arithmetic",
    r"multiple of 16": "the document tells the limits of a side, not its step",
    r"must be 0\.0": "guidance is a number in the article, and only zero is drawn",
    r"must be 1\b": "DashScope documents a number of images that it then refuses",
    r"callback_url": "whom the service may call is no matter of form",
    r"cursor: is not one": "only we make cursors",
    r"lists end after": "the limit is of page and page size together",
    r"YYYYMMDDhhmmss|at most 24 hours": "moments as DashScope writes them, without a pattern",
    r"must be a date and a time": "numbers are no moments; and a year that UTC does not have",
    r"should be a valid integer": "1.0 is an integer to JSON Schema, and to no vendor",
    r"names nothing|must not be null|must not be zero": "a change that changes nothing",
    r"control characters": "names and notes are printed",
    r"task_id|Invalid task ID": "an id has a form that EvoLink tells in words only",
    r"seed: Input should be (less|greater) than": "a seed in a string has no limits in its pattern",
    r"a stream carries b64_json": "two members that exclude each other",
    r"Idempotency-Key": "a header of visible ASCII, which the document cannot say",
    r"decimal places|digits (in total|before the decimal)": "digits are not counted",
    r"only be cancelled|PENDING|not pending": "DashScope answers 400 where others answer 409",
}
"""What a request that is valid by the document may be refused for, and why that is right."""


def _is_blamed(context: HookContext, failure: Failure, case: Case[Any], answer: Response) -> bool:
    """All failures but one are blamed: a refusal for what JSON Schema does not say."""
    if not isinstance(failure, RejectedPositiveData):
        return True
    return not any(re.search(words, answer.text) for words in CHOICES)


class Aim:
    """Points valid requests at what is there, and all requests away from what the fuzzer needs.

    An operator may suspend any account and revoke any key, the fuzzer's own as well.
    """

    def __init__(self, service: Target) -> None:
        self._names = service.names
        self._asked = 0

    def take(self, case: Case[Any]) -> None:
        mode = case.meta.generation.mode if case.meta is not None else None
        for values in (case.path_parameters, case.query):
            for name in self._names.keys() & (values or {}).keys():
                if name in SPOILED or (mode is not None and mode.is_positive):
                    values[name] = self._names[name]
        if HELD.search(case.operation.path) or CREATED.search(case.operation.path):
            self._asked += 1
            phase = None if case.meta is None else case.meta.phase.name
            drawn = phase is TestPhase.EXAMPLES or (
                self._asked % DRAWN_ONE_IN == 0 and CREATED.search(case.operation.path)
            )
            if not drawn:
                case.query = {**(case.query or {}), "dry_run": "true"}


def schema_of(
    service: Target, document: dict[str, Any], *, examples: int, seed: int, phases: Sequence[str]
) -> Any:
    """The document with its checks: about so many random requests, and those of other phases."""
    routes = sum(len(routes) for routes in document["paths"].values())
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "base-url": service.url,
            "cache": {"enabled": False},
            "warnings": False,
            "suppress-health-check": ["all"],
            "continue-on-failure": True,
            "phases": {name: {"enabled": name in phases} for name in PHASES},
            "generation": {"database": "none", "max-examples": math.ceil(examples / routes)},
            "headers": {"Authorization": f"Bearer {service.customer}"},
            "operations": [
                {
                    "include-path-regex": "^/admin",
                    "headers": {"Authorization": f"Bearer {service.operator}"},
                }
            ],
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    aim = Aim(service)

    def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
        if case.operation.schema is schema:  # the hook is of every schema in this process
            aim.take(case)

    schemathesis.hook(before_call)
    schema.hook("filter_failure")(_is_blamed)
    return schema


@dataclass
class Found:
    """What came of a run."""

    answers: Counter[int] = field(default_factory=Counter)
    checks: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    """What is wrong, and a request that shows it."""


def run(schema: Any) -> Found:
    """Send it all, and check the answers."""
    found = Found()
    for event in from_schema(schema).execute():
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):
            found.faults[f"{event.label}: {event.value}"] = ""
        if isinstance(event, events.ScenarioFinished):
            found.answers += statuses(event.recorder)
            found.checks += sum(map(len, event.recorder.checks.values()))
            found.faults |= blamed(event.recorder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with target.running() as service:
        started = time.monotonic()
        schema = schema_of(
            service, target.document(), examples=asked.examples, seed=asked.seed, phases=PHASES
        )
        found = run(schema)
        took_s = time.monotonic() - started
        target.settled()
        complaints = target.complaints(service.log())
        clean = target.books_are_clean()
    for what, request in [*found.faults.items()][:FAULTS_MAX]:
        print(f"{what}\n    {request[:600]}")
    for complaint in complaints[:FAULTS_MAX]:
        print(complaint)
    by_status = ", ".join(f"{times} x {code}" for code, times in sorted(found.answers.items()))
    print(
        f"seed {asked.seed}: {found.answers.total()} requests and {found.checks} checks "
        f"in {took_s:.0f} s: {by_status}; {len(found.faults)} faults, "
        f"{len(complaints)} complaints in the log, books {'clean' if clean else 'NOT CLEAN'}"
    )
    raise SystemExit(bool(found.faults or complaints or not clean))


def statuses(scenario: ScenarioRecorder) -> Counter[int]:
    """How often each status was answered; 0 is no answer at all."""
    answered = (each.response for each in scenario.interactions.values())
    return Counter(0 if answer is None else answer.status_code for answer in answered)


def blamed(scenario: ScenarioRecorder) -> dict[str, str]:
    """What was found to be wrong, once for each kind and route, with a request that shows it."""
    return {
        f"{scenario.label}: {node.failure_info.failure.title}": node.failure_info.code_sample
        for nodes in scenario.checks.values()
        for node in nodes
        if node.failure_info is not None
    }


if __name__ == "__main__":
    main()
