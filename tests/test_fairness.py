"""Whose turn it is: fair between accounts, by the weight of their group, decided at the claim."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update

from storage import backlog, fairness, tasks
from storage.database import transaction
from storage.models import ImageFormat, Task, TaskStatus

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer


def submit(customer: Customer, times: int, side_px: int = 64) -> list[str]:
    request = tasks.ImageRequest("a cat", side_px, side_px, ImageFormat.PNG)
    submission = tasks.Submission(customer.id, customer.key_id, (request,), "test", Decimal(0))
    with transaction() as session:
        outcomes = tasks.submit_many(session, [submission] * times)
    return [made.tasks[0].id for made in outcomes if isinstance(made, tasks.Submitted)]


def claim_accounts(times: int) -> list[str]:
    """The accounts whose tasks the next claims take, in order."""
    claimed = []
    for _ in range(times):
        with transaction() as session:
            task = tasks.claim_next(session, "a worker")
        assert task is not None
        claimed.append(task.account_id)
    return claimed


def test_a_single_task_is_drawn_within_the_next_two_of_a_thousand(
    new_customer: NewCustomer,
) -> None:
    many, one = new_customer(), new_customer()
    submit(many, 1000)
    claim_accounts(10)
    submit(one, 1)

    assert one.id in claim_accounts(2)


def test_two_accounts_with_a_hundred_each_finish_within_one_task_of_each_other(
    new_customer: NewCustomer,
) -> None:
    first, second = new_customer(), new_customer()
    submit(first, 100)
    submit(second, 100)

    order = claim_accounts(200)

    last = {account: place for place, account in enumerate(order)}
    assert abs(last[first.id] - last[second.id]) == 1


def test_a_group_of_weight_three_gets_three_of_four(new_customer: NewCustomer) -> None:
    light, heavy = new_customer(), new_customer(user_group="heavy")
    submit(light, 100)
    submit(heavy, 100)

    drawn = Counter(claim_accounts(40))

    assert drawn[heavy.id] == pytest.approx(30, abs=1)


def test_an_account_that_was_idle_has_saved_nothing_up(new_customer: NewCustomer) -> None:
    busy, idle = new_customer(), new_customer()
    submit(busy, 50)
    claim_accounts(50)
    submit(idle, 20)
    submit(busy, 20)

    drawn = Counter(claim_accounts(20))

    assert drawn[idle.id] == pytest.approx(10, abs=1)


def test_a_larger_image_counts_for_more(new_customer: NewCustomer) -> None:
    small, large = new_customer(), new_customer()
    submit(small, 40, side_px=512)
    submit(large, 40, side_px=1024)

    drawn = Counter(claim_accounts(40))

    assert drawn[small.id] == pytest.approx(4 * drawn[large.id], abs=4)


def test_an_account_is_served_in_the_order_in_which_it_asked(new_customer: NewCustomer) -> None:
    customer = new_customer()
    asked = submit(customer, 1) + submit(customer, 3) + submit(customer, 1)

    claimed = []
    for _ in asked:
        with transaction() as session:
            task = tasks.claim_next(session, "a worker")
        assert task is not None
        claimed.append(task.id)

    assert claimed == asked


def test_an_unnamed_group_weighs_one() -> None:
    assert fairness.schedule(5.0, 2.0, 1.0, "no such group") == (5.0, 6.0)


def test_tags_follow_each_other_at_cost_over_weight() -> None:
    assert fairness.schedule(1.0, 4.0, 1.5, "heavy") == (4.0, 4.5)


def test_a_place_deep_in_the_queue_is_counted_from_the_nearest_mark(
    new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = new_customer()
    submit(customer, 3 * fairness.NEAR)
    with transaction() as session:
        waiting = tasks.newest(session, account_id=None, status=None, before=None, limit=1000)
    asked = sorted(waiting, key=lambda task: (task.fair_tag, task.id))
    # In any order, and with and without marks.
    for at in (2 * fairness.NEAR + 7, fairness.NEAR, fairness.NEAR - 1, 0):
        assert places([asked[at]]) == [at]
    assert places(asked) == list(range(len(asked)))
    monkeypatch.setattr(tasks, "WAITING_COUNT_MAX", 250)
    assert places(asked) == [min(250, place) for place in range(len(asked))]


def places(waiting: Sequence[Task]) -> list[int | None]:
    asked = [(task.account_id, task.id) for task in waiting]
    found = asyncio.run(tasks.find_many(asked))
    return [found[each].place for each in asked]


def test_what_comes_back_is_next_however_far_virtual_time_is(new_customer: NewCustomer) -> None:
    customer = new_customer()
    submit(customer, 30)
    with transaction() as session:
        first = tasks.claim_next(session, "a worker")
        assert first is not None
    claim_accounts(10)
    with transaction() as session:
        assert tasks.hand_back(session, tasks.claim_of(first)) is not None

        again = tasks.claim_next(session, "another worker")

    assert again is not None
    assert again.id == first.id


def test_what_another_process_gave_back_is_next_after_a_moment(new_customer: NewCustomer) -> None:
    customer = new_customer()
    submit(customer, 30)
    with transaction() as session:
        first = tasks.claim_next(session, "a worker")
    assert first is not None
    claim_accounts(10)
    with transaction() as session:  # as another process would, of which this one hears nothing
        session.execute(
            update(Task)
            .where(Task.id == first.id)
            .values(status=TaskStatus.PENDING, lease_until=None)
        )
    time.sleep(fairness.EVERYWHERE_S)

    with transaction() as session:
        again = tasks.claim_next(session, "a worker")

    assert again is not None
    assert again.id == first.id


def test_where_nothing_else_waits_what_came_back_is_found_at_once(
    new_customer: NewCustomer,
) -> None:
    customer = new_customer()
    submit(customer, 10)
    with transaction() as session:
        first = tasks.claim_next(session, "a worker")
    assert first is not None
    claim_accounts(9)
    with transaction() as session:
        session.execute(
            update(Task)
            .where(Task.id == first.id)
            .values(status=TaskStatus.PENDING, lease_until=None)
        )

    assert claim_accounts(1) == [customer.id]


def test_more_than_are_counted_are_added_up_from_what_the_accounts_have(
    new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(new_customer(), 12)
    submit(new_customer(), 9)
    claim_accounts(4)

    for counted_max in (10_000, 10):
        monkeypatch.setattr(backlog, "COUNTED_MAX", counted_max)
        places = backlog.Backlog(20)
        with transaction() as session:
            places.look(session)

        assert places.refusal(3) is None
        assert places.refusal(4) is not None
