"""The life of tasks in miniature: a fake clock, seeded faults, a million steps in a minute.

    python -m soak.simulation --steps 1000000 --seed 7
    python -m soak.simulation --seed 7 --without fencing

It is a model of the protocol: rows, leases, claims with numbers, bells, callbacks and repairs, as
customers, workers, couriers and servers that fail move them. From the service it takes the rules
that are pure: BEFORE, `fairness.schedule`, RETRIES_S, ATTEMPT_LEASE_S and the settings. The
statements are written here anew, each as one indivisible step, so what it proves is that the rules
are right, not that PostgreSQL is asked for them rightly: tests/test_properties.py and the process
harness look at that. With a guard switched off it must find what the guard is there for.
"""

import argparse
import heapq
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import TypeVar

# The rules come with the settings, which want addresses; nothing here ever connects.
os.environ.setdefault("ZIMAGE_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1/nothing")
os.environ.setdefault("ZIMAGE_REDIS_URL", "redis://127.0.0.1:1/0")

from storage import fairness
from storage.deliveries import ATTEMPT_LEASE_S, RETRIES_S
from storage.models import DeliveryState, TaskStatus
from storage.settings import settings
from storage.tasks import BEFORE

GUARDS = {
    "fencing": "a worker moves a task only with the number of the last claim",
    "unique_charge": "what is completed cannot be completed and charged again",
    "lease_renewal": "a worker that draws says so before its lease runs out",
    "delivery_row": "the callback is owed in the commit that ends the task",
    "repair": "lost workers, lost bells and missed deadlines are found",
    "idempotency": "a create that comes twice is submitted once",
}
WORKERS, COURIERS, ACCOUNTS = 4, 2, 3
EPISODE_STEPS = 2000
"""Then the faults stop, and all that was accepted must come to its end."""
QUIET_S = 900.0
"""Simulated seconds in which that must have happened."""
TRACE_MAX = 40
REPAIR_S, LOOK_S = 2.0, 1.0
PRICE = Decimal(15)

T = TypeVar("T")


class Violation(AssertionError):
    """The promise is broken; the message has the seed, the step and what happened to the task."""


class Lost(Exception):
    """No answer from the database: what was asked for may have happened or not."""


@dataclass(slots=True)
class Account:
    """As its row; `granted` is what the operators remember to have given."""

    number: int
    balance: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)
    unfinished: int = 0
    virtual_finish: float = 0.0
    granted: Decimal = Decimal(0)


@dataclass(slots=True)
class Delivery:
    """As its row; `tried` and `accepted` are the receiver's own record."""

    due_at: float
    willing: float
    """How likely the receiver is to answer with 2xx."""
    state: DeliveryState = DeliveryState.WAITING
    attempts: int = 0
    claim: int = 0
    tried: int = 0
    accepted: int = 0


@dataclass(slots=True, eq=False)
class Task:
    """As its row; what is below `trace` is what nobody but the checker knows."""

    number: int
    account: Account
    tag: float
    callback: bool
    deadline_at: float | None
    status: TaskStatus = TaskStatus.PENDING
    attempt: int = 0
    losses: int = 0
    lease_until: float = 0.0
    delivery: Delivery | None = None
    trace: list[str] = field(default_factory=list)
    ends: int = 0
    charges: int = 0
    excuses: int = 0
    """Faults by which it may have lost its worker."""


@dataclass(slots=True)
class Order:
    """What a customer asked for and was told."""

    account: Account
    images: int
    callback: bool
    deadline_s: float | None
    told: bool = False
    made: list[Task] = field(default_factory=list)
    """Every task that came of it, also of a copy that should have been known."""


@dataclass(slots=True, eq=False)
class Process:
    """A worker or courier. Killed, it comes back as another generation that remembers nothing."""

    name: str
    generation: int = 0
    frozen_until: float = 0.0
    task: Task | None = None
    attempt: int = 0


