"""A task moves only where it may, for whom it may, and its credits move with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError

from storage import ledger, tasks
from storage.database import transaction
from storage.errors import GenerationFailed, TaskEnded, TaskNotFound, WorkerLost
from storage.models import Delivery, LedgerEntry, Task, TaskStatus
from storage.settings import settings
from storage.tasks import Claim

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer

    Submit = Callable[..., Task]

CALLBACK = "https://203.0.113.7/told"


def claim(worker: str = "a worker") -> Claim:
    with transaction() as session:
        task = tasks.claim_next(session, worker)
    assert task is not None
    return tasks.claim_of(task)


def complete(claim: Claim) -> Task | None:
    with transaction() as session:
        return tasks.complete(
            session,
            claim,
            image_key="images/x.png",
            image_sha256="0" * 64,
            image_size_bytes=1,
            image_url="https://images/x.png",
            expires_at=datetime.now(UTC) + timedelta(hours=24),
            image_width=64,
            image_height=64,
            prompt_tokens=9,
            prompt_tokens_read=9,
        )


def fail(claim: Claim) -> Task | None:
    with transaction() as session:
        return tasks.fail(session, claim, GenerationFailed())


def hand_back(claim: Claim) -> Task | None:
    with transaction() as session:
        return tasks.hand_back(session, claim)


def lose(claim: Claim) -> Task | None:
    with transaction() as session:
        return tasks.lose(session, claim, WorkerLost())


def renew(claim: Claim, progress: int = 0) -> bool:
    with transaction() as session:
        return claim in tasks.renew(session, {claim: progress})


def cancel(task: Task, account_id: str | None = None) -> Task:
    with transaction() as session:
        return tasks.cancel(session, task.id, account_id=account_id)


def let_leases_run_out() -> None:
    with transaction() as session:
        session.execute(
            update(Task)
            .where(Task.lease_until.is_not(None))
            .values(lease_until=datetime.now(UTC) - timedelta(seconds=1))
        )


def charges(task: Task) -> list[Decimal]:
    with transaction() as session:
        query = select(LedgerEntry.amount).where(LedgerEntry.task_id == task.id)
        return list(session.scalars(query))


def test_an_id_has_the_one_public_form() -> None:
    made = tasks.new_id(datetime.fromtimestamp(1757165031, UTC))

    assert made.startswith("task-unified-1757165031-")
    assert tasks.is_id(made)
    assert len(made) == len("task-unified-1757165031-uyujaw3d")


@pytest.mark.parametrize("near", ["", "task-unified-1-ABCDEFGH", "task-unified--abcdefgh", "x\0"])
def test_what_is_almost_an_id_is_none(near: str) -> None:
    assert not tasks.is_id(near)


def test_submitting_reserves_and_charges_nothing(customer: Customer, submit: Submit) -> None:
    task = submit(customer)

    assert customer.books() == (1500, 15)
    assert charges(task) == []


def test_completing_charges_once(customer: Customer, submit: Submit) -> None:
    task = submit(customer)

    assert complete(claim()) is not None
    assert customer.books() == (1485, 0)
    assert charges(task) == [-15]


@pytest.mark.parametrize("end", [fail, hand_back, lose])
def test_no_other_move_charges(
    customer: Customer, submit: Submit, end: Callable[[Claim], Task | None]
) -> None:
    task = submit(customer)

    assert end(claim()) is not None
    assert customer.books()[0] == 1500
    assert charges(task) == []


def test_failing_gives_the_reservation_back(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    fail(claim())

    assert customer.books() == (1500, 0)
    assert customer.task(task.id).error_code == "GenerationFailed"


def test_the_price_is_the_one_of_submission(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    with transaction() as session:
        session.execute(update(Task).where(Task.id == task.id).values(price=Decimal("7.5")))
        session.execute(text("UPDATE accounts SET reserved = 7.5"))
    complete(claim())

    assert charges(task) == [Decimal("-7.5")]


@pytest.mark.parametrize("move", [complete, fail, hand_back, lose, renew])
def test_an_older_claim_can_do_nothing(
    customer: Customer, submit: Submit, move: Callable[[Claim], object]
) -> None:
    submit(customer)
    old = claim("given up for dead")
    let_leases_run_out()
    with transaction() as session:
        assert tasks.give_up(session, old) is not None
    new = claim("the next")

    assert not move(old)
    assert customer.books() == (1500, 15)
    assert renew(new)


@pytest.mark.parametrize("move", [complete, fail, hand_back, lose, renew])
@pytest.mark.parametrize("end", [complete, fail, lambda claim: cancel_of(claim)])
def test_what_has_ended_does_not_move_again(
    customer: Customer,
    submit: Submit,
    end: Callable[[Claim], object],
    move: Callable[[Claim], object],
) -> None:
    task = submit(customer)
    held = claim()
    end(held)
    ended = customer.task(task.id).status
    books = customer.books()

    assert not move(held)
    assert customer.task(task.id).status == ended
    assert customer.books() == books


def cancel_of(held: Claim) -> Task:
    with transaction() as session:
        return tasks.cancel(session, held.task_id)


def test_a_task_is_claimed_by_one_of_many_workers(customer: Customer, submit: Submit) -> None:
    submitted = {submit(customer).id for _ in range(20)}

    def claim_one(worker: int) -> str | None:
        with transaction() as session:
            task = tasks.claim_next(session, f"worker {worker}")
            return None if task is None else task.id

    with ThreadPoolExecutor(16) as pool:
        claimed = [found for found in pool.map(claim_one, range(40)) if found is not None]

    assert sorted(claimed) == sorted(submitted)


def test_of_two_ends_exactly_one_happens(customer: Customer, submit: Submit) -> None:
    for _ in range(10):
        task = submit(customer)
        held = claim()

        def end(move: Callable[[Claim], Task | None], held: Claim = held) -> bool:
            return move(held) is not None

        with ThreadPoolExecutor(8) as pool:
            ended = list(pool.map(end, [complete, fail] * 4))

        assert sum(ended) == 1
        assert len(charges(task)) == (customer.task(task.id).status is TaskStatus.COMPLETED)


def test_the_database_refuses_a_second_charge(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    submit(customer)
    complete(claim())

    ended = select(Task).where(Task.id == task.id).cte("ended")
    again = select(ended.c.id).add_cte(*ledger.settle(ended))

    with pytest.raises(IntegrityError, match="task_id"), transaction() as session:
        session.execute(again)


def test_a_lost_task_is_drawn_again_but_not_for_ever(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    for loss in range(1, settings.losses_max):
        assert lose(claim()) is not None
        assert customer.task(task.id).status is TaskStatus.PENDING
        assert customer.task(task.id).losses == loss

    lose(claim())

    assert customer.task(task.id).status is TaskStatus.FAILED
    assert customer.task(task.id).error_code == "WorkerLost"
    assert customer.books() == (1500, 0)


def test_handing_back_is_no_loss(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    for _ in range(settings.losses_max + 1):
        hand_back(claim())

    assert customer.task(task.id).status is TaskStatus.PENDING


def test_a_task_that_waits_again_keeps_its_turn_and_its_seed(
    customer: Customer, submit: Submit
) -> None:
    first, _second = submit(customer), submit(customer)
    hand_back(claim())

    with transaction() as session:
        again = tasks.claim_next(session, "the next")
    assert again is not None
    assert (again.id, again.seed, again.progress) == (first.id, first.seed, 0)


def test_progress_never_goes_back(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    held = claim()
    renew(held, 50)
    renew(held, 25)

    assert customer.task(task.id).progress == 50


def test_a_worker_that_renews_is_not_given_up(customer: Customer, submit: Submit) -> None:
    submit(customer)
    held = claim()
    let_leases_run_out()
    renew(held)

    with transaction() as session:
        assert tasks.expired(session, 10) == []
        assert tasks.give_up(session, held) is None


def test_cancelling_is_free_while_waiting_and_while_drawn(
    customer: Customer, submit: Submit
) -> None:
    cancel(submit(customer))
    drawn = submit(customer)
    claim()
    cancel(drawn)

    assert customer.books() == (1500, 0)


def test_cancelling_what_has_ended_says_so(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    complete(claim())

    with pytest.raises(TaskEnded):
        cancel(task)
    assert customer.books() == (1485, 0)


def test_nobody_cancels_the_task_of_another(
    customer: Customer, new_customer: NewCustomer, submit: Submit
) -> None:
    task = submit(customer)

    with pytest.raises(TaskNotFound):
        cancel(task, account_id=new_customer().id)
    assert customer.task(task.id).status is TaskStatus.PENDING


@pytest.mark.parametrize("end", [complete, fail, cancel_of])
def test_the_callback_is_owed_from_the_commit_that_ends_the_task(
    customer: Customer, submit: Submit, end: Callable[[Claim], object]
) -> None:
    task = submit(customer, callback_url=CALLBACK)
    held = claim()
    with transaction() as session:
        assert session.scalars(select(Delivery)).all() == []

    end(held)

    with transaction() as session:
        owed = session.scalars(select(Delivery)).one()
    assert (owed.task_id, owed.url) == (task.id, CALLBACK)


def test_without_a_callback_url_nothing_is_owed(customer: Customer, submit: Submit) -> None:
    submit(customer)
    complete(claim())

    with transaction() as session:
        assert session.scalars(select(Delivery)).all() == []


def test_what_an_image_takes_is_known_however_much_waits_or_failed_since(
    customer: Customer, submit: Submit
) -> None:
    for _ in range(4):
        submit(customer)
    complete(claim())
    fail(claim())

    with transaction() as session:
        mean_s, waiting = tasks.measured(session)

    assert mean_s is not None
    assert 0 < mean_s < 60
    assert waiting == 2
