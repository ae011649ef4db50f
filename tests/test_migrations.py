"""The migrations make what the models say, undo it, and may run beside a service at work."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alembic.command
import pytest
from alembic.config import Config
from sqlalchemy import event, inspect, text, update
from sqlalchemy.exc import OperationalError

from storage import ledger, repair, tasks
from storage.database import engine, transaction
from storage.models import Base, Task
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer

    Submit = Callable[..., Task]

ROOT = Path(__file__).parent.parent
CONFIG = Config(toml_file=ROOT / "pyproject.toml")
RELEASE = "0003"
"""The last revision of the release before this one, 0.3, whose processes still run while a service
is upgraded."""
RELEASE_SQL = Path(__file__).parent / "release_0_3.sql"
REWRITTEN = {("accounts", "callback_secret"), ("accounts", "callback_secret_before")}
"""What this release writes otherwise, and the way back undoes."""
FINAL = {"0001", "0002", "0003"}
"""Revisions that were released before this rule."""


def work_as_the_release_before() -> None:
    """All that it writes, commit by commit."""
    with engine.connect() as connection:
        for commit in RELEASE_SQL.read_text().split("\n\n")[1:]:
            connection.exec_driver_sql(commit)
            connection.commit()


@pytest.fixture
def _up_again() -> Iterator[None]:
    yield
    alembic.command.upgrade(CONFIG, "head")


@contextmanager
def locked(table: str, mode: str) -> Iterator[None]:
    """Somebody holds this lock, and migrations wait for a moment only."""

    def hurry(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return statement.replace("lock_timeout = '5s'", "lock_timeout = '50ms'"), parameters

    event.listen(engine, "before_cursor_execute", hurry, retval=True)
    try:
        with engine.begin() as connection:
            connection.execute(text(f"LOCK TABLE {table} IN {mode} MODE"))
            yield
    finally:
        event.remove(engine, "before_cursor_execute", hurry)


def revision() -> str:
    with engine.connect() as connection:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def columns() -> dict[tuple[str, str], tuple[bool, object]]:
    """For each (table, column): whether it may be NULL, and its default."""
    with engine.connect() as connection:
        look = inspect(connection)
        return {
            (table, column["name"]): (
                column["nullable"],
                column["default"] or column.get("identity"),
            )
            for table in look.get_table_names()
            for column in look.get_columns(table)
        }


def rows(of: dict[tuple[str, str], tuple[bool, object]]) -> dict[str, list[Any]]:
    """What is in these columns."""
    found = {}
    with engine.connect() as connection:
        for table in sorted({table for table, _ in of} - {"alembic_version"}):
            named = ", ".join(sorted(column for each, column in of if each == table))
            query = text(f"SELECT {named} FROM {table} ORDER BY id")
            found[table] = connection.execute(query).all()
    return {table: [tuple(row) for row in each] for table, each in found.items()}


def test_the_models_and_the_migrations_agree() -> None:
    alembic.command.check(CONFIG)


def test_down_and_up_again() -> None:
    alembic.command.downgrade(CONFIG, "base")
    try:
        assert not set(inspect(engine).get_table_names()) & set(Base.metadata.tables)
    finally:
        alembic.command.upgrade(CONFIG, "head")
    assert set(Base.metadata.tables) <= set(inspect(engine).get_table_names())


@pytest.mark.usefixtures("_up_again")
def test_the_release_before_works_with_this_schema_and_keeps_every_row_there_and_back() -> None:
    work_as_the_release_before()
    with transaction() as session:
        assert ledger.check_books(session).balanced
    now = columns()

    alembic.command.downgrade(CONFIG, RELEASE)
    before = columns()
    kept = rows(before)
    for table in ("tasks", "deliveries"):
        with case(table):
            states = {str(value) for row in kept[table] for value in row}
            known = {"tasks": "status", "deliveries": "state"}[table]
            assert set(Base.metadata.tables[table].c[known].type.enums) <= states  # type: ignore[attr-defined]
    assert all(kept.values()), "every table has a row"
    alembic.command.upgrade(CONFIG, "head")
    same = {column: how for column, how in before.items() if column not in REWRITTEN}
    there = rows(same)
    alembic.command.downgrade(CONFIG, RELEASE)
    assert rows(before) == kept
    assert there == rows(same)

    # What the old release does not know of must not stop it.
    assert set(before) <= set(now)
    for column in set(now) - set(before):
        nullable, default = now[column]
        if column[0] in {table for table, _ in before}:
            with case(".".join(column)):
                assert nullable or default is not None
    for column in before:
        with case(".".join(column)):
            assert now[column][0] or not before[column][0]


@pytest.mark.usefixtures("_up_again")
def test_an_erased_task_is_erased_again_after_the_way_back(
    customer: Customer, submit: Submit
) -> None:
    task = submit(customer)
    with transaction() as session:
        claim = tasks.claim_of(tasks.claim_next(session, "w") or task)
        tasks.complete(
            session,
            claim,
            image_key="images/20200101T00/x.png",
            image_sha256="ab",
            image_size_bytes=1,
            image_width=64,
            image_height=64,
            image_url="https://example.com/x.png",
            expires_at=task.created_at,
            prompt_tokens=1,
            prompt_tokens_read=1,
        )
    with transaction() as session:
        session.execute(update(Task).values(finished_at=task.created_at - timedelta(days=400)))
    assert repair.old_tasks() == 1

    alembic.command.downgrade(CONFIG, RELEASE)
    alembic.command.upgrade(CONFIG, "head")

    assert customer.task(task.id).erased_at is None
    assert repair.old_tasks() == 1
    assert customer.task(task.id).image_key is None


def test_every_migration_says_how_long_it_waits_for_a_lock() -> None:
    paths = sorted((ROOT / "migrations" / "versions").glob("*.py"))
    assert len(paths) >= 4
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in ("upgrade", "downgrade"):
                with case(f"{path.name}, {node.name}"):
                    assert "SET LOCAL lock_timeout = '5s'" in ast.unparse(node)


def test_an_index_on_a_table_that_may_be_large_is_built_beside_the_traffic() -> None:
    large = {"tasks", "ledger_entries", "deliveries", "delivery_attempts", "remembered_requests"}
    for path in sorted((ROOT / "migrations" / "versions").glob("*.py")):
        if path.name[:4] in FINAL:
            continue
        tree = ast.parse(path.read_text())
        made = {
            ast.literal_eval(call.args[0])
            for call in _calls(tree, "create_table")
            if isinstance(call.args[0], ast.Constant)
        }
        for call in _calls(tree, "create_index"):
            with case(f"{path.name}, {ast.unparse(call.args[0])}"):
                table = ast.literal_eval(call.args[1])
                concurrently = "postgresql_concurrently" in {each.arg for each in call.keywords}
                assert table not in large - made or concurrently


def _calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
    ]


@pytest.mark.usefixtures("_up_again")
def test_a_migration_that_meets_a_lock_gives_up_and_can_be_tried_again() -> None:
    head = revision()
    # As every query takes it.
    with locked("tasks", "ACCESS SHARE"), pytest.raises(OperationalError, match="lock timeout"):
        alembic.command.downgrade(CONFIG, RELEASE)
    alembic.command.downgrade(CONFIG, RELEASE)
    with locked("tasks", "ACCESS SHARE"), pytest.raises(OperationalError, match="lock timeout"):
        alembic.command.upgrade(CONFIG, "0004")
    assert revision() == RELEASE
    # The index on requests is built last, and waits for whoever wrote one and has not committed.
    with (
        locked("remembered_requests", "ROW EXCLUSIVE"),
        pytest.raises(OperationalError, match="lock timeout"),
    ):
        alembic.command.upgrade(CONFIG, "0004")
    assert revision() == RELEASE
    assert invalid() == ["ix_remembered_requests_tasks"]

    alembic.command.upgrade(CONFIG, "head")

    assert revision() == head
    assert invalid() == []


def invalid() -> list[str]:
    """Indexes whose building was interrupted, and constraints that were not proved."""
    look = """
        SELECT CAST(indexrelid::regclass AS text) FROM pg_index WHERE NOT indisvalid
         UNION ALL SELECT conname FROM pg_constraint WHERE NOT convalidated
           AND conname IN ('ck_tasks_image', 'ck_tasks_erased_holds_nothing')
    """
    with engine.connect() as connection:
        return list(connection.scalars(text(look)))


@pytest.mark.usefixtures("_up_again")
def test_of_two_that_migrate_at_once_one_waits_and_finds_nothing_to_do() -> None:
    alembic.command.downgrade(CONFIG, RELEASE)
    waits = threading.Event()

    def seen(*_: Any) -> None:
        if "pg_try_advisory_lock" in _[2]:
            waits.set()

    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SELECT pg_advisory_lock(7261955)"))
        event.listen(engine, "after_cursor_execute", seen)
        other = threading.Thread(target=alembic.command.upgrade, args=(CONFIG, "head"))
        other.start()
        try:
            assert waits.wait(60)
            # It waits without a statement, since this waits for every statement that is open.
            connection.execute(text("CREATE INDEX CONCURRENTLY ix_beside ON tasks (created_at)"))
            connection.execute(text("DROP INDEX ix_beside"))
            assert other.is_alive()
        finally:
            event.remove(engine, "after_cursor_execute", seen)
            connection.execute(text("SELECT pg_advisory_unlock_all()"))
            other.join()
    assert revision() != RELEASE
