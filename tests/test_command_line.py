"""`python -m api`: what operators type, what shells read, and one sentence when it cannot be."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select, text

from api.__main__ import parser
from storage import accounts, ledger, tasks
from storage.database import engine, transaction
from storage.errors import KeyNotFound, WouldOverdraw
from storage.models import Account, ApiKey, ImageFormat, LedgerEntry, Task

if TYPE_CHECKING:
    from tests.warm import Warm

    Command = Callable[..., list[list[str]]]
    Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; what it prints, as a table."""

    def run(*argv: str) -> list[list[str]]:
        args = parser().parse_args(argv)
        args.run(args)
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def process(warm: Warm) -> Process:
    """Run a command as a shell does; of the variables that are named, None takes one away."""

    def run(*argv: str, **changed: str | None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in (os.environ | changed).items() if v is not None}
        return warm.run("-m", "api", *argv, env=environment)

    return run


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said: one line, no traceback, nothing on stdout."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def account(account_id: str) -> Account:
    with transaction() as session:
        return accounts.get(session, account_id)


def key(key_id: str) -> ApiKey:
    with transaction() as session:
        return session.get_one(ApiKey, key_id)


# --- As a process ---------------------------------------------------------------------------------


def test_a_missing_setting_is_one_sentence_that_names_it(process: Process) -> None:
    said = sentence(process("list-accounts", ZIMAGE_DATABASE_URL=None))

    assert said == "The setting ZIMAGE_DATABASE_URL is not usable: Field required\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ZIMAGE_DATABASE_URL", "mysql://root:swordfish@localhost/zimage"),
        ("ZIMAGE_REDIS_URL", "swordfish@localhost"),
        ("ZIMAGE_PRICE_CREDITS", "swordfish"),
    ],
)
def test_a_malformed_setting_is_one_sentence_that_names_it_and_keeps_its_value(
    name: str, value: str, process: Process
) -> None:
    said = sentence(process("list-accounts", **{name: value}))

    assert said.startswith(f"The setting {name} is not usable: ")
    assert "swordfish" not in said


def test_a_port_that_is_none_is_one_sentence(process: Process) -> None:
    said = sentence(process("serve", ZIMAGE_PORT="eight thousand"))

    assert said.startswith("The setting ZIMAGE_PORT is not usable: ")


def test_a_database_that_does_not_answer_is_one_sentence(process: Process) -> None:
    away = "postgresql+psycopg://someone:swordfish@127.0.0.1:1/zimage"

    said = sentence(process("list-accounts", ZIMAGE_DATABASE_URL=away))

    assert said.startswith("A server that is needed does not answer: ")
    assert "swordfish" not in said


def test_an_unknown_account_is_one_sentence(process: Process) -> None:
    said = sentence(process("issue-key", "acct_nobody"))

    assert said == "There is no account with this id.\n"


def test_image_urls_cannot_be_signed_with_credentials_that_end(process: Process) -> None:
    said = sentence(
        process(
            "serve",
            ZIMAGE_S3_ACCESS_KEY_ID=None,
            ZIMAGE_S3_SECRET_ACCESS_KEY=None,
            AWS_ACCESS_KEY_ID="somebody",
            AWS_SECRET_ACCESS_KEY="swordfish",
            AWS_SESSION_TOKEN="for-an-hour",
        )
    )

    assert "temporary" in said
    assert "swordfish" not in said


def test_check_books_succeeds_where_they_balance(process: Process) -> None:
    result = process("check-books")

    assert (result.returncode, result.stdout, result.stderr) == (0, "0 accounts, 0 faults\n", "")


def test_check_books_fails_where_they_do_not(command: Command, process: Process) -> None:
    ((account_id,),) = command("create-account", "Ada")
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text("UPDATE accounts SET balance = 5"))

    result = process("check-books")

    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text("UPDATE accounts SET balance = 0"))
    assert result.returncode == 1
    assert result.stdout == (
        f"{account_id}: balance 5.000000, but entries sum to 0\n1 accounts, 1 faults\n"
    )
    assert result.stderr == ""


# --- Accounts -------------------------------------------------------------------------------------


def test_an_account_is_created_and_listed(command: Command) -> None:
    ((first,),) = command("create-account", "Ada Lovelace", "--group", "heavy")
    ((second,),) = command("create-account", "Grace")

    assert command("list-accounts") == [
        [second, "Grace", "default", "0", "0", "active"],
        [first, "Ada Lovelace", "heavy", "0", "0", "active"],
    ]
    assert command("list-accounts", "--limit", "1") == [
        [second, "Grace", "default", "0", "0", "active"]
    ]


@pytest.mark.parametrize(
    ("argv", "limit"),
    [((), 1000), (("--unfinished-max", "none"), None), (("--unfinished-max", "7"), 7)],
)
def test_a_limit_of_unfinished_tasks_may_be_none(
    command: Command, argv: tuple[str, ...], limit: int | None
) -> None:
    ((account_id,),) = command("create-account", "Ada", *argv)

    assert account(account_id).unfinished_max == limit


