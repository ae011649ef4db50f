"""The operator's command line: `python -m api COMMAND`. Its output is tab-separated, for shells.

Every command is an edge like an endpoint: parse, one transaction over the same functions, print.
"""

import argparse
import gc
import inspect
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from socket import socket

from sqlalchemy.exc import ProgrammingError

from storage import accounts, ledger, objects, tasks
from storage.accounts import CREATES_PER_MINUTE
from storage.database import transaction
from storage.errors import ServiceError, ServiceUnavailable, StorageUnavailable
from storage.models import Account, TaskStatus
from storage.sealing import CannotUnseal
from storage.settings import settings

DEMO_CREDITS = Decimal(1500)
ROOT = Path(__file__).parent.parent
ACTOR = "cli"
AMOUNT_MAX = 10**9
"""Of one movement, as in the REST interface."""
COUNT_MAX = 2**31 - 1
SEALED_AT_ONCE_MAX = 200
"""Accounts whose rows `seal-secrets` locks in one transaction, for some milliseconds."""
NOT_STARTED = 3
"""Exit status where the address could not be listened on: uvicorn's own."""
PERIOD_MAX = 36_500
"""Days or hours: long enough for everybody, short enough for a date."""
POLL_S = 0.01


def serve(args: argparse.Namespace) -> None:
    """Answer HTTP on ZIMAGE_HOST and ZIMAGE_PORT until SIGTERM."""
    gc.disable()  # what is loaded stays: there is no garbage in it to look for
    _check_image_store()  # first: the room that it gives back is then taken by what is loaded next

    import uvicorn

    from api.app import create_app
    from api.connections import BoundedProtocol
    from api.settings import settings as api_settings
    from storage.logs import Behind, configure

    log = Behind(sys.stdout)
    configure("api", log)
    app = create_app()
    gc.collect()
    gc.freeze()
    gc.enable()
    _wait_for(args.after)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            """Let those go who wait, before it is waited for them."""
            app.state.waiting.stop()
            await super().shutdown(sockets)

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            with super().capture_signals():  # which ends this process by the signal, at once
                yield
                log.drain()

    server = Server(
        uvicorn.Config(
            app,
            host=api_settings.host,
            port=api_settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=30,
            http=BoundedProtocol,
            ws="none",
            forwarded_allow_ips=api_settings.forwarded_allow_ips,
        )
    )
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(NOT_STARTED)


def prepare(args: argparse.Namespace) -> None:
    """Bring the database to the newest schema and make the bucket."""
    import alembic.command
    from alembic.config import Config

    _check_image_store()
    _wait_for(args.after)
    with transaction() as session:  # a database that does not answer is said in one sentence
        session.connection()
    alembic.command.upgrade(Config(toml_file=ROOT / "pyproject.toml"), "head")
    objects.make_bucket()
    if args.demo_credentials is not None:
        path, account_id = args.demo_credentials
        _write_demo_credentials(Path(path), account_id)


def _check_image_store() -> None:
    """Whether it answers does not matter yet: it may come, and `/ready` tells."""
    try:
        objects.load()
    except objects.TemporaryCredentials as error:
        sys.exit(str(error))


def _wait_for(path: Path | None) -> None:
    """Return once `path` is there; end if whoever started us ends before."""
    starter = os.getppid()
    while path is not None and not path.exists():
        if os.getppid() != starter:
            sys.exit(f"Nobody is left who would make {path}")
        time.sleep(POLL_S)


def demo_credentials(args: argparse.Namespace) -> None:
    """On the first start, make a demo account and an operator, and write their keys to a file.

    A demo account that is there already, of another data folder, gets a new key and no credits.
    """
    _write_demo_credentials(args.path, args.account)


def _write_demo_credentials(path: Path, account_id: str | None) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".new")
    written.unlink(missing_ok=True)
    with transaction() as session:
        demo = session.get(Account, account_id or "")
        if demo is None:
            demo = accounts.create(session, "demo", account_id=account_id)
            ledger.grant(session, demo.id, DEMO_CREDITS, actor=ACTOR, note="demo credits")
        _, api_key = accounts.issue_key(session, demo.id, name="demo", requests_per_minute=None)
        operator = accounts.create(session, "operator")
        _, admin_key = accounts.issue_key(
            session, operator.id, name="operator", admin=True, requests_per_minute=None
        )
        text = (
            f"ZIMAGE_API_KEY={api_key}\nZIMAGE_ADMIN_KEY={admin_key}\n"
            f"ZIMAGE_ACCOUNT_ID={demo.id}\nZIMAGE_CALLBACK_SECRET={demo.callback_secret}\n"
        )
        # Written before the commit and shown after it: keys that nobody knows cost an account that
        # nobody uses, but a file whose keys do not work would stay for ever.
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    written.rename(path)


