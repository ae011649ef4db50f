"""Who is let in, how often, and with how many credits; and what is gathered keeps apart."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import func, select, text

from api.batching import BATCH_MAX, WAITING_MAX, Batcher
from storage import accounts, ledger, queue, tasks
from storage.database import engine, transaction
from storage.errors import (
    InsufficientCredits,
    InvalidRequest,
    ServiceError,
    ServiceUnavailable,
    TooManyUnfinished,
)
from storage.models import ApiKey, ImageFormat, Task
from storage.tasks import Submitted

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

CAT = {"prompt": "a cat", "aspect_ratio": "1:1"}
CREATE = "/api/generate"
READ = "/api/status?task_id=task-unified-1757165031-uyujaw3d"
BELIEVED_S = 1.0
"""For how long a key may still be believed after it has ended."""


def key_of(customer: Customer) -> ApiKey:
    with transaction() as session:
        return session.get_one(ApiKey, customer.key_id)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def refused_within_a_second(ask: Callable[[], httpx.Response], since: float) -> httpx.Response:
    """The first refusal; no request that begins BELIEVED_S after `since` may be let in."""
    while True:
        begun = time.monotonic()
        answer = ask()
        if answer.status_code in (401, 403):
            return answer
        assert begun - since < BELIEVED_S, "a key that had ended was still let in"


# --- Keys -----------------------------------------------------------------------------------------


def test_a_revoked_key_is_refused_within_a_second(customer: Customer) -> None:
    assert customer.http.get(READ).status_code == 404  # known, and remembered

    with transaction() as session:
        accounts.revoke_key(session, customer.key_id)
    answer = refused_within_a_second(lambda: customer.http.get(READ), time.monotonic())

    assert answer.status_code == 401


def test_a_suspended_account_is_refused_within_a_second(customer: Customer) -> None:
    assert customer.http.get(READ).status_code == 404

    with transaction() as session:
        accounts.change(session, customer.id, suspended=True)
    answer = refused_within_a_second(lambda: customer.http.get(READ), time.monotonic())

    assert answer.status_code == 403


def test_a_suspended_account_can_submit_nothing_from_the_commit_on(customer: Customer) -> None:
    assert customer.http.get(READ).status_code == 404

    with transaction() as session:
        accounts.change(session, customer.id, suspended=True)

    assert customer.http.post(CREATE, json=CAT).status_code == 403
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_suspension_that_ends_is_over(customer: Customer, anyone: httpx.Client) -> None:
    with transaction() as session:
        accounts.change(session, customer.id, suspended=True)
    assert customer.http.get(READ).status_code == 403

    with transaction() as session:
        accounts.change(session, customer.id, suspended=False)
        _, fresh = accounts.issue_key(session, customer.id)

    assert anyone.post(CREATE, json=CAT, headers=bearer(fresh)).status_code == 200


def test_an_expired_key_is_refused(customer: Customer, anyone: httpx.Client) -> None:
    with transaction() as session:
        moment_ago = datetime.now(UTC) - timedelta(milliseconds=1)
        _, expired = accounts.issue_key(session, customer.id, expires_at=moment_ago)

    assert anyone.get(READ, headers=bearer(expired)).status_code == 401


def test_a_key_is_good_until_it_expires_and_not_a_moment_longer(
    customer: Customer, anyone: httpx.Client
) -> None:
    expires_at = datetime.now(UTC) + timedelta(milliseconds=300)
    with transaction() as session:
        _, secret = accounts.issue_key(
            session, customer.id, requests_per_minute=None, expires_at=expires_at
        )

    answers: list[tuple[datetime, int]] = []
    while not answers or answers[-1][1] != 401:
        begun = datetime.now(UTC)
        answers.append((begun, anyone.get(READ, headers=bearer(secret)).status_code))

    assert all(begun < expires_at for begun, status in answers if status != 401)
    assert datetime.now(UTC) >= expires_at


def test_both_keys_work_while_a_rotation_overlaps(customer: Customer, anyone: httpx.Client) -> None:
    with transaction() as session:
        _, fresh = accounts.rotate_key(session, customer.key_id, overlap=timedelta(hours=1))

    assert customer.http.get(READ).status_code == 404
    assert anyone.get(READ, headers=bearer(fresh)).status_code == 404


def test_without_an_overlap_a_rotated_key_ends_within_a_second(
    customer: Customer, anyone: httpx.Client
) -> None:
    assert customer.http.get(READ).status_code == 404

    with transaction() as session:
        _, fresh = accounts.rotate_key(session, customer.key_id, overlap=timedelta(0))
    refused_within_a_second(lambda: customer.http.get(READ), time.monotonic())

    assert anyone.get(READ, headers=bearer(fresh)).status_code == 404


def test_a_rotation_never_lengthens_a_keys_life(customer: Customer) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=5)
    with transaction() as session:
        key, _ = accounts.issue_key(session, customer.id, expires_at=soon)
    with transaction() as session:
        accounts.rotate_key(session, key.id, overlap=timedelta(days=1))

    with transaction() as session:
        assert session.get_one(ApiKey, key.id).expires_at == soon


def test_the_use_of_a_key_is_noted(customer: Customer) -> None:
    assert key_of(customer).last_used_at is None

    before = datetime.now(UTC)
    customer.http.get(READ)

    used_at = key_of(customer).last_used_at
    assert used_at is not None
    assert before - timedelta(seconds=1) <= used_at <= datetime.now(UTC) + timedelta(seconds=1)


def test_a_refused_key_is_not_noted_as_used(customer: Customer) -> None:
    with transaction() as session:
        accounts.revoke_key(session, customer.key_id)

    assert customer.http.get(READ).status_code == 401
    assert key_of(customer).last_used_at is None


def test_the_secret_of_a_key_is_nowhere_in_the_database(customer: Customer) -> None:
    customer.http.post(CREATE, json=CAT)
    hidden = customer.key[accounts.PREFIX_LENGTH :]
    assert len(hidden) >= 32

    with engine.connect() as connection:
        tables = connection.scalars(
            text("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        ).all()
        rows = [
            row
            for table in tables
            for row in connection.scalars(text(f"SELECT t::text FROM {table} t"))
        ]

    assert any(accounts.digest(customer.key).hex() in row for row in rows)
    assert not any(hidden in row or hidden.encode().hex() in row for row in rows)


def test_no_two_keys_are_alike(customer: Customer) -> None:
    with transaction() as session:
        secrets = {accounts.issue_key(session, customer.id)[1] for _ in range(100)}

    assert len(secrets) == 100
    assert all(len(secret) >= len("zk_") + 43 for secret in secrets)  # 43 x 6 bits > 256


# --- How often ------------------------------------------------------------------------------------


def test_creates_are_counted_to_the_limit_and_no_further(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=3)

    answers = [customer.http.post(CREATE, json=CAT) for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    waits = [int(answer.headers["retry-after"]) for answer in answers[3:]]
    assert all(1 <= wait <= 60 for wait in waits)
    assert customer.books() == (Decimal(1500), Decimal(45))


def test_many_at_once_are_counted_to_the_limit_and_no_further(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=10)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: customer.http.post(CREATE, json=CAT), range(32)))

    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (10, 22)


def test_reads_are_counted_apart_from_creates(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=1)
    task_id = customer.http.post(CREATE, json=CAT).json()["data"]["task_id"]
    assert customer.http.post(CREATE, json=CAT).status_code == 429

    for _ in range(5):
        answer = customer.http.get("/api/status", params={"task_id": task_id})
        assert answer.status_code == 200


def test_both_dialects_count_into_one_limit(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=1)
    assert customer.http.post(CREATE, json=CAT).status_code == 200

    other = {"model": "z-image-turbo", "prompt": "a cat"}
    assert customer.http.post("/v1/images/generations", json=other).status_code == 429


def test_keys_are_counted_apart(customer: Customer, anyone: httpx.Client) -> None:
    with transaction() as session:
        secrets = [
            accounts.issue_key(session, customer.id, requests_per_minute=1)[1] for _ in range(2)
        ]

    answers = [
        anyone.post(CREATE, json=CAT, headers=bearer(secret)).status_code
        for secret in (*secrets, *secrets)
    ]

    assert answers == [200, 200, 429, 429]


def test_fifty_reads_a_second_are_let_in_and_no_more(new_customer: NewCustomer) -> None:
    for _ in range(10):  # a machine that was too busy to ask 51 times within a second asks again
        customer = new_customer(0, requests_per_minute=120)
        begun = time.monotonic()
        statuses = [customer.http.get(READ).status_code for _ in range(51)]
        if time.monotonic() - begun < 1:
            break
    else:
        pytest.fail("this machine is too slow to reach the limit")

    assert statuses == [404] * 50 + [429]


def test_a_key_without_a_limit_has_none(customer: Customer) -> None:
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda _: customer.http.get(READ).status_code, range(200)))

    assert set(reads) == {404}


def test_a_key_without_a_limit_creates_as_often_as_it_likes(new_customer: NewCustomer) -> None:
    customer = new_customer(15 * 130)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: customer.http.post(CREATE, json=CAT), range(130)))

    assert {answer.status_code for answer in answers} == {200}


def test_what_is_refused_for_its_rate_is_not_read(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=1)
    assert customer.http.post(CREATE, json=CAT).status_code == 200

    assert customer.http.post(CREATE, content=b"{").status_code == 429


# --- How many at once -----------------------------------------------------------------------------


def test_unfinished_tasks_are_counted_to_the_limit_and_no_further(
    new_customer: NewCustomer, work: Work
) -> None:
    customer = new_customer(unfinished_max=3)

    first = [customer.http.post(CREATE, json=CAT).status_code for _ in range(5)]
    work(max_jobs=2)
    then = [customer.http.post(CREATE, json=CAT).status_code for _ in range(4)]

    assert first == [200, 200, 200, 429, 429]
    assert then == [200, 200, 429, 429]


def test_many_at_once_leave_no_more_unfinished_than_allowed(new_customer: NewCustomer) -> None:
    customer = new_customer(unfinished_max=5)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: customer.http.post(CREATE, json=CAT), range(32)))

    assert sum(answer.status_code == 200 for answer in answers) == 5
    assert customer.books() == (Decimal(1500), Decimal(75))


# --- Credits --------------------------------------------------------------------------------------


def test_1500_credits_pay_for_exactly_100_images(customer: Customer) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: customer.http.post(CREATE, json=CAT), range(104)))

    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(402)) == (100, 4)
    assert customer.books() == (Decimal(1500), Decimal(1500))
    assert queue.count() == 100


RACERS = 64
ROUNDS = 50


def test_sixty_four_clients_racing_for_six_images_get_six(server: str) -> None:
    address = urlsplit(server)
    body = json.dumps(CAT)
    start = threading.Barrier(RACERS)
    lanes = [http.client.HTTPConnection(address.netloc, timeout=60) for _ in range(RACERS)]

    def race(racer: int, secret: str) -> int:
        start.wait()
        lanes[racer].request(
            "POST", CREATE, body, {"Content-Type": "application/json", **bearer(secret)}
        )
        answer = lanes[racer].getresponse()
        answer.read()
        return answer.status

    outcomes = []
    with ThreadPoolExecutor(RACERS) as pool:
        for _ in range(ROUNDS):
            with transaction() as session:
                account = accounts.create(session, "racers", unfinished_max=None)
                ledger.grant(session, account.id, Decimal(104), actor="test")  # 6 x 15 and 14
                _, secret = accounts.issue_key(session, account.id, requests_per_minute=None)
            statuses = list(pool.map(race, range(RACERS), [secret] * RACERS))
            with transaction() as session:
                account = accounts.get(session, account.id)
                taken = session.scalar(
                    select(func.count()).select_from(Task).where(Task.account_id == account.id)
                )
            outcomes.append((statuses.count(200), statuses.count(402), taken, account.reserved))
    for lane in lanes:
        lane.close()

    assert outcomes == [(6, RACERS - 6, 6, Decimal(90))] * ROUNDS


def submission(customer: Customer, price: int = 15) -> tasks.Submission:
    return tasks.Submission(
        account_id=customer.id,
        api_key_id=customer.key_id,
        images=(tasks.ImageRequest("a cat", 64, 64, ImageFormat.PNG),),
        dialect="test",
        price=Decimal(price),
    )


def test_of_three_gathered_requests_the_first_two_are_paid(new_customer: NewCustomer) -> None:
    customer = new_customer(44)

    with transaction() as session:
        outcomes = tasks.submit_many(session, [submission(customer) for _ in range(3)])

    assert [type(outcome) for outcome in outcomes] == [Submitted, Submitted, InsufficientCredits]
    assert customer.books() == (Decimal(44), Decimal(30))


def test_processes_that_submit_at_the_same_moment_never_spend_a_credit_twice(
    new_customer: NewCustomer,
) -> None:
    start = threading.Barrier(12)

    def try_to_submit(customer: Customer) -> bool:
        start.wait()
        with transaction() as session:
            (outcome,) = tasks.submit_many(session, [submission(customer)])
        return isinstance(outcome, Submitted)

    for _ in range(10):
        customer = new_customer(104)
        with ThreadPoolExecutor(12) as pool:
            taken = list(pool.map(try_to_submit, [customer] * 12))

        assert sum(taken) == 6
        assert customer.books() == (Decimal(104), Decimal(90))


def test_a_cheaper_request_may_be_paid_after_one_that_could_not(new_customer: NewCustomer) -> None:
    customer = new_customer(20)
    prices = [15, 15, 5]

    with transaction() as session:
        outcomes = tasks.submit_many(session, [submission(customer, price) for price in prices])

    assert [type(outcome) for outcome in outcomes] == [Submitted, InsufficientCredits, Submitted]
    assert customer.books() == (Decimal(20), Decimal(20))


def test_gathered_requests_of_several_accounts_answer_in_order(new_customer: NewCustomer) -> None:
    rich, poor, busy = new_customer(), new_customer(15), new_customer(unfinished_max=1)
    asked = [poor, rich, busy, poor, rich, busy, rich]

    with transaction() as session:
        outcomes = tasks.submit_many(session, [submission(each) for each in asked])

    kinds = [type(outcome) for outcome in outcomes]
    taken, broke, full = Submitted, InsufficientCredits, TooManyUnfinished
    assert kinds == [taken, taken, taken, broke, taken, full, taken]
    owners = [made.tasks[0].account_id for made in outcomes if isinstance(made, Submitted)]
    assert owners == [poor.id, rich.id, busy.id, rich.id, rich.id]


# --- What is gathered -----------------------------------------------------------------------------


class Recorder:
    """Work for a Batcher: keeps the batches, and holds the first until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, batch: Sequence[int]) -> list[int | ServiceError]:
        self.batches.append(list(batch))
        self.begun.set()
        self.go.wait(30)
        return [InvalidRequest(str(item)) if item < 0 else item * 10 for item in batch]


