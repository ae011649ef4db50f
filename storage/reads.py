"""Statements that only read, on the event loop, outside of any transaction: each is one round trip,
and sees what is committed when it begins.
"""

import atexit
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg.rows import dict_row

from storage import database
from storage.driver import GIVE_UP_S, connect, is_gone, on_loop

Row = dict[str, Any]
Cursor = psycopg.Cursor[Row]

_idle: list[Cursor] = []
"""Each with a connection of its own, kept for the next statement. To make a cursor for each would
take a third of its time."""


async def rows(statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[Row]:
    """The rows of `statement`, each by the names of its columns.

    Raises: ServiceUnavailable, as `database.transaction` does.
    """
    return await on_loop(_rows, statement, parameters)


def _rows(statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[Row]:
    with database.asking():
        cursor = _kept() or _new()
        try:
            return cursor.execute(statement, parameters).fetchall()
        finally:
            if not cursor.connection.closed:
                _idle.append(cursor)


def _kept() -> Cursor | None:
    while _idle:
        cursor = _idle.pop()
        if not is_gone(cursor.connection):
            return cursor
        cursor.connection.close()
    return None


def _new() -> Cursor:
    """Raises: psycopg.OperationalError."""
    connection = connect(database.address())
    connection.autocommit = connection.may_wait_on_loop = True
    connection.give_up_after_s = GIVE_UP_S
    return connection.cursor(row_factory=dict_row)


@atexit.register
def close() -> None:
    """End the connections that are kept."""
    while _idle:
        _idle.pop().connection.close()
