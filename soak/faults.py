"""`python -m soak.faults`: load, faults, and then the books, all by one seed.

Prints what goes wrong when, and at the end one line of figures. Exits 1 if any promise was broken.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg

from soak import schedule
from soak.checker import Checker
from soak.customers import Account, Customer
from soak.receiver import MODES
from soak.stage import Cast, Stage

ACCOUNTS = 6
CREDITS = 10**8
POOR_CREDITS = 3_000
"""Of the last account: enough for 200 images, and then it is refused."""
BOOKS_S = 2.0
PAINTER = ("soak.painter",)
REAL = ("worker", "worker.loading", "worker.prompt_extend")
GUARDS = ("fencing", "charge", "lease", "delivery", "repair")
"""Those of `soak.without`, which only a process of the service can import."""
WITHOUT_INVARIANTS = """
    DO $$ DECLARE each record; BEGIN
        FOR each IN SELECT tgname, tgrelid::regclass AS relation FROM pg_trigger
                     WHERE NOT tgisinternal LOOP
            EXECUTE format('DROP TRIGGER %I ON %s', each.tgname, each.relation);
        END LOOP;
        FOR each IN SELECT conname, conrelid::regclass AS relation FROM pg_constraint
                     WHERE contype = 'c' AND connamespace = 'public'::regnamespace
                       AND conrelid <> 0 LOOP
            EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', each.relation, each.conname);
        END LOOP;
    END $$
"""
"""The database refuses by itself what most guards are for, and would hide that one is gone."""
WITHOUT_UNIQUE_CHARGE = "ALTER TABLE ledger_entries DROP CONSTRAINT uq_ledger_entries_task_id"


async def run(asked: argparse.Namespace, folder: Path) -> bool:
    """Returns whether every promise was kept."""
    began = time.monotonic()
    painter = REAL if asked.real_model else PAINTER
    cast = Cast(asked.apis, asked.couriers, asked.workers)
    stage = Stage(folder, cast, painter, asked.without)
    await stage.rise()
    try:
        accounts = await _accounts(stage)
        if asked.without is not None:
            await asyncio.to_thread(_remove_guard, stage.addresses.database, asked.without)
        checker = Checker(stage.addresses)
        modes = MODES if asked.seconds >= 120 else MODES[:-1]
        customers = [
            Customer(number, asked.seed, accounts, stage.bases, stage.receiver, modes)
            for number in range(asked.customers)
        ]
        longest_s = min(schedule.COURIER_LONG_S, asked.seconds / 4)
        plan = schedule.plan(
            asked.seed, asked.seconds, asked.faults, kinds=asked.kinds, longest_s=longest_s
        )
        say = print if asked.verbose else _say_nothing
        player = schedule.Player(stage)
        over = asyncio.Event()
        auditing = asyncio.create_task(_look_at_books(checker))
        living = [asyncio.create_task(customer.live(over)) for customer in customers]
        playing = asyncio.create_task(player.play(plan, say))
        loaded = time.monotonic()
        await asyncio.sleep(asked.seconds)
        over.set()
        await playing
        await player.heal()
        print(f"{time.monotonic() - loaded:.0f} s of load; waiting for what is owed", flush=True)
        await asyncio.wait(living, timeout=asked.patience_s)
        late = [task for task in living if not task.done()]
        for task in living:
            if task.done():
                task.result()  # a customer that broke is a bug of ours
        await _quiet(checker, asked.patience_s)
        auditing.cancel()
        wishes = [wish for customer in customers for wish in customer.wishes]
        receiver = stage.receiver
        await asyncio.to_thread(checker.check, wishes, receiver.heard, receiver.faults)
        for _ in late:
            checker.findings.breach("lost", "a customer who still waits for an answer")
    finally:
        await stage.fall()
    faults = ", ".join(f"{times} {kind}" for kind, times in sorted(player.done.items()))
    print(f"faults: {faults}; commits cut: {stage.postgres_wire.commits_cut}")
    for line in checker.findings.details():
        print(line)
    total = sum(player.done.values())
    print(
        f"seed {asked.seed}, {time.monotonic() - began:.0f} s, {total} faults, "
        + checker.findings.line(),
        flush=True,
    )
    return checker.findings.clean


async def _accounts(stage: Stage) -> list[Account]:
    """Accounts with credits and keys without limits, made as an operator makes them."""
    headers = {"Authorization": f"Bearer {await stage.admin_key()}"}
    made = []
    async with httpx.AsyncClient(base_url=stage.bases[0], headers=headers, timeout=30) as admin:
        await _listening(admin)
        for number in range(ACCOUNTS):
            account = await _post(admin, "/admin/accounts", name=f"a{number}", unfinished_max=None)
            path = f"/admin/accounts/{account['id']}"
            credits_ = CREDITS if number < ACCOUNTS - 1 else POOR_CREDITS
            await _post(admin, f"{path}/credits", amount=credits_)
            key = await _post(admin, f"{path}/keys", requests_per_minute=None)
            secret = (await admin.get(f"{path}/callback-secret")).raise_for_status().json()
            stage.receiver.secrets.append(secret["key"])
            made.append(Account(account["id"], key["key"]))
    return made


async def _listening(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            with suppress(httpx.HTTPError):
                await http.get("/health")
                return
            await asyncio.sleep(0.1)


async def _post(http: httpx.AsyncClient, path: str, **body: object) -> dict[str, str]:
    answer = await http.post(path, json=body)
    made: dict[str, str] = answer.raise_for_status().json()
    return made


async def _look_at_books(checker: Checker) -> None:
    while True:
        with suppress(psycopg.Error):
            await asyncio.to_thread(checker.look_at_books)
        await asyncio.sleep(BOOKS_S)


async def _quiet(checker: Checker, patience_s: float) -> None:
    """Wait until nothing is left to be done, or for long enough to call it lost."""
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while not await asyncio.to_thread(checker.quiet):
                await asyncio.sleep(0.5)


def _remove_guard(database: str, guard: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(WITHOUT_INVARIANTS)
        if guard == "charge":
            connection.execute(WITHOUT_UNIQUE_CHARGE)


def _say_nothing(line: str) -> None:
    pass


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m soak.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800, help="of load and faults")
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=schedule.WEIGHTS,
        default=list(schedule.WEIGHTS),
        help="of faults; without it, all",
        metavar="KIND",
    )
    parser.add_argument("--customers", type=int, default=130, help="at a time")
    parser.add_argument("--apis", type=int, default=3, help="processes")
    parser.add_argument("--couriers", type=int, default=2, help="processes")
    parser.add_argument("--workers", type=int, default=4, help="processes")
    parser.add_argument(
        "--patience-s",
        type=float,
        default=240,
        help="how long what is owed may take, once nothing goes wrong any more",
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--real-model", action="store_true", help="draw with the demo model")
    parser.add_argument("--without", choices=GUARDS, help="take this guard away")
    parser.add_argument("--keep", type=Path, help="an empty folder for the data and logs")
    parser.add_argument("--verbose", action="store_true", help="print every fault")
    return parser.parse_args(arguments)


def main() -> None:
    asked = parse()
    print(f"seed {asked.seed}: the same seed has the same faults", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="zimage-soak-", ignore_cleanup_errors=True) as made:
        folder = asked.keep or Path(made)
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        kept = asyncio.run(run(asked, folder))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
