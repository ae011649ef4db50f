"""Whose turn it is: fair between accounts, by the weight of their group, decided at the claim."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from storage import fairness, tasks
from storage.database import transaction
from storage.models import ImageFormat

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
