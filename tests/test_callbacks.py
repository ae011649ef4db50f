"""A finished task is told to the customer's HTTPS URL: signed, retried, and to nobody inside."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from sqlalchemy import select, update
from standardwebhooks import Webhook

from api import callbacks, egress
from api.courier import Courier
from storage import accounts, deliveries, sealing
from storage.database import transaction
from storage.deliveries import Attempt
from storage.models import Account, Delivery, DeliveryState, Task

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

RECEIVER_HOST = "127.0.0.2"  # the one that conftest lets callbacks reach


@dataclass
class Heard:
    """One request that a receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes
    at_s: float = field(default_factory=time.monotonic)


class Receiver:
    """A real HTTPS server that answers what it is told to, and remembers what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.heard: list[Heard] = []
        self.answers: Callable[[Heard], tuple[int, dict[str, str]]] = lambda _: (200, {})
        self._changed = threading.Condition()

    def hear(self, heard: Heard) -> tuple[int, dict[str, str]]:
        with self._changed:
            self.heard.append(heard)
            self._changed.notify_all()
        return self.answers(heard)

    def wait_for(self, times: int) -> list[Heard]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.heard) >= times, timeout=30)
            return list(self.heard)


@contextmanager
def receiving(authority: trustme.CA, *names: str) -> Iterator[Receiver]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, more = told.hear(Heard(self.path, headers, body))
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((RECEIVER_HOST, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or (RECEIVER_HOST,))).configure_cert(context)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    told = Receiver(f"https://{RECEIVER_HOST}:{server.server_port}/told")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """The authority that the courier of these tests trusts."""
    from tests import conftest

    return conftest.authority


@pytest.fixture
def receiver(authority: trustme.CA) -> Iterator[Receiver]:
    with receiving(authority) as receiver:
        yield receiver


@pytest.fixture
def courier() -> Iterator[None]:
    """The courier, as its process runs it."""
    with couriers(1):
        yield


@contextmanager
def couriers(copies: int) -> Iterator[None]:
    running: list[tuple[asyncio.AbstractEventLoop, Courier]] = []
    threads = []
    for _ in range(copies):
        started = threading.Event()

        def run(started: threading.Event = started) -> None:
            async def deliver() -> None:
                courier = Courier()
                running.append((asyncio.get_running_loop(), courier))
                started.set()
                await courier.run()

            asyncio.run(deliver())

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        started.wait()
    try:
        yield
    finally:
        for loop, courier in running:
            loop.call_soon_threadsafe(courier.stop)
        for thread in threads:
            thread.join()


def delivery_of(task: Task) -> Delivery:
    with transaction() as session:
        return session.scalars(select(Delivery).where(Delivery.task_id == task.id)).one()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_task_is_told_with_the_answer_of_the_task_query(
    customer: Customer, work: Work, receiver: Receiver, courier: None
) -> None:
    body = {
        "model": "z-image-turbo",
        "prompt": "a cat",
        "size": "400x400",
        "callback_url": receiver.url,
    }
    task_id = customer.http.post("/v1/images/generations", json=body).json()["id"]
    work()
    (heard,) = receiver.wait_for(1)

    assert heard.path == "/told"
    assert heard.headers["content-type"] == "application/json"
    assert heard.body == customer.http.get(f"/v1/tasks/{task_id}").content
    assert json.loads(heard.body)["status"] == "completed"
    wait_until(lambda: delivery_of(customer.task(task_id)).state is DeliveryState.DELIVERED)


def test_the_signature_is_verified_by_the_standard_webhooks_package(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver, courier: None
) -> None:
    submit(customer, callback_url=receiver.url)
    work()
    (heard,) = receiver.wait_for(1)

    secret = customer.http.get("/v1/callbacks/secret").json()["key"]
    assert Webhook(secret).verify(heard.body, heard.headers) == json.loads(heard.body)


def test_a_replaced_secret_signs_beside_the_new_one(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver, courier: None
) -> None:
    old = customer.http.get("/v1/callbacks/secret").json()["key"]
    new = customer.http.post("/v1/callbacks/secret/rotate").json()["key"]
    submit(customer, callback_url=receiver.url)
    work()
    (heard,) = receiver.wait_for(1)

    assert old != new
    for secret in (old, new):
        Webhook(secret).verify(heard.body, heard.headers)


def test_after_the_overlap_the_replaced_secret_signs_no_more(
    customer: Customer, submit: Submit, work: Work
) -> None:
    with transaction() as session:
        account = accounts.rotate_callback_secret(session, customer.id, overlap=timedelta(0))
    submit(customer, callback_url="https://203.0.113.7/told")
    work()
    with transaction() as session:
        (attempt,) = deliveries.claim_due(session, limit=1, except_accounts=[])

    assert attempt.secrets == (account.sealed_callback_secret,)


def test_a_secret_that_cannot_be_opened_holds_up_nobody_else_and_uses_up_no_attempt(
    new_customer: NewCustomer, submit: Submit, work: Work, receiver: Receiver, courier: None
) -> None:
    locked_out, another = new_customer(), new_customer()
    with transaction() as session:
        session.get_one(Account, locked_out.id).sealed_callback_secret = sealing.MARK + "of another"
    waits = submit(locked_out, callback_url=receiver.url)
    submit(another, callback_url=receiver.url)

    work()

    receiver.wait_for(1)
    delivery = delivery_of(waits)
    assert (delivery.state, delivery.attempts) == (DeliveryState.WAITING, 0)


def test_the_signature_of_the_known_example() -> None:
    """Computed apart from this code: HMAC-SHA256 with the key bytes 0x00 to 0x1f."""
    attempt = Attempt(
        Delivery(id="msg_example0001"),
        Task(),
        ("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",),
    )
    body = b'{"id":"task-unified-1757165031-uyujaw3d","status":"completed"}'

    assert callbacks.sign(attempt, body, datetime.fromtimestamp(1757165041, UTC)) == {
        "webhook-id": "msg_example0001",
        "webhook-timestamp": "1757165041",
        "webhook-signature": "v1,YJ+vL1mQ723Mdf4w3+31FIq/jMF6820MVv+ytTDuURI=",
    }


def test_a_receiver_that_fails_is_called_four_times_after_1_2_and_4_seconds(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver, courier: None
) -> None:
    receiver.answers = lambda _: (500, {})
    task = submit(customer, callback_url=receiver.url)
    work()
    heard = receiver.wait_for(4)
    wait_until(lambda: delivery_of(task).state is DeliveryState.GAVE_UP)

    # The pauses are the contract, not a speed: none may be shorter.
    pauses = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(heard)]
    assert all(pause >= least for pause, least in zip(pauses, (1, 2, 4), strict=True))
    assert len({each.headers["webhook-id"] for each in heard}) == 1
    assert len({each.headers["webhook-timestamp"] for each in heard}) == 4
    assert len(receiver.heard) == 4
    assert delivery_of(task).last_status == 500


def test_a_receiver_that_recovers_is_told_once_more_and_no_further(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver, courier: None
) -> None:
    receiver.answers = lambda _: (503, {}) if len(receiver.heard) == 1 else (204, {})
    task = submit(customer, callback_url=receiver.url)
    work()
    receiver.wait_for(2)

    wait_until(lambda: delivery_of(task).state is DeliveryState.DELIVERED)
    assert delivery_of(task).attempts == 2


def test_a_redirect_is_a_failure_and_is_not_followed(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver, courier: None
) -> None:
    receiver.answers = lambda _: (302, {"location": receiver.url + "/elsewhere"})
    task = submit(customer, callback_url=receiver.url)
    work()
    receiver.wait_for(1)
    wait_until(lambda: delivery_of(task).attempts >= 1)

    assert delivery_of(task).last_error == "answered 302"
    assert {heard.path for heard in receiver.heard} == {"/told"}


def test_a_certificate_of_another_name_is_not_trusted(
    customer: Customer, submit: Submit, work: Work, authority: trustme.CA, courier: None
) -> None:
    with receiving(authority, "somebody-else.example") as receiver:
        task = submit(customer, callback_url=receiver.url)
        work()
        wait_until(lambda: delivery_of(task).attempts >= 1)

    assert "certificate" in (delivery_of(task).last_error or "")
    assert receiver.heard == []


def test_an_address_that_is_no_longer_public_is_refused_at_the_attempt(
    customer: Customer, submit: Submit, work: Work, courier: None
) -> None:
    task = submit(customer, callback_url="https://localhost/told")
    work()

    wait_until(lambda: delivery_of(task).state is DeliveryState.GAVE_UP)
    assert delivery_of(task).last_error == "localhost is not a public address"
    assert delivery_of(task).attempts == 1


@pytest.mark.parametrize(
    ("address", "callable_"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        (RECEIVER_HOST, True),
        ("127.0.0.1", False),
        ("100.64.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("fec0::1", False),
        ("::", False),
    ],
)
def test_which_addresses_may_be_called(address: str, callable_: bool) -> None:
    assert egress.is_callable(ip_address(address)) is callable_


def test_a_slow_customer_delays_nobody_else(
    customer: Customer,
    new_customer: NewCustomer,
    submit: Submit,
    work: Work,
    authority: trustme.CA,
    receiver: Receiver,
    courier: None,
) -> None:
    slow = new_customer()
    released = threading.Event()
    with receiving(authority) as hanging:

        def hang(_: Heard) -> tuple[int, dict[str, str]]:
            released.wait(30)
            return 200, {}

        hanging.answers = hang
        for _ in range(30):
            submit(slow, callback_url=hanging.url)
        work()
        hanging.wait_for(30)
        submit(customer, callback_url=receiver.url)
        work()
        receiver.wait_for(1)
        assert not released.is_set()
        released.set()


def test_several_couriers_tell_each_task_once(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver
) -> None:
    for _ in range(20):
        submit(customer, callback_url=receiver.url)
    work()
    with couriers(3):
        receiver.wait_for(20)
        wait_until(lambda: states() == {DeliveryState.DELIVERED})

    assert len(receiver.heard) == 20
    assert len({heard.headers["webhook-id"] for heard in receiver.heard}) == 20


def states() -> set[DeliveryState]:
    with transaction() as session:
        return set(session.scalars(select(Delivery.state)))


def test_what_a_courier_took_before_it_died_is_told_by_the_next(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver
) -> None:
    task = submit(customer, callback_url=receiver.url)
    work()
    with transaction() as session:
        (dead,) = deliveries.claim_due(session, limit=10, except_accounts=[])
        assert deliveries.claim_due(session, limit=10, except_accounts=[]) == []
    with transaction() as session:  # its lease runs out
        session.execute(update(Delivery).values(next_attempt_at=datetime.now(UTC)))
    with couriers(1):
        receiver.wait_for(1)
        wait_until(lambda: delivery_of(task).state is DeliveryState.DELIVERED)

    assert delivery_of(task).attempts == 1
    with transaction() as session:  # and if the dead one was only slow, it reports in vain
        late = deliveries.record(session, dead.delivery, status=500, error="late", final=False)
    assert late is None
    assert delivery_of(task).last_status == 200


def test_an_account_at_its_share_of_the_courier_has_no_more_taken(
    customer: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    other = new_customer()
    submit(customer, callback_url="https://203.0.113.7/told")
    submit(other, callback_url="https://203.0.113.7/told")
    work()
    with transaction() as session:
        taken = deliveries.claim_due(session, limit=10, except_accounts=[customer.id])
        left_s = deliveries.next_due_in_s(session, except_accounts=[customer.id])

    assert [attempt.delivery.account_id for attempt in taken] == [other.id]
    assert left_s is not None
    assert left_s > 0


def test_a_receiver_that_hangs_holds_up_no_other_of_the_same_account(
    customer: Customer, submit: Submit, work: Work
) -> None:
    submit(customer, callback_url="https://203.0.113.7/told")
    submit(customer, callback_url="https://203.0.113.8:8443/told?a/b")
    work()
    busy = f"{customer.id} 203.0.113.7"
    with transaction() as session:
        (taken,) = deliveries.claim_due(
            session, limit=10, except_accounts=[], except_receivers=[busy]
        )
        left_s = deliveries.next_due_in_s(
            session, except_accounts=[], except_receivers=[busy, taken.receiver]
        )

    assert taken.receiver == f"{customer.id} 203.0.113.8:8443"
    assert left_s is None


def test_attempts_that_end_together_are_noted_together_each_as_it_ended(
    customer: Customer, submit: Submit, work: Work
) -> None:
    for _ in range(3):
        submit(customer, callback_url="https://203.0.113.7/told")
    work()
    with transaction() as session:
        taken = deliveries.claim_due(session, limit=10, except_accounts=[])
    told, failed, refused = [attempt.delivery for attempt in taken]
    ends = [
        deliveries.End(told, 200, None, final=False),
        deliveries.End(failed, 500, "answered 500", final=False),
        deliveries.End(refused, None, "not a public address", final=True),
    ]
    with transaction() as session:
        became = deliveries.record_many(session, ends)
    with transaction() as session:
        again = deliveries.record_many(session, ends[2:])

    assert became == [DeliveryState.DELIVERED, DeliveryState.WAITING, DeliveryState.GAVE_UP]
    assert again == [None]


def test_a_cancelled_task_is_told_as_well(
    customer: Customer, submit: Submit, receiver: Receiver, courier: None
) -> None:
    task = submit(customer, callback_url=receiver.url)
    customer.http.post(f"/v1/tasks/{task.id}/cancel")
    (heard,) = receiver.wait_for(1)

    told = json.loads(heard.body)
    assert (told["status"], told["error"]["code"]) == ("failed", "request_cancelled")


def test_secrets_differ_between_accounts(new_customer: NewCustomer) -> None:
    with transaction() as session:
        new_customer()
        new_customer()
        secrets = [account.callback_secret for account in session.scalars(select(Account))]
    assert len(set(secrets)) == len(secrets) == 2


# --- The delivery log -----------------------------------------------------------------------------


def log(customer: Customer, **query: str) -> list[dict[str, Any]]:
    answer = customer.http.get("/v1/callbacks", params=query)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def told_task(customer: Customer, submit: Submit, work: Work, url: str) -> Task:
    task = submit(customer, callback_url=url)
    work()
    return task


@pytest.mark.usefixtures("courier")
def test_the_log_shows_each_attempt(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver
) -> None:
    answers = iter([503, 200])
    receiver.answers = lambda _: (next(answers), {})
    task = told_task(customer, submit, work, receiver.url)
    receiver.wait_for(2)
    wait_until(lambda: states() == {DeliveryState.DELIVERED})

    (row,) = log(customer)

    assert row == {
        "id": receiver.heard[0].headers["webhook-id"],
        "task_id": task.id,
        "url": receiver.url,
        "state": "delivered",
        "attempts": [
            {"at": row["attempts"][0]["at"], "status": 503, "error": "answered 503"},
            {"at": row["attempts"][1]["at"], "status": 200, "error": None},
        ],
        "created_at": row["created_at"],
        "delivered_at": row["delivered_at"],
        "next_attempt_at": None,
    }
    moments = [row["created_at"], *(attempt["at"] for attempt in row["attempts"])]
    assert moments == sorted(moments)
    assert datetime.fromisoformat(row["delivered_at"]).tzinfo


def test_a_callback_that_waits_says_when_it_is_due(
    customer: Customer, submit: Submit, work: Work
) -> None:
    told_task(customer, submit, work, f"https://{RECEIVER_HOST}/told")

    (row,) = log(customer)

    assert (row["state"], row["attempts"], row["delivered_at"]) == ("waiting", [], None)
    assert datetime.fromisoformat(row["next_attempt_at"]) <= datetime.now(UTC)


def test_the_log_is_asked_by_task_by_state_and_by_time(
    customer: Customer, submit: Submit, work: Work
) -> None:
    made = [told_task(customer, submit, work, f"https://{RECEIVER_HOST}/told") for _ in range(3)]
    rows = log(customer)
    assert [row["task_id"] for row in rows] == [task.id for task in reversed(made)]
    newest, middle, oldest = rows
    with transaction() as session:
        session.execute(
            update(Delivery).where(Delivery.id == oldest["id"]).values(state=DeliveryState.GAVE_UP)
        )

    def ids(**query: str) -> list[str]:
        return [row["id"] for row in log(customer, **query)]

    assert ids(task_id=made[1].id) == [middle["id"]]
    assert ids(state="gave_up") == [oldest["id"]]
    assert ids(since=middle["created_at"]) == [newest["id"], middle["id"]]
    assert ids(until=middle["created_at"]) == [oldest["id"]]
    assert ids(since=middle["created_at"], until=newest["created_at"]) == [middle["id"]]
    assert ids(task_id="task-unified-1757165031-uyujaw3d") == []

    first = customer.http.get("/v1/callbacks", params={"limit": 2}).json()
    rest = customer.http.get("/v1/callbacks", params={"cursor": first["next_cursor"]}).json()
    assert [row["id"] for row in first["data"] + rest["data"]] == [row["id"] for row in rows]
    assert rest["next_cursor"] is None


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"task_id": "x"}, 400),
        ({"task_id": "task-unified-\0"}, 400),
        ({"state": "lost"}, 400),
        ({"since": "yesterday"}, 400),
        ({"since": "2026-11-01T00:00:00"}, 400),
        ({"until": "0.5"}, 400),
        ({"limit": "0"}, 400),
        ({"limit": "101"}, 400),
        ({"cursor": "x"}, 400),
    ],
)
def test_what_the_log_cannot_be_asked(
    customer: Customer, query: dict[str, str], status: int
) -> None:
    answer = customer.http.get("/v1/callbacks", params=query)

    assert answer.status_code == status
    assert "error" in answer.json()


@pytest.mark.usefixtures("courier")
def test_a_callback_is_told_again_under_the_same_id_and_signed_anew(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver
) -> None:
    task = told_task(customer, submit, work, receiver.url)
    receiver.wait_for(1)
    wait_until(lambda: states() == {DeliveryState.DELIVERED})
    (row,) = log(customer)
    with transaction() as session:
        secret = session.get_one(Account, customer.id).callback_secret

    answer = customer.http.post(f"/v1/callbacks/{row['id']}/redeliver")
    first, second = receiver.wait_for(2)
    wait_until(lambda: len(log(customer)[0]["attempts"]) == 2)

    assert answer.status_code == 200
    assert answer.json()["id"] == row["id"]
    assert answer.json()["state"] == "waiting"
    assert second.headers["webhook-id"] == first.headers["webhook-id"] == row["id"]
    assert second.body == first.body
    assert int(second.headers["webhook-timestamp"]) >= int(first.headers["webhook-timestamp"])
    assert json.loads(second.body)["id"] == task.id
    Webhook(secret).verify(second.body, second.headers)
    (again,) = log(customer)
    assert [attempt["status"] for attempt in again["attempts"]] == [200, 200]


@pytest.mark.usefixtures("courier")
def test_callbacks_of_a_time_range_are_told_again(
    customer: Customer, submit: Submit, work: Work, receiver: Receiver
) -> None:
    for _ in range(3):
        told_task(customer, submit, work, receiver.url)
    receiver.wait_for(3)
    wait_until(lambda: states() == {DeliveryState.DELIVERED})
    newest, middle, _ = log(customer)

    answer = customer.http.post("/v1/callbacks/redeliver", json={"since": middle["created_at"]})
    heard = receiver.wait_for(5)

    assert [row["id"] for row in answer.json()["data"]] == [middle["id"], newest["id"]]
    again = {each.headers["webhook-id"] for each in heard[3:]}
    assert again == {middle["id"], newest["id"]}


def test_a_callback_that_waits_already_is_left_as_it_is(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = told_task(customer, submit, work, f"https://{RECEIVER_HOST}/told")
    before = delivery_of(task)

    answer = customer.http.post(f"/v1/callbacks/{before.id}/redeliver")

    assert answer.json()["state"] == "waiting"
    assert delivery_of(task).next_attempt_at == before.next_attempt_at


def test_another_customers_callbacks_are_as_unknown_as_none(
    customer: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    task = told_task(customer, submit, work, f"https://{RECEIVER_HOST}/told")
    other = new_customer()

    assert log(other) == []
    assert log(other, task_id=task.id) == []
    for delivery_id in (delivery_of(task).id, "msg_" + "0" * 32, "msg_x", "%00"):
        answer = other.http.post(f"/v1/callbacks/{delivery_id}/redeliver")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "callback_not_found"
    told = other.http.post("/v1/callbacks/redeliver", json={"task_id": task.id})
    assert told.json() == {"data": []}


@pytest.mark.parametrize(
    "body", [{}, {"task_id": "x"}, {"state": "lost"}, {"since": "now"}, {"until": 1700000000}]
)
def test_what_cannot_be_told_again(customer: Customer, body: dict[str, str]) -> None:
    answer = customer.http.post("/v1/callbacks/redeliver", json=body)

    assert answer.status_code == 400
