"""invariants

Revision: 0005, after 0004

What the code promises, the database refuses to see broken, whoever asks:

- a task moves only where it may, and what has ended stays as it ended;
- at commit a completed task has its one charge, and no other task has any;
- at commit a task that ended with a callback URL has its delivery;
- at commit an account's balance moved by its new entries and nothing else, `reserved` and
  `unfinished` by its tasks and nothing else;
- each entry says what the balance was after it.

The movements of a transaction are added up in settings of the transaction, so that a commit costs
the same however many tasks and entries an account has. They say what changed, not what is: an
account whose books are wrong already is found by `check_books` and not stopped here. Loading old
rows goes with `session_replication_role = replica`, under which none of this runs.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

CHECKS = {
    "ledger_entries": {"sign": "(kind = 'grant') = (amount > 0)"},
    "tasks": {"losses_are_of_attempts": "losses BETWEEN 0 AND attempt"},
    "deliveries": {
        "attempts_bounded": "attempts BETWEEN 0 AND 4",
        "waits_for_an_attempt": "state <> 'waiting' OR attempts < 4",
    },
}

FUNCTIONS = {
    # --- A task moves where it may; see BEFORE in storage.tasks.
    "task_may_move()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF OLD.status IN ('completed', 'failed', 'cancelled') THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s is %s, which is final', OLD.id, OLD.status);
            END IF;
            IF NEW.status <> OLD.status
               AND (OLD.status = 'processing'
                    OR NEW.status IN ('processing', 'cancelled')) IS NOT TRUE THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s cannot go from %s to %s', OLD.id, OLD.status, NEW.status);
            END IF;
            IF NEW.attempt <> OLD.attempt
                              + CAST(OLD.status = 'pending' AND NEW.status = 'processing' AS int)
            THEN
                RAISE check_violation USING MESSAGE = format(
                    'attempt of task %s is the number of its claims', OLD.id);
            END IF;
            IF NEW.losses < OLD.losses THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s cannot have lost fewer workers', OLD.id);
            END IF;
            IF NEW.account_id <> OLD.account_id THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s cannot change its account', OLD.id);
            END IF;
            RETURN NEW;
        END $$""",
    # --- What an end must have brought with it.
    "task_has_ended()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.status = 'completed' AND NOT EXISTS (
                SELECT FROM ledger_entries
                 WHERE task_id = NEW.id AND account_id = NEW.account_id AND amount = -NEW.price)
            THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s is completed and not charged', NEW.id);
            END IF;
            -- Looked up again: what was erased since is told to nobody.
            IF EXISTS (SELECT FROM tasks t
                        WHERE t.id = NEW.id AND t.callback_url IS NOT NULL
                          AND NOT EXISTS (SELECT FROM deliveries WHERE task_id = t.id))
            THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s has ended and owes no callback', NEW.id);
            END IF;
            RETURN NULL;
        END $$""",
    # --- An entry fits its account, and a charge its task.
    "entry_must_fit()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            -- Later ones are of this transaction as well, which has locked the account.
            IF NEW.balance_after <>
                   (SELECT balance FROM accounts WHERE id = NEW.account_id)
                   - (SELECT coalesce(sum(amount), 0)
                        FROM (SELECT amount FROM ledger_entries
                               WHERE account_id = NEW.account_id AND id > NEW.id
                               -- By the index that ends here, and not by all the account's entries.
                               ORDER BY id) AS later)
            THEN
                RAISE check_violation USING MESSAGE = format(
                    'ledger entry %s does not say the balance after it', NEW.id);
            END IF;
            IF NEW.kind = 'charge' AND NOT EXISTS (
                SELECT FROM tasks
                 WHERE id = NEW.task_id AND account_id = NEW.account_id
                   AND status = 'completed' AND price = -NEW.amount)
            THEN
                RAISE check_violation USING MESSAGE = format(
                    'task %s is charged and not completed at that price', NEW.task_id);
            END IF;
            RETURN NULL;
        END $$""",
    # --- The movements of this transaction, added up: [balance, reserved, unfinished] by account.
    # In a bounded number of settings, each with few accounts: one is read and written whole.
    "books_setting(account text)": """
        RETURNS text LANGUAGE sql IMMUTABLE AS $$
            SELECT 'zimage.books_' || (hashtext(account) & 255)
        $$""",
    "books_moved(account text, balance numeric, reserved numeric, unfinished int)": """
        RETURNS void LANGUAGE plpgsql AS $$
        DECLARE
            setting text = books_setting(account);
            moved jsonb = coalesce(nullif(current_setting(setting, true), ''), '{}');
            was jsonb = coalesce(moved -> account, '[0, 0, 0]');
        BEGIN
            balance = balance + CAST(was ->> 0 AS numeric);
            reserved = reserved + CAST(was ->> 1 AS numeric);
            unfinished = unfinished + CAST(was ->> 2 AS int);
            IF balance = 0 AND reserved = 0 AND unfinished = 0 THEN
                moved = moved - account;
            ELSE
                moved = moved || jsonb_build_object(
                    account, jsonb_build_array(balance, reserved, unfinished));
            END IF;
            PERFORM set_config(setting, CAST(moved AS text), true);
        END $$""",
    "account_moved()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                PERFORM books_moved(NEW.id, NEW.balance, NEW.reserved, NEW.unfinished);
            ELSE
                PERFORM books_moved(NEW.id, NEW.balance - OLD.balance,
                                    NEW.reserved - OLD.reserved, NEW.unfinished - OLD.unfinished);
            END IF;
            RETURN NULL;
        END $$""",
    "entry_moved()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM books_moved(NEW.account_id, -NEW.amount, 0, 0);
            RETURN NULL;
        END $$""",
    "task_moved()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP <> 'INSERT' AND OLD.status IN ('pending', 'processing') THEN
                PERFORM books_moved(OLD.account_id, 0, OLD.price, 1);
            END IF;
            IF TG_OP <> 'DELETE' AND NEW.status IN ('pending', 'processing') THEN
                PERFORM books_moved(NEW.account_id, 0, -NEW.price, -1);
            END IF;
            RETURN NULL;
        END $$""",
    "books_must_balance()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            account text;
            moved jsonb;
        BEGIN
            IF TG_TABLE_NAME = 'accounts' THEN
                account = NEW.id;
            ELSIF TG_OP = 'DELETE' THEN
                account = OLD.account_id;
            ELSE
                account = NEW.account_id;
            END IF;
            moved = CAST(nullif(current_setting(books_setting(account), true), '') AS jsonb);
            IF moved ? account THEN
                RAISE check_violation USING MESSAGE = format(
                    'the books of account %s do not balance: '
                    'balance, reserved, unfinished are off by %s', account, moved -> account);
            END IF;
            RETURN NULL;
        END $$""",
    "claim_only_grows()": """
        RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE check_violation USING MESSAGE = format(
                'claim of delivery %s is the number of its claims', OLD.id);
        END $$""",
}

