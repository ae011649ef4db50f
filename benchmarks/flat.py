"""`python -m benchmarks.flat`: nothing gets slower when much waits or much has ended.

Three databases of one server, an API process at each: one nearly empty, one in which a million
tasks of a thousand accounts wait, and one with ten million finished tasks (of which those of the
last day are whole and the others erased, as the service leaves them; what they were charged is
in no query measured here and is left out). They are taken in turns, so that a noisy machine
disturbs all alike. On the way there, and beside it, points for the chart are taken.

No worker hears the bells, so all three keep as many as are kept and none rings for what it takes.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import psutil
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from benchmarks import stage
from benchmarks.figures import Figure, point, say, tell
from benchmarks.stage import Account, Load, Request

FINISHED = int(os.environ.get("BENCH_TASKS", "10000000"))
WAITING = FINISHED // 10
WAITING_STEPS = (0, WAITING // 1000, WAITING // 100, WAITING // 10, WAITING)
FINISHED_STEPS = (0, FINISHED // 100, FINISHED // 10, FINISHED)
ACCOUNTS = 1000
SENDING = 32
"""Accounts that send, and connections that they send by."""
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "4"))
SECONDS = 2
POINT_S = 1
CLAIMS = 200
"""In a round."""
CLAIMED = WAITING // 50
"""Tasks that were claimed before, and that PostgreSQL has not vacuumed away yet."""
FEW = 1000
"""Tasks that wait where nearly nothing does: for the reads, and for the claims of a round."""
CREATE = '{"model": "z-image-turbo", "prompt": "a red fox in the snow", "size": "1:1"}'
GOAL = 0.95


@dataclass(frozen=True, slots=True)
class Side:
    """A database with an API process at it."""

    engine: Engine
    url: str
    api: psutil.Process


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request costs."""

    per_s: float
    cpu_us: float
    """CPU time of the API process and all of PostgreSQL's."""


Costs = dict[str, list[Cost]]


def main() -> None:
    with stage.running():
        accounts = stage.accounts(ACCOUNTS)
        with ExitStack() as stack:
            empty, waiting, ended = (
                stack.enter_context(_side(name, number))
                for number, name in enumerate(("empty", "waiting", "ended"))
            )
            _measure(accounts, empty, waiting, ended)


def _measure(accounts: Sequence[Account], empty: Side, waiting: Side, ended: Side) -> None:
    from benchmarks import filled

    filled.waiting(empty.engine, accounts, 0, FEW)
    _chart_callers(accounts, empty)
    filled.waiting(ended.engine, accounts, 0, FEW)
    _grow("waiting", waiting, accounts, WAITING_STEPS, filled.waiting)
    _grow("finished", ended, accounts, FINISHED_STEPS, filled.finished)
    filled.claim(waiting.engine, CLAIMED)

    costs: dict[str, Costs] = {}
    claims_ms: dict[str, list[tuple[float, float]]] = {"empty": [], "waiting": []}
    for round_ in range(-1, ROUNDS):
        for name, side in (("empty", empty), ("waiting", waiting), ("ended", ended)):
            taken = _take(side, accounts[:SENDING], SECONDS if round_ >= 0 else POINT_S)
            for kind, cost in taken.items() if round_ >= 0 else ():  # the first is a warm-up
                costs.setdefault(name, {}).setdefault(kind, []).append(cost)
        for name, side in (("empty", empty), ("waiting", waiting)):
            claims_ms[name].append(_claim_ms(side.engine))
        _run(empty.engine, "TRUNCATE tasks CASCADE")
        filled.waiting(empty.engine, accounts, 0, FEW)

    for name, what in (("waiting", f"{WAITING} waiting"), ("ended", f"{FINISHED} finished")):
        for kind in ("submit", "read"):
            _tell_ratio(f"flat: {kind}, {what} / empty", costs["empty"][kind], costs[name][kind])
    _tell_claims(claims_ms["empty"][1:], claims_ms["waiting"][1:])


def _tell_claims(few_ms: list[tuple[float, float]], many_ms: list[tuple[float, float]]) -> None:
    ratio = statistics.median(
        few / many for (few, _), (many, _) in zip(few_ms, many_ms, strict=True)
    )

    def seen(found_ms: list[tuple[float, float]]) -> str:
        bare_ms, whole_ms = (statistics.median(each) for each in zip(*found_ms, strict=True))
        return f"{bare_ms:.2f} ms, {whole_ms:.2f} with its commit"

    detail = f"p50 {seen(many_ms)}, after {CLAIMED} claims; {FEW} waiting: {seen(few_ms)}"
    tell(Figure(f"flat: claim, {WAITING} waiting / few", ratio, GOAL, detail=detail))


