"""What goes wrong when: a list that its seed alone decides, and the hands that do it."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import cast

from soak.children import Child, ServiceChild
from soak.stage import Stage
from soak.wires import Cut, StoreFault

WEIGHTS = {
    "kill worker": 9,
    "kill api": 5,
    "kill courier": 4,
    "freeze worker": 10,
    "freeze api": 6,
    "freeze courier": 4,
    "wrong clock": 2,
    "cut commit before": 12,
    "cut commit after": 16,
    "cut database": 4,
    "kill postgres": 3,
    "freeze postgres": 2,
    "kill redis": 4,
    "empty redis": 3,
    "freeze redis": 4,
    "store refuse": 3,
    "store crawl": 3,
    "store break_upload": 3,
    "store break_answer": 3,
    "store overloaded": 2,
    "store broken": 2,
    "store full": 3,
    "receiver gone": 3,
}
"""How often each kind of fault comes, relative to the others."""

LASTS_S: dict[str, tuple[float, float]] = {
    "freeze worker": (0.3, 8),
    "freeze api": (0.3, 4),
    "freeze courier": (0.3, 8),
    "wrong clock": (2, 8),
    "freeze postgres": (0.3, 4),
    "freeze redis": (0.3, 6),
    "receiver gone": (1, 8),
    "store": (0.5, 6),
}
"""At least and at most; a kind that is not here is over at once."""

COURIER_LONG_S = 34.0
"""Longer than the lease of an attempt: another courier takes what a frozen one holds."""
CLOCKS_OFF_S = (-3 * 3600.0, -20.0, 20.0, 3 * 3600.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong `at_s` seconds after the start, for `lasts_s` seconds."""

    at_s: float
    kind: str
    lasts_s: float
    which: int
    """Chooses among several of a kind."""


def plan(
    seed: int,
    seconds: float,
    faults: int,
    *,
    kinds: Collection[str] = tuple(WEIGHTS),
    longest_s: float = COURIER_LONG_S,
) -> list[Fault]:
    """`faults` faults of these `kinds` within `seconds`, the same for the same arguments."""
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0, seconds) for _ in range(faults))
    weights = {kind: weight for kind, weight in WEIGHTS.items() if kind in kinds}
    drawn = chance.choices(list(weights), list(weights.values()), k=faults)
    return [
        _fault(chance, at_s, kind, longest_s) for at_s, kind in zip(moments, drawn, strict=True)
    ]


def _fault(chance: random.Random, at_s: float, kind: str, longest_s: float) -> Fault:
    least, most = LASTS_S.get(kind) or LASTS_S.get(kind.partition(" ")[0], (0.0, 0.0))
    lasts_s = chance.uniform(least, most)
    which = chance.randrange(1000)
    if kind == "freeze courier" and which % 4 == 0:
        lasts_s = COURIER_LONG_S
    return Fault(round(at_s, 3), kind, round(min(lasts_s, longest_s), 3), which)


class Player:
    """Does to `stage` what a plan says; two faults of the same victim wait for each other."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._victims: dict[str, asyncio.Lock] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self.done: Counter[str] = Counter()

    async def play(self, faults: Sequence[Fault], say: Callable[[str], None]) -> None:
        """Returns when the last fault has begun; `heal` waits for their ends."""
        began = asyncio.get_running_loop().time()
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at_s - asyncio.get_running_loop().time()))
            say(f"{fault.at_s:9.3f} s  {fault.kind}  {fault.lasts_s} s  #{fault.which}")
            striking = asyncio.create_task(self._strike(fault))
            self._under_way.add(striking)
            striking.add_done_callback(self._under_way.discard)

    async def heal(self) -> None:
        """Wait until every fault is over."""
        await asyncio.gather(*self._under_way)

    async def _strike(self, fault: Fault) -> None:
        victim = fault.kind.partition(" ")[0] if "store" in fault.kind else fault.kind.split()[-1]
        lock = self._victims.setdefault(victim, asyncio.Lock())
        async with lock:
            await self._do(fault)
        self.done[fault.kind] += 1

    async def _do(self, fault: Fault) -> None:
        stage = self._stage
        verb, _, rest = fault.kind.partition(" ")
        match verb:
            case "kill" if rest == "postgres":
                stage.postgres.send(signal.SIGQUIT)  # immediate: no checkpoint, no farewell
            case "kill":
                self._one(fault, rest).send(signal.SIGKILL)
            case "freeze":
                child = self._one(fault, rest)
                pid = child.pid
                child.send(signal.SIGSTOP)
                await asyncio.sleep(fault.lasts_s)
                if child.pid == pid:
                    child.send(signal.SIGCONT)
            case "empty":
                await stage.forget_jobs()
            case "wrong":
                workers = self._stage.workers
                await self._with_a_wrong_clock(workers[fault.which % len(workers)], fault)
            case "cut" if rest == "database":
                stage.postgres_wire.cut_all()
            case "cut":
                stage.postgres_wire.cut_next_commit(cast(Cut, rest.split()[1]))
            case "store" if rest == "full":
                await stage.fill_disk()
                await asyncio.sleep(fault.lasts_s)
                stage.empty_disk()
            case "store":
                await stage.store_wire.have(cast(StoreFault, rest))
                await asyncio.sleep(fault.lasts_s)
                await stage.store_wire.have(None)
            case "receiver":
                await stage.receiver.go()
                await asyncio.sleep(fault.lasts_s)
                await stage.receiver.come_back()

    def _one(self, fault: Fault, kind: str) -> Child:
        stage = self._stage
        several: dict[str, Sequence[Child]] = {
            "worker": stage.workers,
            "api": stage.apis,
            "courier": stage.couriers,
            "postgres": [stage.postgres],
            "redis": [stage.valkey],
        }
        return several[kind][fault.which % len(several[kind])]

    async def _with_a_wrong_clock(self, worker: ServiceChild, fault: Fault) -> None:
        worker.clock_off_s = CLOCKS_OFF_S[fault.which // 10 % len(CLOCKS_OFF_S)]
        await worker.kill()
        await asyncio.sleep(fault.lasts_s)
        worker.clock_off_s = 0
        await worker.kill()