class World:
    """Everything that there is, and the next thing that happens."""

    def __init__(self, seed: int, without: Collection[str] = ()) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.guarded = {guard: guard not in without for guard in GUARDS}
        self.now = 0.0
        self.steps = 0
        self.counts: Counter[str] = Counter()
        self.quiet = False
        self.bells = 0
        self.redis_away_until = 0.0
        self.database_away_until = 0.0
        self.virtual_now = 0.0
        self.accounts = [Account(number) for number in range(ACCOUNTS)]
        self.workers = [Process(f"worker {n}") for n in range(WORKERS)]
        self.couriers = [Process(f"courier {n}") for n in range(COURIERS)]
        self.orders: list[Order] = []
        self.tasks: list[Task] = []
        self.unfinished: dict[int, Task] = {}
        self.pending: list[Task] = []
        self.owed: list[Task] = []
        self._numbers = 0
        self._events: list[tuple[float, int, Process | None, int, Callable[[], None]]] = []
        self._order_of_events = 0
        for account in self.accounts:
            self._grant(account, 600)
        for worker in self.workers:
            self._after(self._about(0.1), partial(self._listen, worker), worker)
        for courier in self.couriers:
            self._begin_courier(courier)
        self._after(0.0, self._customer)
        self._after(1.0, self._fault)

    # --- Time -------------------------------------------------------------------------------------

    def _after(self, pause_s: float, do: Callable[[], None], by: Process | None = None) -> None:
        """Let `do` happen later, unless `by`, who would do it, is killed before."""
        self._order_of_events += 1
        generation = 0 if by is None else by.generation
        event = (self.now + pause_s, self._order_of_events, by, generation, do)
        heapq.heappush(self._events, event)

    def _about(self, mean_s: float) -> float:
        return mean_s * (0.5 + self.random.random())

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def step(self) -> None:
        at, number, by, generation, do = heapq.heappop(self._events)
        self.now = at
        self.steps += 1
        if by is not None:
            if by.generation != generation:
                return
            if by.frozen_until > at:  # stopped in the middle, it goes on where it was
                heapq.heappush(self._events, (by.frozen_until, number, by, generation, do))
                return
        do()

    def run(self, steps: int) -> None:
        """Raises: Violation."""
        while self.steps < steps:
            end = min(self.steps + EPISODE_STEPS, steps)
            while self.steps < end:
                self.step()
                if not self.steps % 500:
                    self._check_books()
            self._come_to_rest()

    def _come_to_rest(self) -> None:
        """No more faults and no more customers: all must end. Then forget, and begin anew."""
        self.quiet = True
        self.redis_away_until = self.database_away_until = 0.0
        for process in (*self.workers, *self.couriers):
            process.frozen_until = min(process.frozen_until, self.now)
        give_up_at = self.now + QUIET_S
        while not self._rests():
            if self.now > give_up_at:
                self._stuck()
            self.step()
        self._check_books()
        for task in self.tasks:
            self._check_told(task)
        for order in self.orders:
            self._check_order(order)
        self.tasks.clear()
        self.orders.clear()
        self.counts["episodes"] += 1
        self.quiet = False
        self._after(0.0, self._customer)
        self._after(1.0, self._fault)

    def _rests(self) -> bool:
        if any(account.unfinished for account in self.accounts) or self.owed:
            return False
        return all(worker.task is None for worker in self.workers)

    # --- The database -----------------------------------------------------------------------------

    def _commit(self, change: Callable[[], T]) -> T:
        """Do all of `change`. Raises: Lost, when the caller cannot know whether it happened."""
        if self.now < self.database_away_until:
            raise Lost
        cut = 0.0 if self.quiet else 0.02
        if self._chance(cut / 2):
            self.counts["commits cut before"] += 1
            raise Lost
        result = change()
        if self._chance(cut / 2):
            self.counts["commits cut after"] += 1
            raise Lost
        return result

    def _note(self, task: Task, what: str) -> None:
        task.trace.append(f"{self.now:10.3f} s  step {self.steps:7}  {what}")
        if len(task.trace) > TRACE_MAX:
            del task.trace[1]

    def _advance(self, task: Task, to: TaskStatus, by: str) -> bool:
        """As `storage.tasks._advance`: guard and write, the credits and the callback, at once."""
        again = to is TaskStatus.COMPLETED and not self.guarded["unique_charge"]
        if task.status not in BEFORE[to] and not (again and task.status is TaskStatus.COMPLETED):
            return False
        before, task.status = task.status, to
        if before is TaskStatus.PENDING:
            self.pending.remove(task)
        self._note(task, f"{by}: {to}")
        if to is TaskStatus.PENDING:
            self.pending.append(task)
        if to.is_terminal:
            self._end(task)
        self._check(task)
        return True

    def _end(self, task: Task) -> None:
        task.ends += 1
        self.unfinished.pop(task.number, None)
        self.counts[task.status] += 1
        account = task.account
        account.reserved -= PRICE
        account.unfinished -= 1
        if task.status is TaskStatus.COMPLETED:
            account.balance -= PRICE
            task.charges += 1
        if not task.callback:
            return
        if self.guarded["delivery_row"]:
            self._owe(task)
        else:
            self._after(0.0, partial(self._owe_apart, task))

    def _owe(self, task: Task) -> None:
        willing = self.random.choice((1.0, 0.5, 0.0))
        task.delivery = Delivery(self.now, willing)
        self.owed.append(task)

    def _owe_apart(self, task: Task) -> None:
        try:
            self._commit(lambda: self._owe(task))
        except Lost:
            self._note(task, "the callback was to be noted in a commit of its own, which was cut")

    def _held(self, task: Task, attempt: int) -> bool:
        fits = attempt == task.attempt or not self.guarded["fencing"]
        again = task.status is TaskStatus.COMPLETED and not self.guarded["unique_charge"]
        return fits and (task.status is TaskStatus.PROCESSING or again)

    def _by_worker(self, worker: Process, task: Task, attempt: int, to: TaskStatus) -> bool:
        """Move a task for the worker that claimed it with `attempt`. False: it is not theirs."""
        if not self._held(task, attempt):
            return False
        if attempt != task.attempt:
            self._violated(f"{worker.name} moves what it holds no more", task)
        return self._advance(task, to, f"{worker.name}, claim {attempt}")

    def _lose(self, task: Task, by: str) -> bool:
        task.losses += 1
        last = task.losses >= settings.losses_max
        return self._advance(task, TaskStatus.FAILED if last else TaskStatus.PENDING, by)

    # --- Customers and operators ------------------------------------------------------------------

    def _customer(self) -> None:
        if self.quiet:
            return
        self._after(self._about(1.2), self._customer)
        what = self.random.random()
        if what < 0.75:
            order = Order(
                self.random.choice(self.accounts),
                self.random.choice((1, 1, 1, 2, 4)),
                callback=self._chance(0.5),
                deadline_s=self.random.choice((None, None, 5.0, 60.0)),
            )
            self.orders.append(order)
            self._create(order)
        elif what < 0.9 and self.tasks:
            task = self.random.choice(self.tasks[-30:])
            try:
                self._commit(lambda: self._advance(task, TaskStatus.CANCELLED, "customer"))
            except Lost:
                self.counts["cancels cut"] += 1
        else:
            account = self.random.choice(self.accounts)
            self._grant(account, self.random.choice((150, 300, -30)))

    def _grant(self, account: Account, amount: int) -> None:
        if account.balance + amount < account.reserved:
            return
        account.balance += amount
        account.granted += amount

    def _create(self, order: Order) -> None:
        """Ask, and ask again with the same key until there is an answer."""
        try:
            made = self._commit(lambda: self._submit(order))
        except Lost:
            if not self.quiet or not order.made:
                self._after(self._about(1.0), partial(self._create, order))
            return
        order.told = True
        if self._chance(0.05) and not self.quiet:
            self.counts["API killed before the bell"] += 1
        else:
            self._ring(made)

    def _submit(self, order: Order) -> int:
        if order.made and self.guarded["idempotency"]:
            return 0
        account, price = order.account, PRICE * order.images
        if account.balance - account.reserved < price:
            self.counts["refused"] += 1
            return 0
        account.reserved += price
        account.unfinished += order.images
        for _ in range(order.images):
            tag, account.virtual_finish = fairness.schedule(
                self.virtual_now, account.virtual_finish, 1.0, "default"
            )
            self._numbers += 1
            deadline_at = None if order.deadline_s is None else self.now + order.deadline_s
            task = Task(self._numbers, account, tag, order.callback, deadline_at)
            self._note(task, f"submitted for account {account.number}")
            order.made.append(task)
            self.tasks.append(task)
            self.pending.append(task)
            self.unfinished[task.number] = task
        return order.images

    def _ring(self, times: int) -> None:
        if self.now >= self.redis_away_until:
            self.bells += times

    # --- Workers ----------------------------------------------------------------------------------

    def _listen(self, worker: Process) -> None:
        if not self.bells or self.now < self.redis_away_until:
            self._after(self._about(0.5), partial(self._listen, worker), worker)
            return
        self.bells -= 1
        claimed: list[Task] = []
        try:
            self._commit(lambda: claimed.extend(self._claim(worker)))
        except Lost:
            for task in claimed:  # nobody knows: its lease will run out
                task.excuses += 1
            claimed.clear()
        if not claimed:
            self._after(self._about(0.1), partial(self._listen, worker), worker)
            return
        (task,) = claimed
        worker.task, worker.attempt = task, task.attempt
        claim = (worker, task, task.attempt)
        self._after(self._about(settings.lease_s / 3), partial(self._renew, *claim), worker)
        takes_s = self._about(self.random.choice((1.0, 4.0, settings.lease_s * 1.5)))
        self._after(takes_s, partial(self._drawn, *claim), worker)

    def _free(self, worker: Process) -> None:
        worker.task = None
        self._after(0.0, partial(self._listen, worker), worker)

    @staticmethod
    def _has(worker: Process, task: Task, attempt: int) -> bool:
        """Whether `worker` itself thinks so."""
        return worker.task is task and worker.attempt == attempt

    def _claim(self, worker: Process) -> list[Task]:
        waits = [t for t in self.pending if t.deadline_at is None or t.deadline_at > self.now]
        if not waits:
            return []
        task = min(waits, key=lambda task: (task.tag, task.number))
        self.virtual_now = max(self.virtual_now, task.tag)
        task.attempt += 1
        task.lease_until = self.now + settings.lease_s
        self._advance(task, TaskStatus.PROCESSING, f"{worker.name}, claim {task.attempt}")
        return [task]

    def _renew(self, worker: Process, task: Task, attempt: int) -> None:
        if not self._has(worker, task, attempt):
            return
        again = partial(self._renew, worker, task, attempt)
        self._after(self._about(settings.lease_s / 3), again, worker)
        if not self.guarded["lease_renewal"]:
            return
        try:
            held = self._commit(lambda: self._prolong(worker, task, attempt))
        except Lost:
            task.excuses += 1
            return
        if not held:
            self._free(worker)

    def _prolong(self, worker: Process, task: Task, attempt: int) -> bool:
        if not self._held(task, attempt) or task.status is not TaskStatus.PROCESSING:
            return False
        if attempt != task.attempt:
            self._violated(f"{worker.name} prolongs what it holds no more", task)
        task.lease_until = self.now + settings.lease_s
        return True

    def _drawn(self, worker: Process, task: Task, attempt: int) -> None:
        if not self._has(worker, task, attempt):
            return
        claim = (worker, task, attempt)
        what = self.random.random()
        if what < 0.03:
            settle = partial(self._by_worker, *claim, TaskStatus.FAILED)
        elif what < 0.06:
            self.counts["handed back"] += 1
            settle = partial(self._by_worker, *claim, TaskStatus.PENDING)
        elif what < 0.09:
            self.counts["image store away"] += 1
            settle = partial(self._unstored, *claim)
        else:
            settle = partial(self._by_worker, *claim, TaskStatus.COMPLETED)
        self._settle(worker, task, attempt, settle)

    def _unstored(self, worker: Process, task: Task, attempt: int) -> bool:
        if not self._held(task, attempt):
            return False
        if attempt != task.attempt:
            self._violated(f"{worker.name} loses what it holds no more", task)
        task.excuses += 1
        return self._lose(task, f"{worker.name} cannot store")

    def _settle(
        self, worker: Process, task: Task, attempt: int, settle: Callable[[], bool]
    ) -> None:
        """Say how it ended, until the database has heard; the bell for what waits again."""
        if not self._has(worker, task, attempt):
            return
        try:
            moved = self._commit(settle)
        except Lost:
            task.excuses += 1
            again = partial(self._settle, worker, task, attempt, settle)
            self._after(self._about(0.5), again, worker)
            return
        if moved and task.status is TaskStatus.PENDING:
            self._ring(1)
        self._free(worker)

    # --- Couriers ---------------------------------------------------------------------------------

    def _begin_courier(self, courier: Process) -> None:
        self._after(self._about(LOOK_S), partial(self._deliver, courier), courier)
        self._after(self._about(REPAIR_S), partial(self._repair, courier), courier)

    def _deliver(self, courier: Process) -> None:
        self._after(self._about(LOOK_S), partial(self._deliver, courier), courier)
        for task in [t for t in self.owed if t.delivery and t.delivery.due_at <= self.now][:5]:
            delivery = task.delivery
            assert delivery is not None
            try:
                claim = self._commit(partial(self._take, delivery))
            except Lost:
                continue
            takes_s = self._about(self.random.choice((0.1, 5.0)))
            self._after(takes_s, partial(self._attempt, task, claim), courier)

    def _take(self, delivery: Delivery) -> int:
        delivery.claim += 1
        delivery.due_at = self.now + ATTEMPT_LEASE_S
        return delivery.claim

    def _attempt(self, task: Task, claim: int) -> None:
        delivery = task.delivery
        assert delivery is not None
        delivery.tried += 1
        accepted = self._chance(delivery.willing)
        delivery.accepted += accepted
        try:
            self._commit(lambda: self._record(task, delivery, claim, accepted))
        except Lost:
            self._note(task, "an attempt that nobody could note")

    def _record(self, task: Task, delivery: Delivery, claim: int, accepted: bool) -> None:
        """As `storage.deliveries.record`."""
        if claim != delivery.claim or delivery.state is not DeliveryState.WAITING:
            return
        if accepted:
            delivery.state = DeliveryState.DELIVERED
        elif delivery.attempts >= len(RETRIES_S):
            delivery.state = DeliveryState.GAVE_UP
        else:
            delivery.due_at = self.now + RETRIES_S[delivery.attempts]
        delivery.attempts += 1
        self._note(task, f"callback: {delivery.state} after {delivery.attempts}")
        if delivery.state is not DeliveryState.WAITING:
            self.counts[f"callbacks {delivery.state}"] += 1
            self.owed.remove(task)

    def _repair(self, courier: Process) -> None:
        """As `storage.repair`."""
        self._after(self._about(REPAIR_S), partial(self._repair, courier), courier)
        if not self.guarded["repair"]:
            return
        for task in list(self.unfinished.values()):
            if task.status is TaskStatus.PROCESSING and task.lease_until < self.now:
                self._try(partial(self._give_up, task))
            if task.deadline_at is not None and task.deadline_at < self.now:
                self._try(partial(self._advance, task, TaskStatus.CANCELLED, "deadline"))
        if self.now >= self.redis_away_until:
            self._ring(max(0, len(self.pending) - self.bells))

    def _give_up(self, task: Task) -> None:
        if task.status is TaskStatus.PROCESSING and task.lease_until < self.now:
            self.counts["workers lost"] += 1
            self._lose(task, "repair: the lease ran out")
            self._ring(not task.status.is_terminal)

    def _try(self, change: Callable[[], object]) -> None:
        try:
            self._commit(change)
        except Lost:
            self.counts["repairs cut"] += 1

    # --- Faults -----------------------------------------------------------------------------------

    def _fault(self) -> None:
        if self.quiet:
            return
        self._after(self._about(6.0), self._fault)
        kind = self.random.choice(("kill", "kill", "freeze", "freeze", "redis", "away", "database"))
        self.counts[f"fault: {kind}"] += 1
        if kind == "redis":
            self.bells = 0
        elif kind == "away":
            self.redis_away_until = self.now + self._about(5.0)
        elif kind == "database":
            self.database_away_until = self.now + self._about(5.0)
        else:
            process = self.random.choice((*self.workers, *self.couriers))
            if process.task is not None:
                process.task.excuses += 1
                self._note(process.task, f"{kind} {process.name}")
            (self._kill if kind == "kill" else self._freeze)(process)

    def _freeze(self, process: Process) -> None:
        process.frozen_until = self.now + self._about(settings.lease_s * 2)

    def _kill(self, process: Process) -> None:
        process.generation += 1
        process.frozen_until = 0.0
        process.task = None
        if process in self.workers:
            self._after(self._about(5.0), partial(self._listen, process), process)
        else:
            self._begin_courier(process)

    # --- The checker ------------------------------------------------------------------------------

    def _check(self, task: Task) -> None:
        if task.ends > 1:
            self._violated("it has ended twice", task)
        if task.charges != (task.status is TaskStatus.COMPLETED):
            self._violated(f"{task.status}, and charged {task.charges} times", task)
        if task.losses > task.excuses:
            self._violated("it was taken from a worker that lived", task)

    def _check_books(self) -> None:
        for task in self.tasks:
            if task.status.is_terminal == (task.number in self.unfinished):
                self._violated("it is counted as what it is not", task)
        for account in self.accounts:
            open_tasks = sum(task.account is account for task in self.unfinished.values())
            if account.unfinished != open_tasks:
                self._violated(f"account {account.number}: unfinished {account.unfinished}")
            if account.reserved != PRICE * open_tasks:
                self._violated(f"account {account.number}: reserved {account.reserved}")
            if not 0 <= account.reserved <= account.balance:
                self._violated(f"account {account.number}: {account.reserved} is not covered")
        charged = PRICE * self.counts[TaskStatus.COMPLETED]
        if sum(a.balance for a in self.accounts) != sum(a.granted for a in self.accounts) - charged:
            self._violated("balances are not what was granted less what was charged")

    def _check_told(self, task: Task) -> None:
        delivery = task.delivery
        if task.callback and delivery is None:
            self._violated("it has ended and nobody will be told", task)
        if delivery is None:
            return
        if delivery.state is DeliveryState.GAVE_UP and delivery.tried <= len(RETRIES_S):
            self._violated(f"given up after {delivery.tried} attempts", task)
        if delivery.state is DeliveryState.DELIVERED and not delivery.accepted:
            self._violated("called delivered, and nobody has it", task)

    def _check_order(self, order: Order) -> None:
        if len(order.made) not in (0, order.images):
            self._violated(f"{order.images} ordered, {len(order.made)} made", order.made[-1])

    def _stuck(self) -> None:
        for task in self.tasks:
            if not task.status.is_terminal:
                self._violated(f"{task.status} for ever", task)
        for task in self.owed:
            self._violated("its callback waits for ever", task)
        self._violated("it does not come to rest")

    def _violated(self, what: str, task: Task | None = None) -> None:
        lines = [f"seed {self.seed}, step {self.steps}: {what}"]
        if task is not None:
            lines += [f"task {task.number}, {task.status}:", *task.trace]
        raise Violation("\n".join(lines))


def main() -> None:
    """Simulate; print one line of figures, or what went wrong and exit with 1."""
    parser = argparse.ArgumentParser(prog="python -m soak.simulation", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--without", action="append", choices=GUARDS, default=[], help="switch this guard off"
    )
    args = parser.parse_args()
    world, started = World(args.seed, args.without), time.monotonic()
    try:
        world.run(args.steps)
    except Violation as violation:
        sys.exit(str(violation))
    figures = ", ".join(f"{name} {count}" for name, count in sorted(world.counts.items()))
    print(
        f"seed {args.seed}: {world.steps} steps, {world.now / 3600:.1f} simulated hours in "
        f"{time.monotonic() - started:.1f} s, no violation; {figures}"
    )


if __name__ == "__main__":
    main()
