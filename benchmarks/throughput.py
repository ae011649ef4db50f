"""`python -m benchmarks.throughput`: what a submission and a status read cost, beside answering the
same bytes without doing anything.

One API process with all checks on, and beside it the yardstick of `benchmarks.constant`. Everything
is taken in turns, ROUNDS times, and each figure is the median of the rounds' ratios, so that a
noisy machine disturbs both sides alike.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psutil

from benchmarks import figures, stage
from benchmarks.figures import Figure
from benchmarks.stage import Account, Load, Request
from deploy import reach

ROUNDS = 3
ROUND_S = 3.0
QUIET_S = 6.0
"""For a p99: at half load there are fewer requests."""
WARM_UP_S = 1.0
ACCOUNTS = CONNECTIONS = 32
PATH = "/v1/images/generations"
BODY = json.dumps({"model": "z-image-turbo", "prompt": "a red fox in the snow, golden hour"})

Loads = dict[str, list[Load]]


def main() -> None:
    with stage.running(), ExitStack() as stack:
        accounts = stage.accounts(ACCOUNTS)
        port = reach.free_port()
        stack.enter_context(stage.process("benchmarks.constant", port=str(port)))
        constant = f"http://127.0.0.1:{port}"
        stage.wait_until_answered(f"{constant}/ready")
        url, api = stack.enter_context(stage.api())
        ids = [_create(url, account) for account in accounts]
        reads = [
            Request("GET", f"/v1/tasks/{task_id}", account.key)
            for account, task_id in zip(accounts, ids, strict=True)
        ]
        kinds = {
            "constant POST": (constant, _creates(accounts)),
            "submission, 32 accounts": (url, _creates(accounts)),
            "submission, one account": (url, _creates(accounts[:1])),
            "constant GET": (constant, reads),
            "status read": (url, reads),
        }
        full = _at_full_load(kinds)
        _tell_speed(full)
        _tell_p99(_at_half_load(kinds, full))
        second, other = stack.enter_context(stage.api())
        _tell_scaling([(url, api), (second, other)], kinds, full)


def _creates(accounts: Sequence[Account]) -> list[Request]:
    return [Request("POST", PATH, account.key, BODY) for account in accounts]


def _create(url: str, account: Account) -> str:
    headers = {"Authorization": f"Bearer {account.key}", "Content-Type": "application/json"}
    answer = httpx.post(url + PATH, content=BODY, headers=headers)
    task_id: str = answer.raise_for_status().json()["id"]
    return task_id


def _at_full_load(kinds: dict[str, tuple[str, list[Request]]]) -> Loads:
    loads: Loads = defaultdict(list)
    for target, requests in kinds.values():
        stage.load(target, requests, seconds=WARM_UP_S)
    for _ in range(ROUNDS):
        for kind, (target, requests) in kinds.items():
            loads[kind].append(stage.load(target, requests, seconds=ROUND_S))
            last = loads[kind][-1]
            figures.say(f"{kind}: {last.per_s:.0f}/s, p50 {last.p50_ms:.1f} ms")
    return loads


def _at_half_load(kinds: dict[str, tuple[str, list[Request]]], full: Loads) -> Loads:
    """Each at half of what it did at full load, by pauses of random length between requests."""
    loads: Loads = defaultdict(list)
    for _ in range(ROUNDS):
        for kind, (target, requests) in kinds.items():
            if kind == "submission, one account":
                continue
            pause_ms = _half_load_pause_ms(full[kind])
            loads[kind].append(stage.load(target, requests, seconds=QUIET_S, pause_ms=pause_ms))
            last = loads[kind][-1]
            figures.say(f"{kind} at half load: {last.per_s:.0f}/s, p99 {last.p99_ms:.1f} ms")
    return loads


def _half_load_pause_ms(full: list[Load]) -> float:
    return 1000 * CONNECTIONS / (_median(full) / 2)


def _median(loads: list[Load]) -> float:
    return statistics.median(load.per_s for load in loads)


def _tell_speed(full: Loads) -> None:
    for kind, constant, goal in (
        ("submission, 32 accounts", "constant POST", 0.50),
        ("submission, one account", "constant POST", 0.50),
        ("status read", "constant GET", 0.75),
    ):
        ratios = [a.per_s / b.per_s for a, b in zip(full[kind], full[constant], strict=True)]
        figures.tell(
            Figure(
                f"{kind}, per second / constant",
                statistics.median(ratios),
                goal,
                detail=f"{_median(full[kind]):.0f} / {_median(full[constant]):.0f} per second",
            )
        )


def _tell_p99(half: Loads) -> None:
    for kind, constant in (
        ("submission, 32 accounts", "constant POST"),
        ("status read", "constant GET"),
    ):
        ours, theirs = ([load.p99_ms for load in half[each]] for each in (kind, constant))
        figures.tell(
            Figure(
                f"{kind}, p99 at half load / constant's",
                statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                3.0,
                at_most=True,
                detail=f"{statistics.median(ours):.1f} / {statistics.median(theirs):.1f} ms",
            )
        )


def _tell_scaling(
    apis: Sequence[tuple[str, psutil.Process]],
    kinds: dict[str, tuple[str, list[Request]]],
    full: Loads,
) -> None:
    """By CPU time per request, at half the load of one: two cores are too few for two processes,
    their servers and the load."""
    for kind in ("submission, 32 accounts", "status read"):
        requests = kinds[kind][1]
        pause_ms = _half_load_pause_ms(full[kind])
        ratios = []
        for _ in range(ROUNDS):
            one = _cpu_us(apis[:1], requests, pause_ms)
            ratios.append(one / _cpu_us(apis, requests, pause_ms))
        figures.tell(
            Figure(
                f"{kind}: CPU per request, one process / two",
                statistics.median(ratios),
                0.9,
                detail=f"{one:.0f} us of the API's with one",
            )
        )


def _cpu_us(
    apis: Sequence[tuple[str, psutil.Process]], requests: list[Request], pause_ms: float
) -> float:
    """CPU time of all API processes for a request, while the load is spread over them."""
    before = sum(stage.cpu_s(process) for _, process in apis)
    with ThreadPoolExecutor(len(apis)) as pool:
        loads = list(
            pool.map(
                lambda api: stage.load(
                    api[0],
                    requests,
                    seconds=ROUND_S,
                    connections=CONNECTIONS // len(apis),
                    pause_ms=pause_ms,
                ),
                apis,
            )
        )
    spent = sum(stage.cpu_s(process) for _, process in apis) - before
    return spent / sum(load.requests for load in loads) * 1e6


if __name__ == "__main__":
    main()
