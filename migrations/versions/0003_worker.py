"""worker

Revision: 0003, after 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Rather fail and be tried again than hold up every request behind a lock.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column(
        "tasks", sa.Column("prompt_extend", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    op.add_column(
        "tasks",
        sa.Column("strict_moderation", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.add_column(
        "tasks",
        sa.Column("allow_downscale", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.add_column("tasks", sa.Column("rewritten_prompt", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("reasoning", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("rewrite_input_tokens", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("rewrite_output_tokens", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("rewrite_reasoning_tokens", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("prompt_tokens", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("prompt_tokens_read", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("image_width", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("image_height", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_column("tasks", "image_height")
    op.drop_column("tasks", "image_width")
    op.drop_column("tasks", "prompt_tokens_read")
    op.drop_column("tasks", "prompt_tokens")
    op.drop_column("tasks", "rewrite_reasoning_tokens")
    op.drop_column("tasks", "rewrite_output_tokens")
    op.drop_column("tasks", "rewrite_input_tokens")
    op.drop_column("tasks", "reasoning")
    op.drop_column("tasks", "rewritten_prompt")
    op.drop_column("tasks", "allow_downscale")
    op.drop_column("tasks", "strict_moderation")
    op.drop_column("tasks", "prompt_extend")
