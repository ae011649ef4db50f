"""The customer's library and command before the real service."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from zimage import (
    AsyncClient,
    Client,
    Conflict,
    Image,
    InsufficientCredits,
    InvalidRequest,
    NotFound,
    Timeout,
    Unauthenticated,
)
from zimage.command import main

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

ROOT = Path(__file__).parent.parent
T = TypeVar("T")
SMALL = "376x376"


def while_working(work: Callable[[], None], what: Callable[[], T]) -> T:
    """The result of `what`, done while a worker does what is enqueued."""
    with ThreadPoolExecutor(1) as pool:
        future: Future[T] = pool.submit(what)
        while not future.done():
            work()
            wait([future], timeout=0.02)
    return future.result()


@pytest.fixture
def client(server: str, customer: Customer) -> Iterator[Client]:
    with Client(customer.key, server) as client:
        yield client


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(server: str, customer: Customer, tmp_path: Path) -> dict[str, str]:
    """What a customer's shell sets, and nothing of whoever runs the tests."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT / "client" / "src"),
        "PYTHONUTF8": "1",
        "ZIMAGE_BASE_URL": server,
        "ZIMAGE_API_KEY": customer.key,
    }


@pytest.fixture
def zimage(environ: dict[str, str], tmp_path: Path) -> Run:
    """The command, run to its end in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zimage", *arguments],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_an_image_is_drawn_downloaded_checked_and_saved(
    client: Client, customer: Customer, work: Work, tmp_path: Path
) -> None:
    image = while_working(work, lambda: client.generate("a cat", size=SMALL, seed=7))
    assert image.task.seed == 7
    assert image.task.sha256 is not None
    assert image.task.size_bytes == len(image.data)
    assert image.save(tmp_path / "new" / "cat.png").read_bytes() == image.data
    assert image.data.startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["cat.png"]
    assert customer.books() == (1500 - 15, 0)


def test_an_image_is_drawn_for_an_event_loop(server: str, customer: Customer, work: Work) -> None:
    async def draw() -> Image:
        async with AsyncClient(customer.key, server) as client:
            return await client.generate("a cat", size=SMALL)

    assert while_working(work, lambda: asyncio.run(draw())).task.completed


def test_one_idempotency_key_draws_once(client: Client, customer: Customer, work: Work) -> None:
    first = client.create("a cat", size=SMALL, idempotency_key="only-one-cat-please")
    again = client.create("a cat", size=SMALL, idempotency_key="only-one-cat-please")
    assert (first.replayed, again.replayed) == (False, True)
    assert again.id == first.id
    with pytest.raises(Conflict):
        client.create("a dog", size=SMALL, idempotency_key="only-one-cat-please")
    work()
    image = client.generate("a cat", size=SMALL, idempotency_key="only-one-cat-please")
    assert image.task.id == first.id
    assert customer.books() == (1500 - 15, 0)


def test_events_show_a_task_from_its_beginning_to_its_end(client: Client, work: Work) -> None:
    created = client.create("a cat", size=SMALL)
    events = client.events(created.id)
    first = next(events)
    assert first.status == "pending"
    assert first.queue_position == 0
    work()
    *_, last = events
    assert last.completed
    assert last == client.get(created.id)


def test_waiting_for_no_time_at_all_is_a_look(client: Client) -> None:
    created = client.create("a cat", size=SMALL)
    for timeout_s in (0, -1, 0.01):
        with pytest.raises(Timeout, match="is still pending"):
            client.wait(created.id, timeout_s)


def test_a_task_is_cancelled_once_and_for_all(client: Client, customer: Customer) -> None:
    created = client.create("a cat", size=SMALL)
    assert client.cancel(created.id).cancelled
    assert client.cancel(created.id).cancelled
    assert client.wait(created.id).cancelled
    assert customer.books() == (1500, 0)


def test_a_task_that_is_not_drawn_in_time_is_cancelled_by_the_service(client: Client) -> None:
    assert client.create("a cat", size=SMALL, cancel_after=90).can_cancel
    with pytest.raises(InvalidRequest, match="Cancel-After"):
        client.create("a cat", size=SMALL, cancel_after="soon")


def test_a_quote_costs_nothing(client: Client, customer: Customer) -> None:
    quote = client.quote(size=SMALL)
    assert (int(quote.credits), int(quote.available)) == (15, 1500)
    assert quote.affordable
    assert customer.books() == (1500, 0)
    assert client.list().total == 0


def test_tasks_are_listed_and_looked_up_together(client: Client, work: Work) -> None:
    ids = [client.create("a cat", size=SMALL).id for _ in range(3)]
    client.cancel(ids[0])
    work()
    page = client.list(status="completed", page_size=1)
    assert (page.total, len(page.tasks), page.tasks[0].id) == (2, 1, ids[2])
    assert page.tasks[0].credits_used == 15
    found = client.batch([*ids, "task-unified-1757165031-nobodys0"])
    assert {task.id: task.completed for task in found} == dict(
        zip(ids, [False, True, True], strict=True)
    )


def test_credits_are_what_is_left(client: Client, work: Work) -> None:
    client.create("a cat", size=SMALL)
    work()
    found = client.credits()
    assert (int(found.remaining), int(found.used)) == (1485, 15)


def test_refusals_say_what_was_refused(
    server: str, client: Client, new_customer: NewCustomer
) -> None:
    with Client("zk_wrong", server) as stranger, pytest.raises(Unauthenticated) as raised:
        stranger.create("a cat")
    assert raised.value.code == "unauthorized"
    with Client(new_customer(0).key, server) as poor, pytest.raises(InsufficientCredits):
        poor.create("a cat")
    with pytest.raises(InvalidRequest, match="width and height") as raised_too:
        client.create("a cat", size="200x200")
    assert raised_too.value.request_id
    with pytest.raises(NotFound):
        client.get("task-unified-1757165031-nobodys0")


def test_the_command_shows_cancels_and_lists_tasks(zimage: Run, client: Client) -> None:
    created = client.create("a cat", size=SMALL)
    assert "pending" in zimage("status", created.id).stdout
    said = json.loads(zimage("status", created.id, "--json").stdout)
    assert (said["id"], said["status"]) == (created.id, "pending")
    assert "cancelled" in zimage("cancel", created.id).stdout
    names, *lines = zimage("tasks").stdout.splitlines()
    assert names.split("\t")[:2] == ["task", "status"]
    assert [line.split("\t")[:2] for line in lines] == [[created.id, "failed"]]
    assert json.loads(zimage("tasks", "--json", "--status", "completed").stdout)["data"] == []


def test_the_command_shows_credits(zimage: Run) -> None:
    assert "1500" in zimage("credits").stdout
    said = json.loads(zimage("credits", "--json").stdout)
    assert said["data"]["user"]["remaining_credits"] == 1500


def test_the_command_fails_in_one_line(
    environ: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["status", "task-unified-1757165031-nobodys0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("zimage: task_not_found: ")
    assert "HTTP 404, request " in said
    assert said.count("\n") == 1
    monkeypatch.setenv("ZIMAGE_API_KEY", "clé")
    assert main(["credits"]) == 1
    assert capsys.readouterr().err.startswith("zimage: The API key")
    monkeypatch.delenv("ZIMAGE_API_KEY")
    monkeypatch.delenv("DASHSCOPE_API_KEY", raising=False)
    assert main(["credits"]) == 1
    assert capsys.readouterr().err.endswith("zimage: no API key was found\n")


def test_the_skills_call_is_answered_by_this_service(
    zimage: Run, customer: Customer, work: Work, tmp_path: Path
) -> None:
    asked = json.dumps({"prompt": "a cat", "size": "512*512", "seed": 7})
    ran = while_working(work, lambda: zimage("generate", "--request", asked, "--print-response"))
    assert (ran.returncode, ran.stderr) == (0, "")
    said = json.loads(ran.stdout)
    assert (said["width"], said["height"], said["prompt"]) == (512, 512, "a cat")
    saved = tmp_path / "output/ai-image-zimage-turbo/images/output.png"
    assert saved.read_bytes().startswith(b"\x89PNG")
    assert customer.books() == (1500 - 15, 0)
    ran = zimage("generate", "--request", '{"prompt": "a cat", "size": "1*1"}')
    assert ran.returncode == 1
    assert ran.stderr.startswith("zimage: InvalidParameter: ")
