"""data life

Revision: 0004, after 0003

The tables are large: constraints are added unproven, and proved without a lock that holds anybody
up; indexes are built beside the traffic. That ends the transaction, so every step can be taken
twice, in case that the migration is interrupted in between.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

IMAGE = (
    "CASE WHEN erased_at IS NULL THEN (status = 'completed') = (image_key IS NOT NULL)"
    " ELSE status = 'completed' OR image_key IS NULL END"
)
ERASED = (
    "erased_at IS NULL OR finished_at IS NOT NULL AND prompt = '' AND seed = 0"
    " AND num_nonnulls(rewritten_prompt, reasoning, aspect_ratio, callback_url, request_id,"
    " image_url, image_sha256, error_message) = 0"
)
IMAGE_BEFORE = "(status = 'completed') = (image_key IS NOT NULL)"
INDEXES = ("shown", "to_erase", "image_to_delete")


def upgrade() -> None:
    # Rather fail and be tried again than hold up every request behind a lock.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column(
        "tasks",
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=True),
        if_not_exists=True,
    )
    op.execute(f"""
        ALTER TABLE tasks
         DROP CONSTRAINT IF EXISTS ck_tasks_image,
         DROP CONSTRAINT IF EXISTS ck_tasks_erased_holds_nothing,
          ADD CONSTRAINT ck_tasks_image CHECK ({IMAGE}) NOT VALID,
          ADD CONSTRAINT ck_tasks_erased_holds_nothing CHECK ({ERASED}) NOT VALID
    """)
    with op.get_context().autocommit_block():
        op.execute("ALTER TABLE tasks VALIDATE CONSTRAINT ck_tasks_image")
        op.execute("ALTER TABLE tasks VALIDATE CONSTRAINT ck_tasks_erased_holds_nothing")
        _drop_indexes()  # one whose building was interrupted is there, and of no use
        op.create_index(
            "ix_tasks_shown",
            "tasks",
            ["account_id", "created_at", "id"],
            postgresql_where=sa.text("erased_at IS NULL"),
            postgresql_concurrently=True,
        )
        op.create_index(
            "ix_tasks_to_erase",
            "tasks",
            ["finished_at"],
            postgresql_where=sa.text("erased_at IS NULL AND finished_at IS NOT NULL"),
            postgresql_concurrently=True,
        )
        op.create_index(
            "ix_tasks_image_to_delete",
            "tasks",
            ["id"],
            postgresql_where=sa.text("erased_at IS NOT NULL AND image_key IS NOT NULL"),
            postgresql_concurrently=True,
        )
        op.create_index(
            "ix_remembered_requests_tasks",
            "remembered_requests",
            ["task_ids"],
            postgresql_using="gin",
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        _drop_indexes()
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
        ALTER TABLE tasks
         DROP CONSTRAINT IF EXISTS ck_tasks_image,
         DROP CONSTRAINT IF EXISTS ck_tasks_erased_holds_nothing
    """)
    # The version before knows no task without its image; this one is erased when it comes back.
    op.execute("UPDATE tasks SET image_key = '' WHERE status = 'completed' AND image_key IS NULL")
    op.execute(f"ALTER TABLE tasks ADD CONSTRAINT ck_tasks_image CHECK ({IMAGE_BEFORE})")
    op.drop_column("tasks", "erased_at")


def _drop_indexes() -> None:
    for name in (*(f"tasks_{which}" for which in INDEXES), "remembered_requests_tasks"):
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS ix_{name}")