async def gathered(
    batcher: Batcher[int, int], work: Recorder, items: Sequence[int]
) -> list[object]:
    """The outcomes of `items`: the first is under way when the others arrive."""
    calls = [asyncio.create_task(batcher.add(item)) for item in items]
    await asyncio.sleep(0)  # all have called
    work.go.set()
    return list(await asyncio.gather(*calls, return_exceptions=True))


def test_a_lone_request_waits_for_nobody() -> None:
    work = Recorder()
    work.go.set()

    assert asyncio.run(Batcher(work).add(4)) == 40
    assert work.batches == [[4]]


def test_what_arrives_together_is_worked_on_together_and_answered_in_order() -> None:
    work = Recorder()

    outcomes = asyncio.run(gathered(Batcher(work), work, range(5)))

    assert outcomes == [0, 10, 20, 30, 40]
    assert [item for batch in work.batches for item in batch] == [0, 1, 2, 3, 4]
    assert len(work.batches) <= 2


def test_what_arrives_during_a_batch_is_the_next_batch() -> None:
    work = Recorder()

    async def run() -> list[int]:
        batcher = Batcher(work)
        first = asyncio.create_task(batcher.add(0))
        await asyncio.to_thread(work.begun.wait, 30)
        others = [asyncio.create_task(batcher.add(item)) for item in (1, 2, 3)]
        await asyncio.sleep(0)
        work.go.set()
        return [await call for call in (first, *others)]

    assert asyncio.run(run()) == [0, 10, 20, 30]
    assert work.batches == [[0], [1, 2, 3]]