def test_an_account_is_suspended_and_resumed(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")

    assert command("suspend-account", account_id) == []
    assert account(account_id).suspended
    assert command("list-accounts")[0][-1] == "suspended"

    assert command("resume-account", account_id) == []
    assert not account(account_id).suspended


# --- Keys -----------------------------------------------------------------------------------------


def test_a_key_is_shown_once(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")

    ((key_id, secret),) = command("issue-key", account_id, "--name", "laptop")

    found, used = asyncio.run(accounts.authenticate([accounts.digest(secret)]))
    with transaction() as session:
        accounts.note_use(session, used)
    (credential,) = found.values()
    assert (credential.key_id, credential.account_id) == (key_id, account_id)
    (row,) = command("list-keys", account_id)
    used_at = row.pop()
    assert row == [key_id, secret[:11], "laptop", "", "", ""]
    assert datetime.fromisoformat(used_at) <= datetime.now(UTC)


def test_a_key_has_what_was_asked_for(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")
    asked = ["--admin", "--model", "one", "--model", "two", "--requests-per-minute", "none"]

    ((key_id, _),) = command("issue-key", account_id, *asked, "--expires-in-days", "0.5")

    issued = key(key_id)
    assert issued.admin
    assert issued.models == ["one", "two"]
    assert issued.requests_per_minute is None
    assert issued.expires_at is not None
    left = issued.expires_at - datetime.now(UTC)
    assert timedelta(hours=11) < left <= timedelta(hours=12)


def test_a_key_has_limits_if_nothing_is_said(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")

    ((key_id, _),) = command("issue-key", account_id)

    issued = key(key_id)
    assert (issued.requests_per_minute, issued.admin) == (120, False)
    assert issued.models is None
    assert issued.expires_at is None


def test_a_key_is_rotated(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")
    ((old_id, old),) = command("issue-key", account_id)

    ((new_id, new),) = command("rotate-key", old_id, "--overlap-hours", "2")

    assert new_id != old_id
    assert new != old
    expires_at = key(old_id).expires_at
    assert expires_at is not None
    assert timedelta(hours=1) < expires_at - datetime.now(UTC) <= timedelta(hours=2)
    assert key(new_id).expires_at is None


def test_a_key_is_revoked(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")
    ((key_id, _),) = command("issue-key", account_id)

    assert command("revoke-key", key_id) == []

    assert key(key_id).revoked_at is not None
    with pytest.raises(KeyNotFound):
        command("rotate-key", key_id)


def test_a_callback_secret_is_read_and_replaced(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")
    ((old,),) = command("callback-secret", account_id)
    assert old == account(account_id).callback_secret

    ((new,),) = command("callback-secret", account_id, "--rotate", "--overlap-hours", "1")

    assert new != old
    changed = account(account_id)
    assert (changed.callback_secret, changed.callback_secret_before) == (new, old)
    assert changed.callback_secret_before_until is not None
    left = changed.callback_secret_before_until - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)


# --- Credits --------------------------------------------------------------------------------------


def test_credits_are_topped_up_and_adjusted(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")

    assert command("credit", account_id, "100.5") == [[account_id, "100.5"]]
    assert command("credit", account_id, "-0.000001") == [[account_id, "100.499999"]]

    assert account(account_id).balance == Decimal("100.499999")


def test_what_is_reserved_cannot_be_adjusted_away(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")
    ((key_id, _),) = command("issue-key", account_id)
    command("credit", account_id, "20")
    submit(account_id, key_id)

    assert command("credit", account_id, "-5") == [[account_id, "0"]]
    with pytest.raises(WouldOverdraw):
        command("credit", account_id, "-0.000001")


def test_a_top_up_with_a_key_is_made_once(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")

    for _ in range(2):
        shown = command("credit", account_id, "100", "--idempotency-key", "order-1")

    assert shown == [[account_id, "100"]]
    assert len(command("ledger", account_id)) == 1


def test_the_ledger_is_a_table_newest_first(command: Command) -> None:
    ((one,),) = command("create-account", "Ada")
    ((other,),) = command("create-account", "Grace")
    command("credit", one, "100", "--note", "invoice 7")
    command("credit", other, "5")
    command("credit", one, "-1")

    table = command("ledger")

    assert [row[1:] for row in table] == [
        [one, "adjustment", "-1", "99", "cli", "", ""],
        [other, "grant", "5", "5", "cli", "", ""],
        [one, "grant", "100", "100", "cli", "", "invoice 7"],
    ]
    assert all(datetime.fromisoformat(row[0]).tzinfo for row in table)
    assert command("ledger", other) == [table[1]]
    assert command("ledger", "--limit", "2") == table[:2]


def submit(account_id: str, key_id: str) -> Task:
    request = tasks.ImageRequest("a cat", 64, 64, ImageFormat.PNG)
    asked = tasks.Submission(account_id, key_id, (request,), dialect="test", price=Decimal(15))
    with transaction() as session:
        (outcome,) = tasks.submit_many(session, [asked])
    assert isinstance(outcome, tasks.Submitted)
    return outcome.tasks[0]


def test_tasks_are_a_table_newest_first(command: Command) -> None:
    ((account_id,),) = command("create-account", "Ada")
    ((key_id, _),) = command("issue-key", account_id)
    command("credit", account_id, "30")
    first, second = submit(account_id, key_id), submit(account_id, key_id)
    with transaction() as session:
        tasks.cancel(session, first.id)

    table = command("tasks", account_id)

    assert table == [
        [second.id, account_id, "pending", "0", "0", "15", ""],
        [first.id, account_id, "cancelled", "0", "0", "15", ""],
    ]
    assert command("tasks", "--status", "cancelled") == table[1:]
    assert command("tasks", "--limit", "1") == table[:1]
    assert command("tasks", "acct_nobody") == []


# --- What is typed wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("no-such-command",),
        ("create-account",),
        ("create-account", "a\tb"),
        ("create-account", "a\nb"),
        ("create-account", "a", "--group", "a\tb"),
        ("create-account", "a", "--unfinished-max", "0"),
        ("create-account", "a", "--unfinished-max", "-1"),
        ("create-account", "a", "--unfinished-max", "many"),
        ("create-account", "a", "--unfinished-max", "2147483648"),
        ("list-accounts", "--limit", "0"),
        ("list-accounts", "--limit", "-1"),
        ("issue-key", "x", "--requests-per-minute", "0"),
        ("issue-key", "x", "--expires-in-days", "nan"),
        ("issue-key", "x", "--expires-in-days", "1e10"),
        ("issue-key", "x", "--expires-in-days", "-1"),
        ("rotate-key", "x", "--overlap-hours", "soon"),
        ("credit", "x", "0"),
        ("credit", "x", "0.0000001"),
        ("credit", "x", "nan"),
        ("credit", "x", "1e30"),
        ("credit", "x", "1000000000"),
        ("credit", "x", "many"),
        ("tasks", "--status", "finished"),
        ("create-account", "x", "--group", "a group"),
    ],
    ids=" ".join,
)
def test_what_is_typed_wrong_is_said_before_anything_is_done(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(argv)

    assert stopped.value.code == 2
    assert "usage: python -m api" in capsys.readouterr().err


# --- The first start ------------------------------------------------------------------------------


def read(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def test_the_demo_credentials_work_and_are_nobody_elses_to_read(
    command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "credentials.env"

    assert command("demo-credentials", str(path)) == []

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = read(path)
    assert set(written) == {
        "ZIMAGE_API_KEY",
        "ZIMAGE_ADMIN_KEY",
        "ZIMAGE_ACCOUNT_ID",
        "ZIMAGE_CALLBACK_SECRET",
    }
    shown = [accounts.digest(written[f"ZIMAGE_{name}_KEY"]) for name in ("API", "ADMIN")]
    found, _ = asyncio.run(accounts.authenticate(shown))
    customer, operator = (found[each] for each in shown)
    assert (customer.admin, operator.admin) == (False, True)
    assert customer.requests_per_minute is None
    demo = account(written["ZIMAGE_ACCOUNT_ID"])
    assert customer.account_id == demo.id
    assert (demo.balance, demo.reserved) == (Decimal(1500), Decimal(0))
    assert demo.callback_secret == written["ZIMAGE_CALLBACK_SECRET"]


def test_what_prepares_waits_for_its_turn_and_then_writes_the_credentials(
    warm: Warm, tmp_path: Path
) -> None:
    turn, path = tmp_path / "servers-ready", tmp_path / "credentials.env"
    options = ("--after", str(turn), "--demo-credentials", str(path), "acct_demo")

    child = warm.start("-m", "api", "prepare", *options)
    assert not path.exists()
    turn.touch()
    _, said = child.communicate()

    assert child.wait() == 0, said
    assert account("acct_demo").callback_secret == read(path)["ZIMAGE_CALLBACK_SECRET"]


def test_the_demo_account_is_made_once(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "credentials.env"
    command("demo-credentials", str(path))
    first = path.read_bytes()

    command("demo-credentials", str(path))

    assert path.read_bytes() == first
    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Account)) == 2
        assert session.scalar(select(func.count()).select_from(LedgerEntry)) == 1


def test_keys_that_cannot_be_written_down_are_not_made(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match="a file"):
        command("demo-credentials", str(tmp_path / "a file" / "credentials.env"))

    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Account)) == 0
        assert ledger.entries(session, None, before=None, limit=1) == []