_UNFINISHED = "{}.status IN ('pending', 'processing')"
_HELD_BEFORE, _HELD_NOW = _UNFINISHED.format("OLD"), _UNFINISHED.format("NEW")
_TASK_MOVED = f"({_HELD_BEFORE}) <> ({_HELD_NOW}) OR ({_HELD_NOW} AND OLD.price <> NEW.price)"
_ACCOUNT_MOVED = """
    OLD.balance <> NEW.balance OR OLD.reserved <> NEW.reserved OR OLD.unfinished <> NEW.unfinished
"""
_ACCOUNT_BEGAN = "NEW.balance <> 0 OR NEW.reserved <> 0 OR NEW.unfinished <> 0"

# Each (table, name): (event, condition, function). The conditions keep renewals, progress and
# everything else that moves nothing out of the functions.
BEFORE_ROW = {
    ("tasks", "may_move"): (
        "UPDATE",
        "OLD.status <> NEW.status OR OLD.attempt <> NEW.attempt OR NEW.losses < OLD.losses"
        " OR OLD.price <> NEW.price OR OLD.account_id <> NEW.account_id",
        "task_may_move()",
    ),
    ("deliveries", "claim_only_grows"): (
        "UPDATE",
        "NEW.claim < OLD.claim",
        "claim_only_grows()",
    ),
}
MOVES = {
    ("accounts", "began"): ("INSERT", _ACCOUNT_BEGAN, "account_moved()"),
    ("accounts", "moved"): ("UPDATE", _ACCOUNT_MOVED, "account_moved()"),
    ("ledger_entries", "moved"): ("INSERT", "NEW.amount <> 0", "entry_moved()"),
    ("tasks", "began"): ("INSERT", _HELD_NOW, "task_moved()"),
    ("tasks", "moved"): ("UPDATE", _TASK_MOVED, "task_moved()"),
    ("tasks", "went"): ("DELETE", _HELD_BEFORE, "task_moved()"),
}
AT_COMMIT = {
    (table, f"{name}_in_balance"): (event, condition, "books_must_balance()")
    for (table, name), (event, condition, _) in MOVES.items()
} | {
    ("ledger_entries", "fits"): ("INSERT", "true", "entry_must_fit()"),
    ("tasks", "began_ended"): ("INSERT", f"NOT ({_HELD_NOW})", "task_has_ended()"),
    ("tasks", "ended"): ("UPDATE", f"{_HELD_BEFORE} AND NOT ({_HELD_NOW})", "task_has_ended()"),
}


