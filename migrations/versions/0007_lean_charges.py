"""lean charges

Revision: 0007, after 0006

Only entries that have an idempotency key are kept unique by it. Charges have none, and each of them
was written into that index for nothing. Either of the two indexes does: so the new one is built
beside the traffic before the old one goes, and every step can be taken twice.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLE = "ledger_entries"
COLUMNS = ["account_id", "idempotency_key"]
PARTIAL = "ix_ledger_entries_idempotency"
WHOLE = "uq_ledger_entries_account_id_idempotency_key"


def upgrade() -> None:
    # Rather fail and be tried again than hold up every request behind a lock.
    op.execute("SET LOCAL lock_timeout = '5s'")
    with op.get_context().autocommit_block():
        # One whose building was interrupted is there, and of no use.
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {PARTIAL}")
        op.create_index(
            "ix_ledger_entries_idempotency",
            "ledger_entries",
            COLUMNS,
            unique=True,
            postgresql_where=sa.text("idempotency_key IS NOT NULL"),
            postgresql_concurrently=True,
        )
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS {WHOLE}")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    # Its index may be there without it, from a try that got no further.
    op.execute(f"ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS {WHOLE}")
    with op.get_context().autocommit_block():
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {WHOLE}")
        op.create_index(
            "uq_ledger_entries_account_id_idempotency_key",
            "ledger_entries",
            COLUMNS,
            unique=True,
            postgresql_concurrently=True,
        )
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"ALTER TABLE {TABLE} ADD CONSTRAINT {WHOLE} UNIQUE USING INDEX {WHOLE}")
    op.execute(f"DROP INDEX {PARTIAL}")
