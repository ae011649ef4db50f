"""callback secrets

Revision: 0006, after 0005

Callback secrets are sealed. Row by row and outside a transaction, so that no account is locked for
longer than one write; stopped half-way it can be run again, since a row says of itself whether it
is sealed. What a process of the older version still writes in clear stays readable.
"""

from collections.abc import Callable

import sqlalchemy as sa
from alembic import op

from storage import sealing

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

AT_ONCE_MAX = 500
COLUMNS = ("callback_secret", "callback_secret_before")


def upgrade() -> None:
    # Rather fail and be tried again than hold up every request behind a lock.
    op.execute("SET LOCAL lock_timeout = '5s'")
    _rewrite(sealing.reseal)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    _rewrite(sealing.unseal)


def _rewrite(change: Callable[[str], str]) -> None:
    with op.get_context().autocommit_block():
        after = ""
        while rows := _next(after):
            for row in rows:
                for column in COLUMNS:
                    kept = getattr(row, column)
                    if kept is not None:
                        _replace(row.id, column, kept, change(kept))
            after = rows[-1].id


def _next(after: str) -> list[sa.Row[tuple[str, str, str | None]]]:
    query = sa.text(
        "SELECT id, callback_secret, callback_secret_before FROM accounts"
        " WHERE id > :after ORDER BY id LIMIT :at_once_max"
    )
    return list(op.get_bind().execute(query, {"after": after, "at_once_max": AT_ONCE_MAX}))


def _replace(account_id: str, column: str, kept: str, changed: str) -> None:
    """Unless it was rotated since it was read: the new one is of whoever wrote it."""
    statement = sa.text(
        f"UPDATE accounts SET {column} = :changed WHERE id = :id AND {column} = :kept"  # noqa: S608 - one of COLUMNS
    )
    op.get_bind().execute(statement, {"id": account_id, "kept": kept, "changed": changed})
