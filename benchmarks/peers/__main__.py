"""`python -m benchmarks.peers`: the service beside the stack that tutorials build, in one run.

First whole lives, so that no queue holds anything else: 32 clients submit, poll every 50 ms until
their image is there, and begin again. Then submissions and reads without workers. All stacks are
up at the same time, one API process and two workers each on the same servers, and are loaded in
turns, so that a noisy machine disturbs all alike.
"""

import asyncio
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from benchmarks import stage
from benchmarks.callers import CREATE
from benchmarks.figures import Figure, say, tell
from benchmarks.peers import polling, stacks
from benchmarks.peers.stacks import Stack
from benchmarks.stage import Request

ROUNDS = 2
UNCOUNTED_S = 1
LOAD_S = 2
LIVES_S = 4.0
LIVES_UNCOUNTED_S = 3.0
READ = 8
"""Tasks of each account that are read."""
GOAL = 1.0
BODY = json.dumps({"model": "z-image-turbo", "prompt": "a red fox in the snow"})

CREATES = "submissions per s"
ON_ONE = "submissions per s, one account"
READS = "reads per s"
LIVES = "whole lives per s"
LIFE = "whole life, p50 ms"

Measured = dict[str, dict[str, list[float]]]
"""By measure and stack, a number from each round."""


def main() -> None:
    stacks.installed()
    measured: Measured = defaultdict(lambda: defaultdict(list))
    with stage.running(), ExitStack() as running:
        sides = [stacks.ours(), stacks.peer("rq", 1), stacks.peer("celery", 2)]
        ports = {side.name: running.enter_context(stacks.api(side)) for side in sides}
        with ExitStack() as working:
            for side in sides:
                working.enter_context(stacks.workers(side))
            for side in sides:
                _lives(ports[side.name], side, LIVES_UNCOUNTED_S)  # until its workers are there
            for number in range(ROUNDS):
                for side in sides:
                    say(f"lives, round {number + 1} of {ROUNDS}: {side.name}")
                    lives_ms = _lives(ports[side.name], side, LIVES_S)
                    if not lives_ms:
                        raise SystemExit(f"Nothing was drawn within {LIVES_S} s: {side.name}")
                    measured[LIVES][side.name].append(len(lives_ms) / LIVES_S)
                    measured[LIFE][side.name].append(statistics.median(lives_ms))
        waiting = {
            side.name: asyncio.run(polling.created(ports[side.name], side.keys, READ))
            for side in sides
        }
        for number in range(ROUNDS):
            for side in sides:
                say(f"loads, round {number + 1} of {ROUNDS}: {side.name}")
                url = f"http://127.0.0.1:{ports[side.name]}"
                for name, requests in _loads(side, waiting[side.name]).items():
                    stage.load(url, requests, seconds=UNCOUNTED_S)
                    per_s = stage.load(url, requests, seconds=LOAD_S).per_s
                    measured[name][side.name].append(per_s)
    say(table(measured))
    for figure in ratios(measured):
        tell(figure)


def _lives(port: int, stack: Stack, seconds: float) -> list[float]:
    return asyncio.run(polling.lives_ms(port, seconds, stack.keys))


def _loads(stack: Stack, waiting: Sequence[tuple[str, str]]) -> dict[str, list[Request]]:
    create = [Request("POST", CREATE, key, BODY) for key in stack.keys]
    read = [Request("GET", f"/v1/tasks/{task_id}", key) for task_id, key in waiting]
    return {CREATES: create, ON_ONE: create[:1], READS: read}


def ratios(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[Figure]:
    """How many times better ours is than each peer, from the medians of the rounds."""
    for name, of_stacks in measured.items():
        ours, *peers = ((stack, statistics.median(found)) for stack, found in of_stacks.items())
        for peer, value in peers:
            ratio = value / ours[1] if name == LIFE else ours[1] / value
            detail = f"{ours[1]:.0f} and {value:.0f}"
            yield Figure(f"{name}, ours to {peer}", ratio, GOAL, detail=detail)


def table(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The medians, a line for each measure."""
    lines: list[str] = []
    for name, of_stacks in measured.items():
        if not lines:
            lines.append(f"{'':34}" + "".join(f"{stack:>10}" for stack in of_stacks))
        medians = map(statistics.median, of_stacks.values())
        lines.append(f"{name:34}" + "".join(f"{median:10.0f}" for median in medians))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