def upgrade() -> None:
    # Rather fail and be tried again than hold up every request behind a lock.
    op.execute("SET LOCAL lock_timeout = '5s'")
    _lock()
    # Each may be there: from a try that got no further.
    for table, name, condition in _checks():
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}")
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID")
    with op.get_context().autocommit_block():
        for table, name, _ in _checks():
            # Reads all the rows there are, beside everybody who changes them.
            op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
    op.execute("SET LOCAL lock_timeout = '5s'")
    _lock()
    op.create_table(
        "books_checks",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("took_s", sa.Float(), nullable=False),
        sa.Column("accounts", sa.Integer(), nullable=False),
        sa.Column("faults", sa.Integer(), nullable=False),
        sa.Column("completed", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("cancelled", sa.BigInteger(), nullable=False),
        sa.Column("callbacks_given_up", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_books_checks_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_books_checks")),
    )
    for signature, body in FUNCTIONS.items():
        op.execute(f"CREATE FUNCTION {signature} {body}")
    for (table, name), (event, condition, function) in BEFORE_ROW.items():
        _create("TRIGGER", name, "BEFORE", event, table, "", condition, function)
    for (table, name), (event, condition, function) in MOVES.items():
        _create("TRIGGER", name, "AFTER", event, table, "", condition, function)
    for (table, name), (event, condition, function) in AT_COMMIT.items():
        deferred = "DEFERRABLE INITIALLY DEFERRED"
        _create("CONSTRAINT TRIGGER", name, "AFTER", event, table, deferred, condition, function)


def _checks() -> list[tuple[str, str, str]]:
    """Table, name and condition of each."""
    return [
        (table, f"ck_{table}_{name}", condition)
        for table, checks in CHECKS.items()
        for name, condition in checks.items()
    ]


def _create(
    kind: str, name: str, when: str, event: str, table: str, how: str, condition: str, function: str
) -> None:
    op.execute(
        f"CREATE {kind} {name} {when} {event} ON {table} {how} "
        f"FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION {function}"
    )


def _lock() -> None:
    """All that is needed at once, in the order in which a task ends: then a deadlock is unlikely.

    It is short: nothing below reads or writes a row of these tables.
    """
    op.execute("LOCK TABLE tasks, accounts, ledger_entries, deliveries IN ACCESS EXCLUSIVE MODE")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    _lock()
    for table, name in AT_COMMIT | MOVES | BEFORE_ROW:
        op.execute(f"DROP TRIGGER {name} ON {table}")
    for signature in reversed(FUNCTIONS):
        op.execute(f"DROP FUNCTION {signature}")
    for table, name, _ in _checks():
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    op.drop_table("books_checks")
