"""What is asked on the event loop holds up nobody on it, and is given up where nobody answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import pytest
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from storage import driver, queue, reads
from storage.database import transaction
from storage.driver import on_loop
from storage.errors import ServiceUnavailable
from storage.scripts import Script
from storage.silence import Silence

Look = Callable[[str], Coroutine[Any, Any, object]]
ECHO = "return {KEYS[1], ARGV[1]}"


def ask(statement: str) -> object:
    with transaction() as session:
        return session.scalar(text(statement))


async def ticks_during(work: asyncio.Future[object]) -> int:
    """How often the loop turned while `work` was waited for."""
    ticks = 0
    while not work.done():
        await asyncio.sleep(0.01)
        ticks += 1
    return ticks


async def read(statement: str) -> object:
    (row,) = await reads.rows(statement, [])
    return next(iter(row.values()))


async def transact(statement: str) -> object:
    return await on_loop(ask, statement)


@pytest.mark.parametrize("look", [read, transact])
def test_the_loop_goes_on_while_the_database_works(look: Look) -> None:
    async def run() -> tuple[int, object]:
        asked = asyncio.ensure_future(look("SELECT 1 FROM pg_sleep(0.3)"))
        return await ticks_during(asked), asked.result()

    ticks, answer = asyncio.run(run())
    assert ticks >= 5
    assert answer == 1


def test_a_slow_statement_of_a_server_that_lives_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "ANSWER_S", 0.1)
    assert asyncio.run(read("SELECT 1 FROM pg_sleep(0.6)")) == 1


@pytest.mark.parametrize("look", [read, transact])
def test_a_statement_that_hangs_is_given_up(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ANSWER_S", 0.1)
    monkeypatch.setattr(driver, "GIVE_UP_S", 0.3)
    monkeypatch.setattr(reads, "GIVE_UP_S", 0.3)
    reads.close()  # those that are idle have the longer bound
    with pytest.raises(ServiceUnavailable) as refused:
        asyncio.run(look("SELECT pg_sleep(20)"))
    assert "does not answer" in str(refused.value.__cause__)
    assert asyncio.run(look("SELECT 1")) == 1


def test_whoever_waits_no_longer_leaves_no_answer_for_the_next() -> None:
    async def run() -> object:
        asked = asyncio.ensure_future(read("SELECT 1 FROM pg_sleep(20)"))
        await asyncio.sleep(0.1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return await read("SELECT 2")

    assert asyncio.run(run()) == 2


@pytest.mark.parametrize("look", [read, transact])
def test_a_statement_that_is_refused_says_why_and_its_connection_goes_on(look: Look) -> None:
    backend = asyncio.run(look("SELECT pg_backend_pid()"))

    with pytest.raises((DBAPIError, psycopg.Error), match="division by zero"):
        asyncio.run(look("SELECT 1 / 0"))

    assert asyncio.run(look("SELECT pg_backend_pid()")) == backend


def test_a_connection_that_was_cut_costs_nobody_an_error() -> None:
    backend = asyncio.run(read("SELECT pg_backend_pid()"))
    assert ask(f"SELECT pg_terminate_backend({backend}, 5000)") is True

    assert asyncio.run(read("SELECT 3")) == 3


def test_the_first_who_connect_at_once_do_not_wait_for_each_other_for_ever() -> None:
    """In a process of its own: SQLAlchemy asks more of the first connection, under a lock."""
    program = """
import asyncio
from tests.test_on_loop import ask
from storage.driver import on_loop

async def run():
    async with asyncio.timeout(20):
        print(await asyncio.gather(*(on_loop(ask, f"SELECT {n}") for n in range(3))))

asyncio.run(run())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr) == ("[0, 1, 2]\n", "")


def test_a_script_is_brought_to_a_redis_that_does_not_know_it() -> None:
    script = Script(ECHO)

    async def run() -> object:
        await script.run(["a"], [1])
        queue.connection.script_flush()
        return await script.run(["b"], [2])

    assert asyncio.run(run()) == [b"b", b"2"]


def test_a_script_outlives_its_connection() -> None:
    script = Script(ECHO)

    async def run() -> object:
        await script.run(["a"], [1])
        # Its own connection is not of those that the client knows: all of this kind are cut.
        for client in queue.connection.client_list(_type="normal"):
            if client["cmd"].startswith("evalsha"):
                queue.connection.client_kill_filter(_id=client["id"])
        return await script.run(["b"], [2])

    assert asyncio.run(run()) == [b"b", b"2"]


def test_a_redis_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(queue, "server", Silence())  # of its own: nobody else is to hear of it
    script = Script(ECHO)

    async def run() -> tuple[int, object]:
        await script.run(["a"], [1])
        queue.connection.client_pause(1000)
        asked = asyncio.ensure_future(script.run(["b"], [2]))
        return await ticks_during(asked), asked.exception()

    ticks, error = asyncio.run(run())
    assert ticks >= 3
    assert isinstance(error, RedisError)
    monkeypatch.undo()
    queue.connection.ping()  # which is answered once the pause is over
    assert asyncio.run(script.run(["c"], [3])) == [b"c", b"3"]