def test_a_batch_is_no_larger_than_its_limit() -> None:
    work = Recorder()

    asyncio.run(gathered(Batcher(work), work, range(2 * BATCH_MAX + 1)))

    assert [len(batch) for batch in work.batches] == [BATCH_MAX, BATCH_MAX, 1]


def test_one_request_too_many_is_refused_not_kept_waiting() -> None:
    work = Recorder()

    outcomes = asyncio.run(gathered(Batcher(work), work, range(WAITING_MAX + 1)))

    assert outcomes[:WAITING_MAX] == [item * 10 for item in range(WAITING_MAX)]
    assert isinstance(outcomes[WAITING_MAX], ServiceUnavailable)


def test_an_error_reaches_only_its_own_caller() -> None:
    work = Recorder()

    outcomes = asyncio.run(gathered(Batcher(work), work, [1, -2, 3]))

    assert outcomes[0] == 10
    assert isinstance(outcomes[1], InvalidRequest)
    assert str(outcomes[1]) == "-2"
    assert outcomes[2] == 30


def test_an_item_that_breaks_the_work_does_not_break_its_neighbours() -> None:
    def work(batch: Sequence[int]) -> list[int | ServiceError]:
        return [100 // item for item in batch]

    async def run() -> list[object]:
        batcher = Batcher(work)
        calls = [batcher.add(item) for item in (1, 0, 4)]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    first, broken, last = asyncio.run(run())
    assert (first, last) == (100, 25)
    assert isinstance(broken, ZeroDivisionError)


def test_a_server_that_is_away_is_said_to_all_and_tried_again() -> None:
    away = [True]

    def work(batch: Sequence[int]) -> list[int | ServiceError]:
        if away[0]:
            raise ServiceUnavailable
        return list(batch)

    async def run() -> tuple[list[int | BaseException], int]:
        batcher = Batcher(work)
        calls = [batcher.add(item) for item in (1, 2)]
        refused = list(await asyncio.gather(*calls, return_exceptions=True))
        away[0] = False
        return refused, await batcher.add(3)

    refused, then = asyncio.run(run())
    assert [type(outcome) for outcome in refused] == [ServiceUnavailable, ServiceUnavailable]
    assert then == 3


def test_a_caller_who_hangs_up_disturbs_nobody() -> None:
    work = Recorder()

    async def run() -> list[int]:
        batcher = Batcher(work)
        calls = [asyncio.create_task(batcher.add(item)) for item in (1, 2, 3)]
        await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.sleep(0)
        work.go.set()
        return [await calls[0], await calls[2]]

    assert asyncio.run(run()) == [10, 30]


def test_one_bad_request_of_many_at_once_fails_alone(
    customer: Customer, new_customer: NewCustomer
) -> None:
    poor = new_customer(14)
    mixed = [customer, poor] * 16

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: each.http.post(CREATE, json=CAT), mixed))

    assert [answer.status_code for answer in answers] == [200, 402] * 16
    assert customer.books() == (Decimal(1500), Decimal(240))
    assert poor.books() == (Decimal(14), Decimal(0))


def test_many_status_reads_at_once_each_get_their_own_task(
    customer: Customer, new_customer: NewCustomer
) -> None:
    other = new_customer()
    ids = [customer.http.post(CREATE, json=CAT).json()["data"]["task_id"] for _ in range(8)]
    asked = [(customer, task_id) for task_id in ids] + [(other, task_id) for task_id in ids]

    def read(asked: tuple[Customer, str]) -> tuple[int, str | None]:
        answer = asked[0].http.get("/api/status", params={"task_id": asked[1]})
        data = answer.json()["data"]
        return answer.status_code, None if data is None else data["task_id"]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, asked))

    assert found == [(200, task_id) for task_id in ids] + [(404, None)] * 8