def create_account(args: argparse.Namespace) -> None:
    """Create an account and print its id."""
    with transaction() as session:
        account = accounts.create(
            session, args.name, user_group=args.group, unfinished_max=args.unfinished_max
        )
    print(account.id)


def list_accounts(args: argparse.Namespace) -> None:
    """Print id, name, group, balance, reserved and whether it is suspended, newest first."""
    with transaction() as session:
        rows = accounts.newest(session, before=None, limit=args.limit)
    _table(
        (a.id, a.name, a.user_group, _amount(a.balance), _amount(a.reserved), _state(a))
        for a in rows
    )


def suspend_account(args: argparse.Namespace) -> None:
    """Refuse every request of an account, within a second."""
    with transaction() as session:
        accounts.change(session, args.account, suspended=True)


def resume_account(args: argparse.Namespace) -> None:
    """End an account's suspension."""
    with transaction() as session:
        accounts.change(session, args.account, suspended=False)


def issue_key(args: argparse.Namespace) -> None:
    """Issue a key; print its id and the key, which is shown only now."""
    expires_at = None
    if args.expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=args.expires_in_days)
    with transaction() as session:
        key, secret = accounts.issue_key(
            session,
            args.account,
            name=args.name,
            models=args.model,
            admin=args.admin,
            requests_per_minute=args.requests_per_minute,
            expires_at=expires_at,
        )
    print(f"{key.id}\t{secret}")


def list_keys(args: argparse.Namespace) -> None:
    """Print id, prefix, name, admin, expiry, revocation and last use of an account's keys."""
    with transaction() as session:
        rows = accounts.keys(session, args.account, before=None, limit=args.limit)
    _table(
        (
            key.id,
            key.prefix,
            key.name,
            "admin" if key.admin else "",
            _moment(key.expires_at),
            _moment(key.revoked_at),
            _moment(key.last_used_at),
        )
        for key in rows
    )


def rotate_key(args: argparse.Namespace) -> None:
    """Replace a key; the old one stays valid for the overlap. Print the new id and key."""
    with transaction() as session:
        key, secret = accounts.rotate_key(
            session, args.key, overlap=timedelta(hours=args.overlap_hours)
        )
    print(f"{key.id}\t{secret}")


def revoke_key(args: argparse.Namespace) -> None:
    """End a key, within a second."""
    with transaction() as session:
        accounts.revoke_key(session, args.key)


def callback_secret(args: argparse.Namespace) -> None:
    """Print the secret that signs an account's callbacks; with --rotate, a new one."""
    with transaction() as session:
        if args.rotate:
            account = accounts.rotate_callback_secret(
                session, args.account, overlap=timedelta(hours=args.overlap_hours)
            )
        else:
            account = accounts.get(session, args.account)
    print(account.callback_secret)


def seal_secrets(args: argparse.Namespace) -> None:
    """Seal every callback secret under the first of ZIMAGE_SECRET_KEYS; print how many accounts.

    After it the other keys may be taken away.
    """
    sealed = 0
    after = ""
    while True:
        with transaction() as session:
            ids = accounts.reseal_callback_secrets(session, after=after, limit=SEALED_AT_ONCE_MAX)
        if not ids:
            break
        sealed += len(ids)
        after = ids[-1]
    print(sealed)


def credit(args: argparse.Namespace) -> None:
    """Top up an account, or adjust it with a negative amount; print what it can spend."""
    with transaction() as session:
        entry, _ = ledger.grant(
            session,
            args.account,
            args.amount,
            actor=ACTOR,
            note=args.note,
            idempotency_key=args.idempotency_key,
        )
        account = accounts.get(session, entry.account_id)
    print(f"{account.id}\t{_amount(account.balance - account.reserved)}")


def read_ledger(args: argparse.Namespace) -> None:
    """Print entries, newest first: time, account, kind, amount, balance, actor, task, note."""
    with transaction() as session:
        rows = ledger.entries(session, args.account, before=None, limit=args.limit)
    _table(
        (
            _moment(entry.created_at),
            entry.account_id,
            entry.kind,
            _amount(entry.amount),
            _amount(entry.balance_after),
            entry.actor,
            entry.task_id or "",
            entry.note or "",
        )
        for entry in rows
    )


def list_tasks(args: argparse.Namespace) -> None:
    """Print tasks, newest first: id, account, status, progress, attempt, price, error."""
    with transaction() as session:
        rows = tasks.newest(
            session, account_id=args.account, status=args.status, before=None, limit=args.limit
        )
    _table(
        (t.id, t.account_id, t.status, t.progress, t.attempt, _amount(t.price), t.error_code or "")
        for t in rows
    )


def check_books(args: argparse.Namespace) -> None:
    """Prove that the books balance; print every fault and exit with 1 if they do not."""
    with transaction() as session:
        books = ledger.check_books(session)
    for fault in books.faults:
        print(fault)
    print(f"{books.accounts} accounts, {len(books.faults)} faults")
    if not books.balanced:
        sys.exit(1)


