"""The ledger: one row a request."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0001"
down_revision = None
branch_labels = ("ledger",)
depends_on = None


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("opened_at", sa.Double, nullable=False),
        # Whole days since 1970 in UTC, so that every database groups by day in the same way.
        sa.Column("day", sa.Integer, nullable=False, index=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("choices", sa.Integer, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("finish", sa.String(32), nullable=False),
        sa.Column("status", sa.String(64), nullable=False),
        sa.Column("queue_ms", sa.Double, nullable=False),
        sa.Column("prefill_ms", sa.Double, nullable=False),
        sa.Column("decode_ms", sa.Double, nullable=False),
        sa.Column("settled_at", sa.Double),
        sa.Column("price", sa.BigInteger),
        sa.Column("currency", sa.String(8), nullable=False),
        sa.Column("writer", sa.String(40), nullable=False),
    )
    op.create_index("usage_of_key", "usage", ["key", "opened_at"])
    op.create_index("usage_of_tenant", "usage", ["tenant", "opened_at"])
    # Few rows are open at a time.
    op.create_index(
        "usage_open",
        "usage",
        ["writer"],
        sqlite_where=sa.text("settled_at IS NULL"),
        postgresql_where=sa.text("settled_at IS NULL"),
    )