def _tell_ratio(name: str, empty: list[Cost], full: list[Cost]) -> None:
    ratio = statistics.median(b.per_s / a.per_s for a, b in zip(empty, full, strict=True))

    def seen(costs: list[Cost]) -> str:
        per_s = statistics.median(cost.per_s for cost in costs)
        cpu_us = statistics.median(cost.cpu_us for cost in costs)
        return f"{per_s:.0f}/s, {cpu_us:.0f} us CPU each"

    tell(Figure(name, ratio, GOAL, detail=f"{seen(full)}; empty: {seen(empty)}"))


def _grow(
    chart: str,
    side: Side,
    accounts: Sequence[Account],
    steps: Sequence[int],
    fill: Callable[[Engine, Sequence[Account], int, int], None],
) -> None:
    """Fill a database step by step, and note at each what a request costs there."""
    before = 0
    for step in steps:
        began = time.monotonic()
        if step > before:
            fill(side.engine, accounts, before, step)
            say(f"{chart}: {step}, filled in {time.monotonic() - began:.0f} s")
        before = step
        _take(side, accounts[:SENDING], POINT_S)  # what is looked at only now and then is looked at
        _note(chart, step, side, accounts[:SENDING])


def _chart_callers(accounts: Sequence[Account], side: Side) -> None:
    for number in (1, SENDING, ACCOUNTS):
        _note("accounts", number, side, accounts[:number])
    for connections in (1, 8, 32, 128):
        _note("clients", connections, side, accounts[:SENDING], connections)


def _note(
    chart: str, x: int, side: Side, accounts: Sequence[Account], connections: int = SENDING
) -> None:
    cost = _take(side, accounts, POINT_S, connections)
    point(chart, x, submit_us=cost["submit"].cpu_us, read_us=cost["read"].cpu_us)


def _take(
    side: Side, accounts: Sequence[Account], seconds: int, connections: int = SENDING
) -> dict[str, Cost]:
    """What submissions cost, and reads of waiting tasks. What was submitted is taken back."""
    path = "/v1/images/generations"
    creates = [Request("POST", path, account.key, CREATE) for account in accounts]
    with side.engine.connect() as connection:
        began = connection.scalar(text("SELECT clock_timestamp()"))
    submit = _cost(side, creates, seconds, connections)
    reads = _cost(side, _reads(side.engine, accounts), seconds, connections)
    with side.engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(
            text("DELETE FROM tasks WHERE status = 'pending' AND created_at > :began"),
            {"began": began},
        )
    return {"submit": submit, "read": reads}


def _reads(engine: Engine, accounts: Sequence[Account]) -> list[Request]:
    """Reads of at most FEW waiting tasks of these accounts, evenly spread over what they have."""
    keys = {account.id: account.key for account in accounts}
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT id, account_id FROM tasks WHERE status = 'pending'"
                " AND account_id = ANY(:ids) ORDER BY fair_tag, id"
            ),
            {"ids": list(keys)},
        ).all()
    some = found[:: max(1, len(found) // FEW)]
    return [Request("GET", f"/v1/tasks/{task_id}", keys[owner]) for task_id, owner in some]


def _cost(side: Side, requests: Sequence[Request], seconds: int, connections: int) -> Cost:
    before_s = _cpu_s(side)
    load: Load = stage.load(side.url, requests, seconds=seconds, connections=connections)
    return Cost(load.per_s, (_cpu_s(side) - before_s) / load.requests * 1e6)


def _cpu_s(side: Side) -> float:
    total_s = stage.cpu_s(side.api)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a worker of PostgreSQL's that has just ended
            if child.name() == "postgres":
                total_s += sum(child.cpu_times()[:2])
    return total_s


def _claim_ms(engine: Engine) -> tuple[float, float]:
    """The median time of a claim, without and with its commit."""
    from sqlalchemy.orm import Session

    from storage import tasks

    bare_s, whole_s = [], []
    for _ in range(CLAIMS):
        began = time.perf_counter()
        with Session(engine) as session, session.begin():
            assert tasks.claim_next(session, "benchmark") is not None
            bare_s.append(time.perf_counter() - began)
        whole_s.append(time.perf_counter() - began)
    return statistics.median(bare_s) * 1000, statistics.median(whole_s) * 1000


@contextmanager
def _side(name: str, number: int) -> Iterator[Side]:
    """A copy of the database with what is in it, under this name, and an API process at it."""
    from storage.database import engine as ours

    ours.dispose()  # nobody may be connected to what is copied
    where = make_url(os.environ["ZIMAGE_DATABASE_URL"])
    there = where.set(database=f"flat_{name}")
    _run(
        create_engine(where.set(database="postgres")),
        f"CREATE DATABASE flat_{name} TEMPLATE zimage",
    )
    engine = create_engine(there)
    settings = {
        "database_url": there.render_as_string(hide_password=False),
        "redis_url": os.environ["ZIMAGE_REDIS_URL"].removesuffix("0") + str(number),
    }
    with stage.api(**settings) as (url, api):
        yield Side(engine, url, api)
    engine.dispose()


def _run(engine: Engine, statement: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))


if __name__ == "__main__":
    main()
