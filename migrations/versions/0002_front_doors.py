"""front doors

Revision: 0002, after 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Rather fail and be tried again than hold up every request behind a lock.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "remembered_requests",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("resend", sa.Integer(), nullable=False),
        sa.Column("task_ids", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name=op.f("fk_remembered_requests_account_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_remembered_requests")),
        sa.UniqueConstraint(
            "account_id",
            "idempotency_key",
            name=op.f("uq_remembered_requests_account_id_idempotency_key"),
        ),
    )
    op.create_index(
        "ix_remembered_requests_created_at", "remembered_requests", ["created_at"], unique=False
    )
    op.create_index(
        "ix_remembered_requests_resend",
        "remembered_requests",
        ["account_id", "fingerprint"],
        unique=False,
        postgresql_where=sa.text("idempotency_key IS NULL"),
    )
    op.create_table(
        "delivery_attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column(
            "ended_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["deliveries.id"], name=op.f("fk_delivery_attempts_delivery_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delivery_attempts")),
    )
    op.create_index(
        "ix_delivery_attempts_delivery", "delivery_attempts", ["delivery_id", "id"], unique=False
    )
    op.add_column(
        "api_keys",
        sa.Column(
            "used_credits", sa.Numeric(precision=18, scale=6), nullable=False, server_default="0"
        ),
    )
    op.alter_column("api_keys", "used_credits", server_default=None)
    op.execute("""
        UPDATE api_keys SET used_credits = used.credits
          FROM (SELECT api_key_id, sum(price) AS credits FROM tasks
                 WHERE status = 'completed' GROUP BY 1) AS used
         WHERE used.api_key_id = api_keys.id
    """)
    op.create_index(
        "ix_ledger_entries_given",
        "ledger_entries",
        ["account_id"],
        unique=False,
        postgresql_where=sa.text("kind <> 'charge'"),
    )
    op.add_column("tasks", sa.Column("steps", sa.Integer(), nullable=False, server_default="8"))
    op.alter_column("tasks", "steps", server_default=None)
    op.drop_constraint("imageformat", "tasks", type_="check")
    op.create_check_constraint("imageformat", "tasks", "image_format IN ('png', 'jpeg', 'webp')")
    op.add_column("tasks", sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("tasks", sa.Column("image_sha256", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("image_size_bytes", sa.Integer(), nullable=True))
    op.create_index(
        "ix_tasks_deadline",
        "tasks",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('pending', 'processing') AND deadline_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    # What this version alone can say of an image is lost; its bytes stay what they are.
    op.execute("UPDATE tasks SET image_format = 'png' WHERE image_format = 'webp'")
    op.drop_index(
        "ix_tasks_deadline",
        table_name="tasks",
        postgresql_where=sa.text("status IN ('pending', 'processing') AND deadline_at IS NOT NULL"),
    )
    op.drop_column("tasks", "image_size_bytes")
    op.drop_column("tasks", "image_sha256")
    op.drop_column("tasks", "deadline_at")
    op.drop_column("tasks", "steps")
    op.drop_constraint("imageformat", "tasks", type_="check")
    op.create_check_constraint("imageformat", "tasks", "image_format IN ('png', 'jpeg')")
    op.drop_index(
        "ix_ledger_entries_given",
        table_name="ledger_entries",
        postgresql_where=sa.text("kind <> 'charge'"),
    )
    op.drop_column("api_keys", "used_credits")
    op.drop_index("ix_delivery_attempts_delivery", table_name="delivery_attempts")
    op.drop_table("delivery_attempts")
    op.drop_index(
        "ix_remembered_requests_resend",
        table_name="remembered_requests",
        postgresql_where=sa.text("idempotency_key IS NULL"),
    )
    op.drop_index("ix_remembered_requests_created_at", table_name="remembered_requests")
    op.drop_table("remembered_requests")