def _table(rows: Iterable[tuple[object, ...]]) -> None:
    for row in rows:
        print(*row, sep="\t")


def _state(account: Account) -> str:
    return "suspended" if account.suspended else "active"


def _amount(amount: Decimal) -> str:
    return format(amount.normalize(), "f")


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat(timespec="seconds")


def _decimal(argument: str) -> Decimal:
    try:
        amount = Decimal(argument)
        exact = amount.is_finite() and 0 < abs(amount) < AMOUNT_MAX and amount == round(amount, 6)
    except InvalidOperation:
        exact = False
    if not exact:
        raise argparse.ArgumentTypeError(
            f"must be a number below {AMOUNT_MAX}, other than 0, with at most six places"
        )
    return amount


def _count(argument: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", argument) or not 1 <= int(argument) <= COUNT_MAX:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {COUNT_MAX}")
    return int(argument)


def _limit(argument: str) -> int | None:
    return None if argument == "none" else _count(argument)


def _period(argument: str) -> float:
    try:
        period = float(argument)
    except ValueError:
        period = math.nan
    if not 0 <= period <= PERIOD_MAX:  # false for what is not a number
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {PERIOD_MAX}")
    return period


def _group(argument: str) -> str:
    if not accounts.GROUP.fullmatch(argument):
        raise argparse.ArgumentTypeError("must be 1 to 64 letters, digits, _ or -")
    return argument


def _text(argument: str) -> str:
    if not argument.isprintable():  # a tab or a line end would break the tables
        raise argparse.ArgumentTypeError("must not contain control characters")
    return argument


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api", description="Operate the service.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], name: str) -> argparse.ArgumentParser:
        text = inspect.getdoc(run) or ""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    after = "load everything, then wait until this file is there"
    command(serve, "serve").add_argument("--after", type=Path, help=after)
    sub = command(prepare, "prepare")
    sub.add_argument("--after", type=Path, help=after)
    sub.add_argument(
        "--demo-credentials",
        nargs=2,
        metavar=("PATH", "ACCOUNT"),
        help="then do what `demo-credentials` does",
    )
    sub = command(demo_credentials, "demo-credentials")
    sub.add_argument("path", type=Path)
    sub.add_argument("account", nargs="?", help="the demo account's id; without it, a new one")

    sub = command(create_account, "create-account")
    sub.add_argument("name", type=_text)
    sub.add_argument("--group", type=_group, default="default")
    sub.add_argument(
        "--unfinished-max", type=_limit, default=settings.unfinished_max, help="a number, or none"
    )
    command(list_accounts, "list-accounts").add_argument("--limit", type=_count, default=100)
    command(suspend_account, "suspend-account").add_argument("account")
    command(resume_account, "resume-account").add_argument("account")

    sub = command(issue_key, "issue-key")
    sub.add_argument("account")
    sub.add_argument("--name", type=_text, default="")
    sub.add_argument("--model", action="append", help="may be given again; without it, all")
    sub.add_argument("--admin", action="store_true")
    sub.add_argument("--requests-per-minute", type=_limit, default=CREATES_PER_MINUTE)
    sub.add_argument("--expires-in-days", type=_period)
    sub = command(list_keys, "list-keys")
    sub.add_argument("account")
    sub.add_argument("--limit", type=_count, default=100)
    sub = command(rotate_key, "rotate-key")
    sub.add_argument("key", help="the key's id")
    sub.add_argument("--overlap-hours", type=_period, default=24)
    command(revoke_key, "revoke-key").add_argument("key", help="the key's id")
    sub = command(callback_secret, "callback-secret")
    sub.add_argument("account")
    sub.add_argument("--rotate", action="store_true")
    sub.add_argument("--overlap-hours", type=_period, default=24)

    command(seal_secrets, "seal-secrets")

    sub = command(credit, "credit")
    sub.add_argument("account")
    sub.add_argument("amount", type=_decimal)
    sub.add_argument("--note", type=_text)
    sub.add_argument("--idempotency-key")
    sub = command(read_ledger, "ledger")
    sub.add_argument("account", nargs="?")
    sub.add_argument("--limit", type=_count, default=100)
    sub = command(list_tasks, "tasks")
    sub.add_argument("account", nargs="?")
    sub.add_argument("--status", type=TaskStatus, choices=list(TaskStatus))
    sub.add_argument("--limit", type=_count, default=100)
    command(check_books, "check-books")
    return parser


def main() -> None:
    args = parser().parse_args()
    try:
        args.run(args)
    except (ServiceUnavailable, StorageUnavailable) as error:
        cause = str(error.__cause__ or error).partition("\n")[0]
        sys.exit(f"A server that is needed does not answer: {cause}")
    except CannotUnseal as error:
        sys.exit(f"A callback secret cannot be read: {error}")
    except ProgrammingError:
        sys.exit("The database has not this version's schema: run `python -m api prepare` first")
    except ServiceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
